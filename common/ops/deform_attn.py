"""Multi-scale deformable attention (Deformable DETR, eq. 3): each query sums a few bilinear samples of a pyramid.

    out[b,q,m] = Σ_l Σ_p A[b,q,m,l,p] · V_l[b,m] (loc[b,q,m,l,p])

A location (x, y) is in [0, 1]² of the level; pixel centres are at (i + ½) / size, and what lies outside the map is 0,
as in `grid_sample(…, padding_mode="zeros", align_corners=False)`. Three forms give the same numbers:

grid_sample     the definition, in differentiable torch; any device, any transform.
embedding_bag   one weighted row sum over corners × points, on the CPU several times faster than `grid_sample` at a
                fraction of its memory. Deterministic on every device.
triton          one fused kernel each way (deform_attn_triton.py); keeps only its inputs for the backward.

`ms_deform_attn` chooses once per device and logs what it chose; without Triton it warns that CUDA is slow.
"""

import logging
import os
import shutil
import warnings
from collections.abc import Sequence
from functools import lru_cache, partial
from importlib.util import find_spec
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from common.lazy import constant_result

Form = Literal["grid_sample", "embedding_bag", "triton"]
Shapes = Sequence[tuple[int, int]]
log = logging.getLogger(__name__)


def ms_deform_attn(
    value: Tensor, shapes: Shapes, locations: Tensor, weights: Tensor, form: Form | None = None
) -> Tensor:
    """Weighted sum of the sampled values.

    Args:
        value: (B, S, M, D): the levels' pixels in row order, one level after the other, M heads of D channels.
        shapes: (H, W) of each of the L levels; Σ H·W = S.
        locations: (B, Q, M, L, P, 2), (x, y) in units of the level's width and height.
        weights: (B, Q, M, L, P).
        form: which implementation; None chooses by device.

    Returns (B, Q, M·D) in the dtype of `value`; the sums are in float32 for half-precision values. ValueError where the
    shapes do not fit together.
    """
    shapes = [(int(h), int(w)) for h, w in shapes]
    _check(value, shapes, locations, weights)
    form = form or choose_form(value.device.type, torch.are_deterministic_algorithms_enabled())
    if form == "grid_sample":
        return grid_sample_form(value, shapes, locations, weights)
    sizes = [side for shape in shapes for side in shape]
    return _fused(value, sizes, locations, weights, form)


@constant_result
def choose_form(device: str, deterministic: bool = False) -> Form:
    """The form for a device type; what is chosen is logged once."""
    return _choose(device, deterministic)


@lru_cache
def _choose(device: str, deterministic: bool) -> Form:
    if device == "cpu" or (device == "cuda" and deterministic):
        form, why = "embedding_bag", "fastest on CPUs, deterministic on all devices"
    elif device == "cuda":
        if missing := triton_missing():
            warnings.warn(
                f"deformable attention on cuda: grid_sample, slow and large ({missing})",
                stacklevel=2,
            )
            return "grid_sample"
        form, why = "triton", "fused kernel"
    else:
        form, why = "grid_sample", "any device"
    log.info("deformable attention on %s: %s (%s)", device, form, why)
    return form


def triton_missing() -> str | None:
    """Why the Triton kernel cannot run, or None: it needs Triton and, for its launcher, a C compiler at run time."""
    if find_spec("triton") is None:
        return "Triton is not installed"
    if not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
        return "Triton finds no C compiler (gcc, clang or $CC)"
    return None


def _check(value: Tensor, shapes: Shapes, locations: Tensor, weights: Tensor) -> None:
    positions = sum(h * w for h, w in shapes)
    if positions != value.shape[1]:
        raise ValueError(
            f"value has {value.shape[1]} positions, the levels {shapes} have {positions}"
        )
    expected = (
        value.shape[0],
        locations.shape[1],
        value.shape[2],
        len(shapes),
        locations.shape[4],
    )
    if locations.shape != (*expected, 2) or weights.shape != expected:
        raise ValueError(
            f"locations {tuple(locations.shape)} and weights {tuple(weights.shape)} do not fit value "
            f"{tuple(value.shape)} with {len(shapes)} levels: (B, Q, M, L, P, 2) and (B, Q, M, L, P) are expected"
        )


