"""The device side of a strongly augmented view: its geometry applied to maps that live on a coarser grid.

`warp` is one 3×3 matrix for everything that was done to the image, in the order it was done; it takes pixel centres
(x + ½, y + ½) of the view to coordinates of the crop that the view was made from, both H × W pixels. A map (h, w) of
the same field has cells of H/h × W/w pixels, so cell centres go through the same matrix.
"""

import torch
from torch import Tensor

from common.data import IGNORE

Size = tuple[int, int]


def warp_labels(
    labels: Tensor, warp: Tensor, crop: Size, cutout: Tensor | None = None
) -> Tensor:
    """Labels (B, h, w), integers, as the view shows them: nearest cell, −1 outside the crop and inside the cutout.

    warp: (B, 3, 3) float. crop: H, W in pixels. cutout: (B, 4) integers y0, x0, y1, x1 in pixels of the view, ends
    excluded; on the grid it covers the rows from y0 // (H/h) up to y1 // (H/h), and columns likewise.
    """
    size = tuple(labels.shape[-2:])
    index, seen = _nearest(_source(warp, size, crop), size)
    moved = labels.flatten(1).gather(1, index).view_as(labels)
    return moved.masked_fill(~_visible(seen.view_as(labels), cutout, crop), IGNORE)


def warp_maps(
    maps: Tensor, warp: Tensor, crop: Size, cutout: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Maps (B, C, h, w) as the view shows them, and the bool mask (B, h, w) of what is visible.

    Maps are those of the nearest cell, 0 outside the crop; the mask is False there and inside the cutout. The other
    arguments are those of `warp_labels`.
    """
    size = tuple(maps.shape[-2:])
    index, seen = _nearest(_source(warp, size, crop), size)
    seen = seen.view(-1, *size)

    every_channel = index[:, None].expand(-1, maps.shape[1], -1)
    moved = maps.flatten(2).gather(2, every_channel).view_as(maps)

    return moved * seen[:, None], _visible(seen, cutout, crop)


def _source(warp: Tensor, size: Size, crop: Size) -> Tensor:
    """Where each cell centre of the view lies in the crop, in cells: (B, h, w, 2) as x, y; cell i covers [i, i + 1)."""
    h, w = size
    height, width = crop

    def centres(cells: int, side: int) -> Tensor:
        """Centres of the cells along a side of the crop, in pixels."""
        return (torch.arange(cells, device=warp.device, dtype=torch.float32) + 0.5) * (
            side / cells
        )

    with torch.autocast(warp.device.type, enabled=False):
        y = centres(h, height)[:, None]
        x = centres(w, width)
        m = warp.float()[:, :2, :, None, None]  # (B, row, column, 1, 1)
        moved = m[:, :, 0] * x + m[:, :, 1] * y + m[:, :, 2]

        across = moved[:, 0] * (w / width)
        down = moved[:, 1] * (h / height)
        return torch.stack((across, down), -1)


def _nearest(source: Tensor, size: Size) -> tuple[Tensor, Tensor]:
    """The flat cell index and whether it lies in the map, both (B, h·w)."""
    x, y = source.floor().long().flatten(1, 2).unbind(-1)
    seen = (x >= 0) & (x < size[1]) & (y >= 0) & (y < size[0])
    return y.clamp(0, size[0] - 1) * size[1] + x.clamp(0, size[1] - 1), seen


def _visible(seen: Tensor, cutout: Tensor | None, crop: Size) -> Tensor:
    """`seen` (B, h, w) without the cutout."""
    if cutout is None:
        return seen

    y0, x0, y1, x1 = cutout.long()[:, :, None].unbind(1)

    def cut(first: Tensor, end: Tensor, cells: int, side: int) -> Tensor:
        """Which cells along a side of the crop are cut out."""
        cell = torch.arange(cells, device=seen.device)
        return (cell >= first * cells // side) & (cell < end * cells // side)

    h, w = seen.shape[-2:]
    down = cut(y0, y1, h, crop[0])
    across = cut(x0, x1, w, crop[1])
    return seen & ~(down[:, :, None] & across[:, None, :])
