"""Multi-scale deformable attention as `embedding_bag`, and what its forms share; see deform_attn.py."""

from collections.abc import Sequence
from functools import lru_cache, partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from common.distributed import to_device

Shapes = Sequence[tuple[int, int]]


@lru_cache(maxsize=64)
def level_constants(shapes: Shapes, device: torch.device, repeat: int = 1) -> Tensor:
    """(4, L·repeat) int32 rows height, width, first row in the flat map, first row in the map with a border of 1.

    Kept per set of shapes, so that no step waits for a copy from the host.
    """
    table, first, padded = [], 0, 0
    for h, w in shapes:
        table += [(h, w, first, padded)] * repeat
        first, padded = first + h * w, padded + (h + 2) * (w + 2)
    table = torch.tensor(table, dtype=torch.int32).t().contiguous()
    return to_device(table, device)


class _Corners(NamedTuple):
    """Where each of N = B·Q·M bags reads, for its T = L·P samples; all (N, T)."""

    rows: Tensor  # of the upper left corner, in the table with border
    down: Tensor  # (T,) rows from a pixel to the one below
    x: Tensor  # bilinear fractions
    y: Tensor
    moves_x: Tensor  # whether x follows the location (inside the map) or is held at its edge
    moves_y: Tensor


class EmbeddingBagForm:
    """The sum as `embedding_bag` on a table of rows (pixel, head); a border of zeros spares every corner its mask.

    A sample outside the map is moved to the border's outer line, where all that it weighs is zero. The gradient of the
    table is the transposed sum: samples sorted by cell, one bag a cell, once for each corner.
    """

    @staticmethod
    def forward(value: Tensor, shapes: Shapes, locations: Tensor, weights: Tensor) -> Tensor:
        table = _with_border(in_full(value), shapes)
        at = _corners(locations, shapes, value)
        bags = F.embedding_bag(
            _corner_rows(at, value.shape[2]),
            table.flatten(0, 2),
            per_sample_weights=torch.cat(_corner_weights(at, weights, table.dtype), 1),
            mode="sum",
        )
        return bags.view(*locations.shape[:2], -1).to(value.dtype)

    @staticmethod
    def backward(
        gradient: Tensor, value: Tensor, shapes: Shapes, locations: Tensor, weights: Tensor
    ):
        gradient = in_full(gradient).view(-1, value.shape[3])
        table = _with_border(in_full(value), shapes)
        at = _corners(locations, shapes, value)
        share = _corner_weights(at, weights, table.dtype)
        grad_value = _grad_value(gradient, at, share, table, shapes)
        d00, d01, d10, d11 = _dot_products(
            gradient, table.flatten(0, 2), _corner_rows(at, value.shape[2])
        ).chunk(4, 1)
        top, bottom = torch.lerp(d00, d01, at.x), torch.lerp(d10, d11, at.x)
        grad_weights = torch.lerp(top, bottom, at.y)
        height, width = level_constants(tuple(shapes), value.device, weights.shape[-1])[:2]
        weights = weights.reshape(at.x.shape)
        grad_x = torch.where(
            at.moves_x, torch.lerp(d01 - d00, d11 - d10, at.y) * weights * width, 0
        )
        grad_y = torch.where(at.moves_y, (bottom - top) * weights * height, 0)
        grad_locations = torch.stack([grad_x, grad_y], -1).view(locations.shape)
        return (
            grad_value.to(value.dtype),
            grad_locations.to(locations.dtype),
            grad_weights.view(locations.shape[:-1]).to(weights.dtype),
        )


