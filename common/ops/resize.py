"""Bilinear resizing of whole maps and of bands of their rows, and pooling into bins."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

Size = tuple[int, int]  # height, width


def size_of(maps: Tensor) -> Size:
    """Height and width of maps (…, H, W)."""
    return maps.shape[-2], maps.shape[-1]


def resize(x: Tensor, size: tuple[int, int], align_corners: bool = False) -> Tensor:
    """Bilinear resize of (B, C, h, w) to `size` (H, W); `x` itself where nothing changes."""
    if tuple(x.shape[-2:]) == tuple(size):
        return x
    return F.interpolate(x, tuple(size), mode="bilinear", align_corners=align_corners)


def resize_rows(
    x: Tensor,
    size: tuple[int, int],
    rows: tuple[int, int],
    align_corners: bool = False,
    *,
    first: int = 0,
    height: int | None = None,
) -> Tensor:
    """Rows [a, b) of the bilinear resize to `size`, without making the others: (B, C, b-a, W).

    `x` holds the rows `first`, `first` + 1, … of a map that is `height` rows high (default: `x` is the whole map);
    `source_rows` says which of them the result needs.
    """
    (out_height, width) = size
    (start, stop) = rows
    height = x.shape[-2] if height is None else height
    if height == out_height:
        x = x[..., start - first : stop - first, :]
    else:
        low, high, weight = taps(height, out_height, rows, align_corners, x)
        x = torch.lerp(
            x.index_select(-2, low - first), x.index_select(-2, high - first), weight
        )

    return resize(x, (stop - start, width), align_corners)


def source_rows(
    height: int, out_height: int, rows: tuple[int, int], align_corners: bool = False
) -> tuple[int, int]:
    """Rows [a, b) of a map `height` high that the rows `rows` of its resize to `out_height` are made of."""
    start, stop = rows
    if height == out_height:
        return rows

    ends = (_source(float(i), height, out_height, align_corners) for i in (start, stop - 1))
    low, high = (math.floor(end) for end in ends)

    # one row to spare: the weights are made in float32
    return max(low - 1, 0), min(high + 3, height)


def _source(row, height: int, out_height: int, align_corners: bool):
    """The (fractional) source row of output row `row`, a number or a tensor."""
    if align_corners:
        return row * ((height - 1) / max(out_height - 1, 1))
    return (row + 0.5) * (height / out_height) - 0.5


def taps(
    height: int, out_height: int, rows: tuple[int, int], align_corners: bool, like: Tensor
):
    """The two source rows of each output row, and the weight of the second (n, 1)."""
    source = torch.arange(*rows, device=like.device, dtype=torch.float32)
    source = _source(source, height, out_height, align_corners).clamp(0, height - 1)
    low = source.long()
    weight = (source - low)[:, None].to(like.dtype)

    return low, (low + 1).clamp(max=height - 1), weight


def adaptive_average(x: Tensor, size: int) -> Tensor:
    """Average over a size × size grid of bins: (B, C, H, W) to (B, C, size, size).

    CUDA's own kernel adds its gradients in no fixed order, and an exported one holds on to the size of its bins: when
    determinism is asked for, and in an export, two matrix products do it.
    """
    if size == 1:
        return x.mean((2, 3), keepdim=True)
    if not needs_products(x):
        return F.adaptive_avg_pool2d(x, size)
    return _bins(x.shape[2], size, x) @ x @ _bins(x.shape[3], size, x).T


def needs_products(x: Tensor) -> bool:
    """Whether the pooling of `x` must be made of operations that have an order, or that take any size."""
    ordered = x.is_cuda and torch.are_deterministic_algorithms_enabled()
    return ordered or torch.compiler.is_exporting()


def _bins(length: int, size: int, like: Tensor) -> Tensor:
    """Row i averages the elements of bin i: (size, length)."""
    index = torch.arange(length, device=like.device)
    i = torch.arange(size, device=like.device)[:, None]
    inside = (index >= i * length // size) & (index < ((i + 1) * length + size - 1) // size)
    return (inside / inside.sum(1, keepdim=True)).to(like.dtype)
