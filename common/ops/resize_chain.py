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

    def resize(self, source: int | Tensor, target: int | Tensor, align_corners: bool = True) -> "Taps":
        """Back through a bilinear resize of `source` cells to `target` cells, as `F.interpolate` does it."""
        source, target = _column(source, self.index), _column(target, self.index)
        if align_corners:
            numerator, denominator = self.index * (source - 1), (target - 1).clamp(min=1)
        else:
            numerator, denominator = ((2 * self.index + 1) * source - target).clamp(min=0), 2 * target
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
        shifted, size = self.index + _column(start, self.index), _column(size, self.index)
        self.weight = self.weight * ((shifted >= 0) & (shifted < size))
        self.index = shifted.clamp(min=0).minimum(size - 1)
        return self

    def matrix(self, size: int) -> Tensor:
        """The whole walk as a matrix (B, output cells, size)."""
        onehot = torch.eye(size, device=self.index.device)[self.index]
        return (self.weight.unsqueeze(2) @ onehot).squeeze(2)


def _column(size: int | Tensor, like: Tensor) -> Tensor:
    """A size that broadcasts against (B, cells, taps); an integer is filled in on the device, not copied to it."""
    return size.to(like.dtype)[:, None, None] if isinstance(size, Tensor) else like.new_full((1, 1, 1), size)


def label_matrices(geometry: Tensor, grid: Size, crop: Size, *, stride: int = 4, align_corners: bool = True) -> Pair:
    """Rows and columns (B, crop/stride, grid) that bring a map of the whole image to its crop as CPSL does soft labels.

    The chain: grid → image size (H0, W0) → random size (h, w) → crop → mirror → resize by 1/stride.
    geometry: int (B, 7) = H0, W0, h, w, y, x, mirrored.
    """
    with _exact(geometry):
        *sizes, flip = geometry.long().unbind(1)

        def axis(i: int, mirrored: Tensor | None) -> Tensor:
            taps = Taps(len(geometry), crop[i] // stride, geometry.device)
            taps.resize(crop[i], crop[i] // stride, align_corners)
            return _through_image(taps, crop[i], sizes[i::2], mirrored, grid[i], align_corners)

        return axis(0, None), axis(1, flip)


def feature_matrices(geometry: Tensor, grid: Size, crop: Size, *, stride: int = 4, align_corners: bool = True) -> Pair:
    """Rows and columns (B, crop/stride, grid) that bring a map of the whole image to its crop as CPSL does features.

    The chain: grid → image size / stride → random size / stride → crop at the offset / stride → mirror, all floored.
    geometry: int (B, 7) = H0, W0, h, w, y, x, mirrored.
    """
    with _exact(geometry):
        sizes = torch.div(geometry[:, :6].long(), stride, rounding_mode="floor").unbind(1)

        def axis(i: int, mirrored: Tensor | None) -> Tensor:
            taps = Taps(len(geometry), crop[i] // stride, geometry.device)
            return _through_image(taps, crop[i] // stride, sizes[i::2], mirrored, grid[i], align_corners)

        return axis(0, None), axis(1, geometry[:, 6])


def _through_image(
    taps: Taps, side: int, sizes: Sequence[Tensor], mirrored: Tensor | None, cells: int, align_corners: bool
) -> Tensor:
    """The matrix of a walk that goes on from a crop of `side` cells to the whole image and to a grid of `cells`."""
    full, resized, start = sizes
    if mirrored is not None:
        taps.mirror((resized - start).clamp(max=side), mirrored)  # padding is added after the mirror
    taps = taps.crop(start, resized).resize(full, resized, align_corners).resize(cells, full, align_corners)
    return taps.matrix(cells)


def resample(maps: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """rows · map · columnsᵀ: maps (B, C, h, w), rows (B, H, h), columns (B, W, w) to float32 (B, C, H, W).

    On the CPU, where looking at the matrices costs nothing, cells that no output cell sees are left out: at CPSL's
    sizes the crop covers a fifth of the map on average.
    """
    with _exact(maps):
        out = maps.new_empty(*maps.shape[:2], rows.shape[1], columns.shape[1], dtype=torch.float32)
        for i, (image, r, c) in enumerate(zip(maps, rows, columns, strict=True)):
            if maps.device.type == "cpu":
                down, across = _seen(r), _seen(c)
                image, r, c = image[:, down, across], r[:, down], c[:, across]
            out[i] = r @ (image.float() @ c.T)
        return out


def resample_labels(maps: Tensor, geometry: Tensor, crop: Size, *, stride: int = 4) -> Tensor:
    """Soft labels (B, C, h, w) of the whole image on the grid of the crop: float32 (B, C, crop/stride)."""
    return resample(maps, *label_matrices(geometry, tuple(maps.shape[-2:]), crop, stride=stride))


def resample_features(maps: Tensor, geometry: Tensor, crop: Size, *, stride: int = 4) -> Tensor:
    """Features (B, C, h, w) of the whole image on the grid of the crop: float32 (B, C, crop/stride)."""
    return resample(maps, *feature_matrices(geometry, tuple(maps.shape[-2:]), crop, stride=stride))


def _seen(matrix: Tensor) -> slice:
    """From the first to the last column that is not all zero."""
    used = (matrix != 0).any(0).nonzero()
    return slice(int(used[0]), int(used[-1]) + 1) if len(used) else slice(0, 1)


def _exact(like: Tensor) -> torch.autocast:
    """No autocast: with weights of 8 bits a position could be off by several pixels."""
    return torch.autocast(like.device.type, enabled=False)
