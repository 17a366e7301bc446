"""Triton kernels of multi-scale deformable attention: one forward, one backward, no intermediate maps.

A program owns ROWS triples (image, query, head) and all D channels, and walks over levels and points. Sums are in
float32 (float64 for float64 values). The backward samples again and adds the gradient of the values atomically: its
order of addition is not fixed. With TRITON_INTERPRET=1 the kernels run on the CPU.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from common.ops.deform_attn_bags import level_constants


@triton.jit
def _corner(base, row, column, height, width, inside, HEADS, CHANNELS, channel, live_channel):
    """Offsets (ROWS, BLOCK) of one corner's channels, and where they exist."""
    exists = inside & (row >= 0) & (row < height) & (column >= 0) & (column < width)
    offset = base + (row * width + column).to(tl.int64) * (HEADS * CHANNELS)
    return offset[:, None] + channel[None, :], exists[:, None] & live_channel[None, :]


@triton.jit
def _sample_position(locations, levels, sample, level, live, LEVELS, ACC: tl.constexpr):
    """Integer corner, fractions, size and first row of a level, and whether the sample touches the map."""
    height = tl.load(levels + level)
    width = tl.load(levels + LEVELS + level)
    first = tl.load(levels + 2 * LEVELS + level)

    place = locations + 2 * sample
    x = tl.load(place, mask=live, other=-2.0).to(ACC) * width - 0.5
    y = tl.load(place + 1, mask=live, other=-2.0).to(ACC) * height - 0.5

    inside = live & (x > -1) & (y > -1)
    inside = inside & (x < width) & (y < height)
    x = tl.where(inside, x, 0.0)
    y = tl.where(inside, y, 0.0)
    left = tl.floor(x)
    top = tl.floor(y)
    return left.to(tl.int32), top.to(tl.int32), x - left, y - top, height, width, first, inside