def grid_sample_form(
    value: Tensor, shapes: Shapes, locations: Tensor, weights: Tensor
) -> Tensor:
    """The definition, level by level; arguments and result as in `ms_deform_attn`."""
    batch, _, heads, channels = value.shape
    queries, kind = locations.shape[1], value.dtype
    value = _float(value)
    locations, weights = locations.to(value.dtype), weights.to(value.dtype)
    total, start = 0, 0
    for level, (h, w) in enumerate(shapes):
        pixels = (
            value[:, start : start + h * w]
            .permute(0, 2, 3, 1)
            .reshape(batch * heads, channels, h, w)
        )
        grid = (
            (2 * locations[:, :, :, level] - 1).transpose(1, 2).flatten(0, 1)
        )  # (B·M, Q, P, 2)
        # (B·M, D, Q, P)
        samples = F.grid_sample(pixels, grid, padding_mode="zeros", align_corners=False)
        weight = weights[:, :, :, level].transpose(1, 2).reshape(batch * heads, 1, queries, -1)
        total = total + (samples * weight).sum(-1)
        start += h * w
    return total.view(batch, heads * channels, queries).transpose(1, 2).to(kind)


# The two fused forms are opaque operators with a hand-written backward: torch.compile takes them as they are, and only
# value, locations and weights stay alive until the backward.


@torch.library.custom_op("longtail::ms_deform_attn", mutates_args=())
def _fused(
    value: Tensor, sizes: Sequence[int], locations: Tensor, weights: Tensor, form: str
) -> Tensor:
    value, locations, weights = (t.contiguous() for t in (value, locations, weights))
    return _implementation(form).forward(value, _pairs(sizes), locations, weights)


@torch.library.custom_op("longtail::ms_deform_attn_backward", mutates_args=())
def _fused_backward(
    gradient: Tensor,
    value: Tensor,
    sizes: Sequence[int],
    locations: Tensor,
    weights: Tensor,
    form: str,
) -> tuple[Tensor, Tensor, Tensor]:
    gradient, value, locations, weights = (
        t.contiguous() for t in (gradient, value, locations, weights)
    )
    return _implementation(form).backward(gradient, value, _pairs(sizes), locations, weights)


@_fused.register_fake
def _(value, sizes, locations, weights, form):
    return value.new_empty(value.shape[0], locations.shape[1], value.shape[2] * value.shape[3])


@_fused_backward.register_fake
def _(gradient, value, sizes, locations, weights, form):
    return tuple(
        torch.empty_like(t, memory_format=torch.contiguous_format)
        for t in (value, locations, weights)
    )


def _save(ctx, inputs, output):
    value, ctx.sizes, locations, weights, ctx.form = inputs
    ctx.save_for_backward(value, locations, weights)


def _differentiate(ctx, gradient):
    value, locations, weights = ctx.saved_tensors
    grads = _fused_backward(gradient, value, ctx.sizes, locations, weights, ctx.form)
    return grads[0], None, grads[1], grads[2], None


_fused.register_autograd(_differentiate, setup_context=_save)


def _pairs(sizes: Sequence[int]) -> tuple[tuple[int, int], ...]:
    return tuple(zip(sizes[::2], sizes[1::2], strict=True))


def _implementation(form: str):
    if form == "embedding_bag":
        return EmbeddingBagForm
    if form == "triton":
        from common.ops import deform_attn_triton  # imported on first use: Triton is optional

        return deform_attn_triton
    raise ValueError(
        f"deformable attention has no form {form!r}: use grid_sample, embedding_bag or triton"
    )


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
    return (
        table.pin_memory().to(device, non_blocking=True)
        if device.type == "cuda"
        else table.to(device)
    )


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
        table = _with_border(_float(value), shapes)
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
        gradient = _float(gradient).view(-1, value.shape[3])
        table = _with_border(_float(value), shapes)
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


def _float(x: Tensor) -> Tensor:
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
    x, y = _float(locations).reshape(batch, queries, heads, samples, 2).unbind(-1)
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


def _axis(
    coordinate: Tensor, size: Tensor, kind: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
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
