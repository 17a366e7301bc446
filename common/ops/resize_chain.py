"""Maps of another stride brought to a crop: a chain of bilinear resizes, a crop and a mirror as two small matrices.

Bilinear resizing is linear and separable, and so are cropping and mirroring. A chain of them is therefore

    out = R · map · Cᵀ      with R (out_h, h) and C (out_w, w) for each image,

whatever the sizes in between: a map at stride 8 of the whole image reaches the quarter grid of its crop without the
full-resolution copies that the literal chain makes (CPSL: 19 × 1650 × 3300 floats an image). R and C are made on the
device from the sample's `geometry`, so nothing is read back to the host.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

Size = tuple[int, int]
Pair = tuple[Tensor, Tensor]


class Taps:
    """Which input cells an output cell is made of, and how much of each, along one axis of B images.

    Begins as the output grid itself; each method steps one operation back towards the input, and `matrix` ends the
    walk. Sizes are integers or (B,) integer tensors. Positions are exact ratios of integers, so that the weights do
    not depend on how large the grids in between are (float32 positions err by 1e-4 of a cell at 3000 cells).
    """

    def __init__(self, batch: int, length: int, device: torch.device | str = "cpu"):
        self.index = torch.arange(length, device=device).expand(batch, length)[:, :, None]
        self.weight = torch.ones_like(self.index, dtype=torch.float32)

    def resize(
        self, source: int | Tensor, target: int | Tensor, align_corners: bool = True
    ) -> "Taps":
        """Back through a bilinear resize of `source` cells to `target` cells, as `F.interpolate` does it."""
        source = _column(source, self.index)
        target = _column(target, self.index)
        if align_corners:
            numerator = self.index * (source - 1)
            denominator = (target - 1).clamp(min=1)
        else:
            numerator = ((2 * self.index + 1) * source - target).clamp(min=0)
            denominator = 2 * target

        low = torch.div(numerator, denominator, rounding_mode="floor")
        low = low.clamp(min=0).minimum(source - 1)
        high = (low + 1).minimum(source - 1)
        share = (numerator - low * denominator).float() / denominator
        self.index = torch.cat((low, high), 2)
        self.weight = torch.cat((self.weight * (1 - share), self.weight * share), 2)

        return self

    def mirror(self, size: int | Tensor, flag: Tensor) -> "Taps":
        """Back through a mirror of `size` cells, in the images where `flag` (B,) is not 0."""
        size = _column(size, self.index)
        self.index = torch.where(flag[:, None, None] != 0, size - 1 - self.index, self.index)
        return self

    def crop(self, start: Tensor, size: Tensor) -> "Taps":
        """Back through a crop that begins at `start` (B,) of `size` (B,) cells; what lies outside them counts 0."""
        shifted = self.index + _column(start, self.index)
        size = _column(size, self.index)
        self.weight = self.weight * ((shifted >= 0) & (shifted < size))
        self.index = shifted.clamp(min=0).minimum(size - 1)

        return self

    def matrix(self, size: int) -> Tensor:
        """The whole walk as a matrix (B, output cells, size)."""
        onehot = torch.eye(size, device=self.index.device)[self.index]
        return (self.weight.unsqueeze(2) @ onehot).squeeze(2)


def _column(size: int | Tensor, like: Tensor) -> Tensor:
    """A size that broadcasts against (B, cells, taps); an integer is filled in on the device, not copied to it."""
    return (
        size.to(like.dtype)[:, None, None]
        if isinstance(size, Tensor)
        else like.new_full((1, 1, 1), size)
    )


def cells_of(side: int, stride: int) -> int:
    """Cells along a side of `side` pixels: one for each pixel of `label[::stride]`, so rounded up."""
    return -(-side // stride)


def label_matrices(
    geometry: Tensor, grid: Size, crop: Size, *, stride: int = 4, align_corners: bool = True
) -> Pair:
    """Rows and columns (B, crop/stride, grid) that bring a map of the whole image to its crop as CPSL does soft labels.

    The chain: grid → image size (H0, W0) → random size (h, w) → crop → mirror → resize by 1/stride.
    geometry: int (B, 7) = H0, W0, h, w, y, x, mirrored. Where the image is smaller than the crop, the crop is padded
    with 0 at the bottom and the right, and mirrored with its padding.
    """
    with exactly(geometry):
        *sizes, flip = geometry.long().unbind(1)

        def axis(i: int, mirrored: Tensor | None) -> Tensor:
            cells = cells_of(crop[i], stride)
            taps = Taps(len(geometry), cells, geometry.device)
            taps.resize(crop[i], cells, align_corners)
            sides = (crop[i], crop[i])
            return _through_image(taps, sides, sizes[i::2], mirrored, grid[i], align_corners)

        return axis(0, None), axis(1, flip)


def feature_matrices(
    geometry: Tensor, grid: Size, crop: Size, *, stride: int = 4, align_corners: bool = True
) -> Pair:
    """Rows and columns (B, crop/stride, grid) that bring a map of the whole image to its crop as CPSL does features.

    The chain: grid → image size / stride → random size / stride → crop at the offset / stride → mirror, all floored
    but the crop's own size.
    geometry, padding: as in `label_matrices`.
    """
    with exactly(geometry):
        sizes = torch.div(geometry[:, :6].long(), stride, rounding_mode="floor").unbind(1)

        def axis(i: int, mirrored: Tensor | None) -> Tensor:
            cells = cells_of(crop[i], stride)
            taps = Taps(len(geometry), cells, geometry.device)
            sides = (crop[i] // stride, cells)
            return _through_image(taps, sides, sizes[i::2], mirrored, grid[i], align_corners)

        return axis(0, None), axis(1, geometry[:, 6])


def reached(rows: Tensor, columns: Tensor) -> Tensor:
    """Which output cells of `resample` are made of anything, bool (B, H, W), of `feature_matrices` all but padding.

    rows: (B, H, h); columns: (B, W, w).
    """
    return (rows != 0).any(2)[:, :, None] & (columns != 0).any(2)[:, None]


def _through_image(
    taps: Taps,
    sides: Size,
    sizes: Sequence[Tensor],
    mirrored: Tensor | None,
    cells: int,
    align_corners: bool,
) -> Tensor:
    """The matrix of a walk that continues from a crop to the whole image and to a grid of `cells`.

    sides: the crop's cells, without and with one that it fills in part.
    """
    full, resized, start = sizes
    if mirrored is not None:
        # a padded crop is mirrored about its own middle; in others floored sizes may lack the cell filled in part
        whole, most = sides
        taps.mirror((resized - start).clamp(min=whole, max=most), mirrored)

    taps = (
        taps.crop(start, resized)
        .resize(full, resized, align_corners)
        .resize(cells, full, align_corners)
    )
    return taps.matrix(cells)


def resize_matrices(maps: Tensor, size: Size, *, align_corners: bool = True) -> Pair:
    """Rows (B, H, h) and columns (B, W, w) that bring maps (B, C, h, w) to `size` (H, W) by one bilinear resize."""
    with exactly(maps):

        def axis(cells: int, wanted: int) -> Tensor:
            return (
                Taps(len(maps), wanted, maps.device)
                .resize(cells, wanted, align_corners)
                .matrix(cells)
            )

        return axis(maps.shape[2], size[0]), axis(maps.shape[3], size[1])


def feature_reach(grid: Size, image: Size, stride: int = 4) -> int:
    """How far apart, in cells of `grid`, two cells can be that `feature_matrices` mixes into one.

    image: H0, W0. The last resize mixes two neighbours of the image / stride, and each of them is a mix of two cells.
    """
    steps = [
        -(-(cells - 1) // max(side // stride - 1, 1))
        for cells, side in zip(grid, image, strict=True)
    ]
    return max(steps) + 1


def resample(maps: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """rows · map · columnsᵀ: maps (B, C, h, w), rows (B, H, h), columns (B, W, w) to float32 (B, C, H, W)."""
    with exactly(maps):
        out = maps.new_empty(
            *maps.shape[:2], rows.shape[1], columns.shape[1], dtype=torch.float32
        )
        for i, sides in enumerate(zip(maps, rows, columns, strict=True)):
            image, r, c = seen_part(*sides)
            out[i] = r @ (image.float() @ c.T)

        return out


def resample_points(
    maps: Tensor, rows: Tensor, columns: Tensor, reach: int, index: Tensor
) -> Tensor:
    """Some cells of `resample` alone: maps (B, C, h, w), flat output cells `index` (B, n) to float32 (B, n, C).

    The matrices hold shares, at least 0. reach: how far apart two cells can be that one output cell is made of; only so
    many are looked up.
    """
    with exactly(maps):
        width = columns.shape[1]
        cells = maps.shape[3]
        down, i = _taps_of(rows, index // width, reach)
        across, j = _taps_of(columns, index % width, reach)
        place = (i[..., :, None] * cells + j[..., None, :]).flatten(1)  # (B, n · taps²)
        found = maps.flatten(2).gather(2, place[:, None].expand(-1, maps.shape[1], -1)).float()
        weight = (down[..., :, None] * across[..., None, :]).flatten(2)

        return torch.einsum("bcnt,bnt->bnc", found.unflatten(2, weight.shape[1:]), weight)


def _taps_of(matrix: Tensor, index: Tensor, reach: int) -> tuple[Tensor, Tensor]:
    """Weights and input cells (B, n, taps) of the output cells `index` (B, n) of a matrix (B, H, h)."""
    lines = matrix.gather(1, index[:, :, None].expand(-1, -1, matrix.shape[2]))
    return lines.topk(min(reach + 1, matrix.shape[2]), dim=2)


def resample_labels(maps: Tensor, geometry: Tensor, crop: Size, *, stride: int = 4) -> Tensor:
    """Soft labels (B, C, h, w) of the whole image on the grid of the crop: float32 (B, C, crop/stride)."""
    return resample(
        maps, *label_matrices(geometry, tuple(maps.shape[-2:]), crop, stride=stride)
    )


def seen_part(image: Tensor, rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A map (C, h, w) and its matrices without the cells that no output cell sees.

    Only on the CPU, where looking at the matrices costs nothing: at CPSL's sizes the crop covers a fifth of the map on
    average. Elsewhere all comes back as it is.
    """
    if image.device.type != "cpu":
        return image, rows, columns

    down = _seen(rows)
    across = _seen(columns)
    return image[:, down, across], rows[:, down], columns[:, across]


def _seen(matrix: Tensor) -> slice:
    """From the first to the last column that is not all zero."""
    used = (matrix != 0).any(0).nonzero()
    return slice(int(used[0]), int(used[-1]) + 1) if len(used) else slice(0, 1)


def exactly(like: Tensor) -> torch.autocast:
    """No autocast: with weights of 8 bits a position could be off by several pixels."""
    return torch.autocast(like.device.type, enabled=False)