def in_full(x: Tensor) -> Tensor:
    """In float32, or in float64 as it is."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def _with_border(value: Tensor, shapes: Shapes) -> Tensor:
    """(B, S, M, D) → (B, R, M, D), each level with a border of one pixel of zeros."""
    batch, _, heads, channels = value.shape
    inner = [h * w for h, w in shapes]
    outer = [(h + 2) * (w + 2) for h, w in shapes]
    table = value.new_zeros(batch, sum(outer), heads, channels)

    levels = zip(table.split(outer, 1), value.split(inner, 1), shapes, strict=True)
    for level, pixels, (h, w) in levels:
        bordered = level.unflatten(1, (h + 2, w + 2))
        bordered[:, 1:-1, 1:-1] = pixels.unflatten(1, (h, w))
    return table


def _corners(locations: Tensor, shapes: Shapes, value: Tensor) -> _Corners:
    batch, queries, heads, levels, points = locations.shape[:-1]
    height, width, _, start = level_constants(tuple(shapes), value.device, points)
    cells = sum((h + 2) * (w + 2) for h, w in shapes)
    rows_of_image = heads * cells
    kind = torch.int32 if batch * rows_of_image < 2**31 else torch.int64

    samples = levels * points
    x, y = in_full(locations).reshape(batch, queries, heads, samples, 2).unbind(-1)
    column, x, moves_x = _axis(x, width, kind)
    row, y, moves_y = _axis(y, height, kind)

    counter = partial(torch.arange, dtype=kind, device=value.device)
    head = counter(heads).view(heads, 1)
    image = counter(batch).view(batch, 1, 1, 1)
    first_of_image = image * rows_of_image

    stride = (width + 2).to(kind)
    cell = row * stride
    cell.add_(column).add_(start + stride + 1)
    rows = cell.mul_(heads).add_(head + first_of_image)

    flat = (t.view(-1, samples) for t in (x, y, moves_x, moves_y))
    return _Corners(rows.view(-1, samples), stride * heads, *flat)


def _axis(coordinate: Tensor, size: Tensor, kind: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Along one axis of a level: the pixel before each sample, −1 for the border; how far the sample is beyond it, in
    pixels; whether it moves with its coordinate."""
    limit = size.to(coordinate.dtype)
    position = coordinate * limit - 0.5  # in pixels; −1 and `size` are the border
    moves = (position > -1) & (position < limit)
    position = torch.minimum(position.clamp_(min=-1), limit)

    # Clamped again as integers: the integer of a NaN is arbitrary, and a row must exist.
    lower = position.floor().to(kind).clamp_(min=-1)
    lower = torch.minimum(lower, size.to(kind) - 1)
    return lower, position - lower, moves


def _corner_rows(at: _Corners, heads: int) -> Tensor:
    """(N, 4T): upper left, upper right, lower left, lower right."""
    below = at.rows + at.down
    return torch.cat([at.rows, at.rows + heads, below, below + heads], 1)


def _corner_weights(at: _Corners, weights: Tensor, dtype: torch.dtype) -> list[Tensor]:
    weights = weights.reshape(at.x.shape).to(dtype)
    lower = weights * at.y
    upper = weights - lower
    upper_right, lower_right = upper * at.x, lower * at.x
    return [upper - upper_right, upper_right, lower - lower_right, lower_right]


def _dot_products(gradient: Tensor, table: Tensor, rows: Tensor) -> Tensor:
    """(N, 4T): ⟨gradient of the bag, row⟩ for every row that a bag reads."""
    bags, size = rows.shape
    offsets = torch.arange(0, bags * size, size, dtype=rows.dtype, device=rows.device)
    owner = torch.arange(bags, dtype=rows.dtype, device=rows.device).repeat_interleave(size)
    dots = torch.ops.aten._embedding_bag_per_sample_weights_backward(
        gradient, table, rows.view(-1), offsets, owner, 0
    )
    return dots.view(bags, size)


def _grad_value(
    gradient: Tensor, at: _Corners, share: list[Tensor], table: Tensor, shapes: Shapes
) -> Tensor:
    """(B, S, M, D): Σ over the samples that read a pixel of weight · gradient of their bag."""
    batch, rows, heads, channels = table.shape
    cells, order = torch.sort(at.rows.view(-1), stable=True)
    starts = torch.searchsorted(
        cells, torch.arange(batch * rows * heads, dtype=cells.dtype, device=cells.device)
    )
    bags = order // at.rows.shape[1]
    parts = [table.new_zeros(batch, h, w, heads, channels) for h, w in shapes]
    for (dy, dx), weight in zip(((0, 0), (0, 1), (1, 0), (1, 1)), share, strict=True):
        weight = weight.view(-1).index_select(0, order)
        sums = F.embedding_bag(bags, gradient, starts, per_sample_weights=weight, mode="sum")
        levels = sums.view(batch, rows, heads, channels).split(
            [(h + 2) * (w + 2) for h, w in shapes], 1
        )
        for part, level, (h, w) in zip(parts, levels, shapes, strict=True):
            part += level.unflatten(1, (h + 2, w + 2))[
                :, 1 - dy : h + 1 - dy, 1 - dx : w + 1 - dx
            ]
    return torch.cat([part.flatten(1, 2) for part in parts], 1)
