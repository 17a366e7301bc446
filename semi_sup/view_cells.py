"""The cells of 8×8 pixels on which USRN's unlabelled losses live: which of them show the image, and what is at them."""

import torch
from torch import Tensor

from common.ops.resize import Size

CELL = 8  # pixels along a side


def at_cells(label: Tensor) -> Tensor:
    """Labels (B, H, W) at the centre of each cell, (B, H/8, W/8)."""
    return label[..., CELL // 2 :: CELL, CELL // 2 :: CELL]


def inside(geometry: Tensor, crop: Size, grid: Size) -> Tensor:
    """Whether the centre of a cell of 8×8 pixels shows the image and no padding, bool (B, *grid).

    geometry: (B, 7) as the samples carry it; crop: height and width in pixels; grid: those of the logits, which cover
    the crop and what the network pads it by, at the bottom and the right. Padding of the crop itself lies at the bottom
    and the right, mirrored crops have it at the left.
    """
    _, _, height, width, y, x, flip = geometry.T[..., None]
    rows, columns = (centres(n, geometry.device) for n in grid)
    mirrored = torch.where(flip > 0, crop[1] - columns, columns)
    down = rows < height - y
    across = mirrored < width - x
    image = down[:, :, None] & across[:, None, :]
    if covers(crop, grid):
        return image

    return image & within(crop, grid, len(geometry), geometry.device)


def covers(crop: Size, grid: Size) -> bool:
    """Whether a crop fills its grid: the network pads nothing."""
    return crop == (CELL * grid[0], CELL * grid[1])


def within(crop: Size, grid: Size, batch: int, device: torch.device) -> Tensor:
    """Whether the centre of a cell lies in the crop of `crop` pixels, bool (batch, *grid)."""
    down, across = (
        centres(cells, device) < side for cells, side in zip(grid, crop, strict=True)
    )
    return (down[:, None] & across).expand(batch, *grid)


def centres(cells: int, device: torch.device) -> Tensor:
    """The centre of each cell along a side, in pixels."""
    return torch.arange(CELL / 2, CELL * cells, CELL, device=device)