@triton.jit
def _forward_kernel(
    value, levels, locations, weights, out, rows, positions, queries, HEADS, CHANNELS,
    LEVELS: tl.constexpr, POINTS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    channel = tl.arange(0, BLOCK)
    live, live_channel = row < rows, channel < CHANNELS
    image = (row // HEADS) // queries
    total = tl.zeros([ROWS, BLOCK], dtype=ACC)
    for level in range(LEVELS):
        for point in tl.static_range(POINTS):
            sample = (row * LEVELS + level) * POINTS + point
            left, top, fx, fy, height, width, first, inside = _sample_position(
                locations, levels, sample, level, live, LEVELS, ACC
            )
            weight = tl.load(weights + sample, mask=live, other=0.0).to(ACC)
            base = ((image * positions + first) * HEADS + row % HEADS) * CHANNELS
            for dy in tl.static_range(2):
                for dx in tl.static_range(2):
                    offset, exists = _corner(
                        base,
                        top + dy,
                        left + dx,
                        height,
                        width,
                        inside,
                        HEADS,
                        CHANNELS,
                        channel,
                        live_channel,
                    )
                    share = weight * (fy if dy else 1 - fy) * (fx if dx else 1 - fx)
                    total += share[:, None] * tl.load(
                        value + offset, mask=exists, other=0.0
                    ).to(ACC)
    offset = row[:, None] * CHANNELS + channel[None, :]
    tl.store(
        out + offset, total.to(out.dtype.element_ty), mask=live[:, None] & live_channel[None, :]
    )


@triton.jit
def _backward_kernel(
    gradient, value, levels, locations, weights, grad_value, grad_locations, grad_weights,
    rows, positions, queries, HEADS, CHANNELS,
    LEVELS: tl.constexpr, POINTS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    channel = tl.arange(0, BLOCK)
    live, live_channel = row < rows, channel < CHANNELS
    image = (row // HEADS) // queries
    both = live[:, None] & live_channel[None, :]
    g = tl.load(gradient + row[:, None] * CHANNELS + channel[None, :], mask=both, other=0.0).to(
        ACC
    )
    for level in range(LEVELS):
        for point in tl.static_range(POINTS):
            sample = (row * LEVELS + level) * POINTS + point
            left, top, fx, fy, height, width, first, inside = _sample_position(
                locations, levels, sample, level, live, LEVELS, ACC
            )
            weight = tl.load(weights + sample, mask=live, other=0.0).to(ACC)
            base = ((image * positions + first) * HEADS + row % HEADS) * CHANNELS
            grad_weight = tl.zeros([ROWS], dtype=ACC)
            grad_x = tl.zeros([ROWS], dtype=ACC)
            grad_y = tl.zeros([ROWS], dtype=ACC)
            for dy in tl.static_range(2):
                for dx in tl.static_range(2):
                    offset, exists = _corner(
                        base,
                        top + dy,
                        left + dx,
                        height,
                        width,
                        inside,
                        HEADS,
                        CHANNELS,
                        channel,
                        live_channel,
                    )
                    wy, wx = (fy if dy else 1 - fy), (fx if dx else 1 - fx)
                    dot = tl.sum(
                        g * tl.load(value + offset, mask=exists, other=0.0).to(ACC), axis=1
                    )
                    grad_weight += wy * wx * dot
                    grad_x += (wy if dx else -wy) * dot
                    grad_y += (wx if dy else -wx) * dot
                    tl.atomic_add(
                        grad_value + offset,
                        g * (weight * wy * wx)[:, None],
                        mask=exists,
                        sem="relaxed",
                    )
            kind = grad_locations.dtype.element_ty
            tl.store(
                grad_weights + sample, grad_weight.to(grad_weights.dtype.element_ty), mask=live
            )
            tl.store(grad_locations + 2 * sample, (grad_x * weight * width).to(kind), mask=live)
            tl.store(
                grad_locations + 2 * sample + 1, (grad_y * weight * height).to(kind), mask=live
            )


def launch(
    kernel, tensors: tuple[Tensor, ...], value: Tensor, locations: Tensor, elements: int
) -> None:
    """Start a kernel on tiles of about `elements` numbers, the channels rounded up to a power of two."""
    _, positions, heads, channels = value.shape
    _, queries, _, levels, points = locations.shape[:-1]
    rows = locations.shape[0] * queries * heads
    block = triton.next_power_of_2(channels)
    tile = max(1, elements // block)
    if rows == 0:
        return
    with torch.cuda.device_of(value):  # Triton launches on the current one
        kernel[(triton.cdiv(rows, tile),)](
            *tensors, rows, positions, queries, heads, channels,
            LEVELS=levels, POINTS=points, ROWS=tile, BLOCK=block,
            ACC=tl.float64 if value.dtype == torch.float64 else tl.float32,
        )  # fmt: skip


def forward(
    value: Tensor, shapes: Sequence[tuple[int, int]], locations: Tensor, weights: Tensor
) -> Tensor:
    """(B, Q, M·D); contiguous inputs, shapes as in `ms_deform_attn`."""
    out = value.new_empty(value.shape[0], locations.shape[1], value.shape[2] * value.shape[3])
    levels = level_constants(tuple(shapes), value.device)
    launch(
        _forward_kernel,
        (value, levels, locations, weights, out),
        value,
        locations,
        elements=1024,
    )
    return out


def backward(
    gradient: Tensor,
    value: Tensor,
    shapes: Sequence[tuple[int, int]],
    locations: Tensor,
    weights: Tensor,
):
    """Gradients of value, locations and weights for the gradient (B, Q, M·D) of the output."""
    grad_value = torch.zeros_like(
        value, dtype=torch.float64 if value.dtype == torch.float64 else torch.float32
    )
    grad_locations, grad_weights = torch.empty_like(locations), torch.empty_like(weights)
    levels = level_constants(tuple(shapes), value.device)
    tensors = (
        gradient,
        value,
        levels,
        locations,
        weights,
        grad_value,
        grad_locations,
        grad_weights,
    )
    launch(_backward_kernel, tensors, value, locations, elements=512)
    return grad_value.to(value.dtype), grad_locations, grad_weights
