"""Triton kernels of the loss at label size: one forward, one backward, and the forward of labels without a loss.

All make enlarged logits of some classes (rows of a tile) at some columns of one row of the label (columns of the tile),
use them, and forget them. Sums are in float32. With TRITON_INTERPRET=1 the kernels run on the CPU.

The backward gathers: a program owns a few rows and columns of the logits and a block of classes, walks down the rows of
the label that they contribute to, and writes each gradient once. Nothing is added atomically, so the result is the same
in every run, in the precision of the logits and without a float32 copy of them; what it costs is that a label's row is
visited again where two programs meet, one in STRIP rows and one in `tile_of` columns.
"""

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from common.ops.counter_noise import ROUNDS, Noise
from common.ops.counter_noise_triton import draws
from common.ops.resize import Size, size_of
from common.ops.upsampled_loss import Axis, axis, tile_of

BLOCK = 8  # classes at a time
PIXELS = 128  # columns of the label that a program of the forward works on
STRIP = 8  # rows of the logits that a program of the backward gives the gradient of

# With more registers a thread, a multiprocessor has room for one program of the backward instead of two.
REGISTERS = {} if torch.version.hip else {"maxnreg": 128}

# Parts of the kernels -----------------------------------------------------------------------------------------------


@triton.jit
def place_of(tiles, height, PIXELS: tl.constexpr):
    """Image (int64), row and columns (PIXELS,) of this program, of which each row of each image has `tiles`."""
    program = tl.program_id(0)
    column = (program % tiles) * PIXELS + tl.arange(0, PIXELS)
    line = program // tiles
    return (line // height).to(tl.int64), line % height, column


@triton.jit
def cells_at(line, left, right, across, live, step_x):
    """Logits of a source row at columns of the label: (BLOCK, PIXELS). line: (BLOCK, 1) pointers to its classes."""
    first = tl.load(line + left[None, :] * step_x, mask=live, other=0.0).to(tl.float32)
    second = tl.load(line + right[None, :] * step_x, mask=live, other=0.0).to(tl.float32)
    return (1 - across)[None, :] * first + across[None, :] * second


@triton.jit
def _change(
    z, vector, klass, classes, seed, image, row, quad, scale, shift,
    LAW: tl.constexpr, LIMIT: tl.constexpr, ROUNDS: tl.constexpr, PI: tl.constexpr,
):  # fmt: skip
    """z' of enlarged logits (BLOCK, PIXELS): z itself where nothing changes them."""
    if vector is None:
        return z
    else:
        offset = tl.load(vector + klass, mask=klass < classes, other=0.0).to(tl.float32)[
            :, None
        ]
        if LAW == "":
            return z + offset
        else:
            e = draws(seed, image, row, quad, klass, scale, shift, LAW, LIMIT, ROUNDS, PI)
            return z + offset * e


@triton.jit
def taps_of(low, share, place, inside, cells):
    """The two source cells of pixels along an axis, and the weight of the second."""
    first = tl.load(low + place, mask=inside, other=0)
    return (
        first,
        tl.minimum(first + 1, cells - 1),
        tl.load(share + place, mask=inside, other=0.0),
    )


@triton.jit
def _spread(left, across, cell):
    """How much pixels of a row (PIXELS,) give of their slope to cells (CELLS,): (PIXELS, CELLS)."""
    to_left = tl.where(left[:, None] == cell[None, :], (1 - across)[:, None], 0.0)
    to_right = tl.where(left[:, None] + 1 == cell[None, :], across[:, None], 0.0)
    return to_left + to_right


@triton.jit
def _weight(valid, y, place, class_weight, pixel_weight):
    """ω · w_y of pixels (PIXELS,), 0 where they do not count."""
    weight = valid.to(tl.float32)
    if class_weight is not None:
        weight *= tl.load(class_weight + y, mask=valid, other=0.0).to(tl.float32)
    if pixel_weight is not None:
        weight *= tl.load(pixel_weight + place, mask=valid, other=0.0).to(tl.float32)
    return weight


@triton.jit
def _slope(
    z, klass, classes, place, inside, factor, label, log_sums, class_weight, pixel_weight
):
    """The gradient at z' (BLOCK, PIXELS), times `factor`: softmax less one-hot, weighted."""
    y = tl.load(label + place, mask=inside, other=-1).to(tl.int32)
    valid = inside & (y >= 0) & (y < classes)
    weight = factor * _weight(valid, y, place, class_weight, pixel_weight)
    log_sum = tl.load(log_sums + place, mask=inside, other=0.0)

    row = klass[:, None]
    softmax = tl.exp(z - log_sum[None, :])
    one_hot = (row == y[None, :]).to(tl.float32)
    slope = (softmax - one_hot) * weight[None, :]

    counts = (row < classes) & valid[None, :]
    return tl.where(counts, slope, 0.0)


# The kernels --------------------------------------------------------------------------------------------------------


@triton.jit
def _loss_kernel(
    logits, label, row_low, row_share, column_low, column_share, vector, class_weight, pixel_weight, seed,
    log_sums, sums, classes, h, w, height, width, tiles, step_b, step_k, step_y, step_x, scale, shift,
    LAW: tl.constexpr, LIMIT: tl.constexpr, ROUNDS: tl.constexpr, PI: tl.constexpr,
    BLOCK: tl.constexpr, PIXELS: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    first = (program % tiles) * PIXELS
    row = (program // tiles) % height
    image = (program // tiles) // height
    column = first + tl.arange(0, PIXELS)
    quad = first // 4 + tl.arange(0, PIXELS // 4)
    inside = column < width
    left, right, across = taps_of(column_low, column_share, column, inside, w)
    top, bottom, down = taps_of(row_low, row_share, row, row < height, h)

    place = (image.to(tl.int64) * height + row) * width + column
    y = tl.load(label + place, mask=inside, other=-1).to(tl.int32)
    largest = tl.full([PIXELS], float("-inf"), tl.float32)
    total = tl.zeros([PIXELS], tl.float32)
    own = tl.zeros([PIXELS], tl.float32)

    for start in range(0, classes, BLOCK):
        klass = start + tl.arange(0, BLOCK)
        live = (klass < classes)[:, None] & inside[None, :]
        line = logits + image.to(tl.int64) * step_b + klass[:, None] * step_k
        upper = cells_at(line + top * step_y, left, right, across, live, step_x)
        lower = cells_at(line + bottom * step_y, left, right, across, live, step_x)
        z = (1 - down) * upper + down * lower
        z = _change(
            z, vector, klass, classes, seed, image, row, quad, scale, shift, LAW, LIMIT, ROUNDS, PI
        )  # fmt: skip

        own += tl.sum(tl.where(klass[:, None] == y[None, :], z, 0.0), 0)
        z = tl.where((klass < classes)[:, None], z, float("-inf"))
        now = tl.maximum(largest, tl.max(z, 0))
        total = total * tl.exp(largest - now) + tl.sum(tl.exp(z - now[None, :]), 0)
        largest = now

    log_sum = largest + tl.log(total)
    tl.store(log_sums + place, log_sum, mask=inside)
    valid = inside & (y >= 0) & (y < classes)
    weight = _weight(valid, y, place, class_weight, pixel_weight)
    loss = tl.where(valid, weight * (log_sum - own), 0.0)
    # Past the end of a row −1 was loaded, which is 255 in a label of uint8.
    loss = tl.where(inside & ((y < -1) | (y >= classes)), float("nan"), loss)
    tl.store(sums + program, tl.sum(loss, 0))


@triton.jit
def _gradient_kernel(
    upstream, log_sums, logits, label, row_share, row_start, column_low, column_share, column_start,
    vector, class_weight, pixel_weight, seed, gradient,
    classes, h, w, height, width, tiles, cells, step_b, step_k, step_y, step_x,
    grad_b, grad_k, grad_y, grad_x, scale, shift,
    LAW: tl.constexpr, LIMIT: tl.constexpr, ROUNDS: tl.constexpr, PI: tl.constexpr,
    BLOCK: tl.constexpr, PIXELS: tl.constexpr, CELLS: tl.constexpr, STRIP: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    x0 = (program % tiles) * cells
    y0 = (program // tiles) * STRIP
    klass = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    image = tl.program_id(2)

    # The columns of the label that cells x0 … x0 + cells − 1 contribute to, and how much each to each.
    first = tl.load(column_start + tl.maximum(x0 - 1, 0)) // 4 * 4
    column = first + tl.arange(0, PIXELS)
    quad = first // 4 + tl.arange(0, PIXELS // 4)
    inside = column < tl.load(column_start + tl.minimum(x0 + cells, w))
    left, right, across = taps_of(column_low, column_share, column, inside, w)
    cell = x0 + tl.arange(0, CELLS)
    spread = _spread(left, across, cell)

    live = (klass < classes)[:, None] & inside[None, :]
    line = logits + image.to(tl.int64) * step_b + klass[:, None] * step_k
    out = gradient + image.to(tl.int64) * grad_b + klass[:, None] * grad_k
    out = out + cell[None, :] * grad_x
    owned = (klass < classes)[:, None] & ((cell < x0 + cells) & (cell < w))[None, :]
    factor = tl.load(upstream).to(tl.float32)

    # Rows start … stop − 1 of the label are made of the source rows `above` and `above + 1`.
    above = tl.maximum(y0 - 1, 0)
    start = tl.load(row_start + above)
    lower = cells_at(line + above * step_y, left, right, across, live, step_x)
    from_above = tl.zeros([BLOCK, PIXELS], tl.float32)
    while above < tl.minimum(y0 + STRIP, h):
        below = tl.minimum(above + 1, h - 1)
        upper = lower
        lower = cells_at(line + below * step_y, left, right, across, live, step_x)
        ours = from_above
        from_above = tl.zeros([BLOCK, PIXELS], tl.float32)
        stop = tl.load(row_start + above + 1)
        for row in range(start, stop):
            down = tl.load(row_share + row)
            z = (1 - down) * upper + down * lower
            z = _change(
                z, vector, klass, classes, seed, image, row, quad, scale, shift, LAW, LIMIT, ROUNDS, PI
            )  # fmt: skip
            place = (image.to(tl.int64) * height + row) * width + column
            slope = _slope(
                z, klass, classes, place, inside, factor, label, log_sums, class_weight, pixel_weight
            )  # fmt: skip
            ours += (1 - down) * slope
            from_above += down * slope

        if above >= y0:
            total = tl.dot(ours, spread, input_precision="ieee")
            tl.store(out + above * grad_y, total.to(gradient.dtype.element_ty), mask=owned)
        start = stop
        above += 1


@triton.jit
def _label_kernel(
    logits, row_low, row_share, column_low, column_share, labels, confidences,
    classes, h, w, height, width, tiles, step_b, step_k, step_y, step_x,
    BLOCK: tl.constexpr, PIXELS: tl.constexpr,
):  # fmt: skip
    image, row, column = place_of(tiles, height, PIXELS)
    inside = column < width

    left, right, across = taps_of(column_low, column_share, column, inside, w)
    top, bottom, down = taps_of(row_low, row_share, row, row < height, h)
    largest = tl.full([PIXELS], float("-inf"), tl.float32)
    total = tl.zeros([PIXELS], tl.float32)
    winner = tl.zeros([PIXELS], tl.int32)

    for start in range(0, classes, BLOCK):
        klass = start + tl.arange(0, BLOCK)
        live = (klass < classes)[:, None] & inside[None, :]
        line = logits + image * step_b + klass[:, None] * step_k
        upper = cells_at(line + top * step_y, left, right, across, live, step_x)
        lower = cells_at(line + bottom * step_y, left, right, across, live, step_x)
        z = (1 - down) * upper + down * lower
        z = tl.where((klass < classes)[:, None], z, float("-inf"))

        best, which = tl.max(z, 0, return_indices=True)
        winner = tl.where(best > largest, start + which, winner)
        now = tl.maximum(largest, best)
        total = total * tl.exp(largest - now) + tl.sum(tl.exp(z - now[None, :]), 0)
        largest = now

    place = (image * height + row) * width + column
    tl.store(labels + place, winner.to(tl.int64), mask=inside)
    tl.store(confidences + place, 1 / total, mask=inside)


# Their launch -------------------------------------------------------------------------------------------------------


class Pixels(NamedTuple):
    """What the loss knows beside the logits, contiguous."""

    label: Tensor
    vector: Tensor | None
    class_weight: Tensor | None
    pixel_weight: Tensor | None
    seed: Tensor | None

    @classmethod
    def of(cls, *tensors: Tensor | None) -> "Pixels":
        return cls(*(t if t is None else t.contiguous() for t in tensors))


def _axes(logits: Tensor, size: Size, align_corners: bool) -> tuple[Axis, Axis]:
    rows, columns = (
        axis(cells, pixels, align_corners, logits.device)
        for cells, pixels in zip(size_of(logits), size, strict=True)
    )
    return rows, columns


def forward(
    logits: Tensor, pixels: Pixels, noise: Noise, align_corners: bool
) -> tuple[Tensor, Tensor]:
    """The loss, a float32 scalar, and ln Σ exp z' (B, H, W)."""
    batch, classes, h, w = logits.shape
    height, width = size = size_of(pixels.label)
    rows, columns = _axes(logits, size, align_corners)
    tiles = triton.cdiv(width, PIXELS)
    programs = batch * height * tiles
    log_sums = logits.new_empty(pixels.label.shape, dtype=torch.float32)
    sums = logits.new_empty(programs, dtype=torch.float32)

    if programs > 0:
        with torch.cuda.device_of(logits):  # Triton launches on the current one
            _loss_kernel[(programs,)](
                logits, pixels.label, rows.low, rows.share, columns.low, columns.share, *pixels[1:],
                log_sums, sums, classes, h, w, height, width, tiles, *logits.stride(), noise.scale, noise.shift,
                LAW=noise.law, LIMIT=noise.limit, ROUNDS=ROUNDS, PI=math.pi, BLOCK=BLOCK, PIXELS=PIXELS, num_warps=8,
            )  # fmt: skip

    return sums.sum(), log_sums


def backward(
    gradient: Tensor,
    log_sums: Tensor,
    logits: Tensor,
    pixels: Pixels,
    noise: Noise,
    align_corners: bool,
) -> Tensor:
    """The gradient at the logits, in their precision and memory format, for that of the loss."""
    batch, classes, h, w = logits.shape
    height, width = size = size_of(pixels.label)
    rows, columns = _axes(logits, size, align_corners)
    out = torch.empty_like(logits)
    tile = tile_of(w, width, align_corners)
    if tile is None:
        raise ValueError(f"{w} columns of logits are too few for {width} of the label")
    if out.numel() == 0:
        return out

    wide, cells = tile
    tiles = triton.cdiv(w, cells)
    grid = (tiles * triton.cdiv(h, STRIP), triton.cdiv(classes, BLOCK), batch)
    with torch.cuda.device_of(logits):
        _gradient_kernel[grid](
            gradient, log_sums, logits, pixels.label, rows.share, rows.start, *columns, *pixels[1:], out,
            classes, h, w, height, width, tiles, cells, *logits.stride(), *out.stride(), noise.scale, noise.shift,
            LAW=noise.law, LIMIT=noise.limit, ROUNDS=ROUNDS, PI=math.pi,
            BLOCK=BLOCK, PIXELS=wide, CELLS=max(16, triton.next_power_of_2(cells)), STRIP=STRIP,
            num_warps=min(16, wide // 16), **REGISTERS,
        )  # fmt: skip

    return out


def labels(
    logits: Tensor, size: Size, shown: Size, align_corners: bool
) -> tuple[Tensor, Tensor]:
    """Label int64 and confidence float32 (B, H, W) of the upper left part `shown` of logits enlarged to `size`."""
    batch, classes, h, w = logits.shape
    height, width = shown
    rows, columns = _axes(logits, size, align_corners)
    label = torch.empty(batch, height, width, dtype=torch.int64, device=logits.device)
    confidence = torch.empty_like(label, dtype=torch.float32)
    tiles = triton.cdiv(width, PIXELS)

    if label.numel() > 0:
        with torch.cuda.device_of(logits):
            _label_kernel[(batch * height * tiles,)](
                logits, rows.low, rows.share, columns.low, columns.share, label, confidence,
                classes, h, w, height, width, tiles, *logits.stride(), BLOCK=BLOCK, PIXELS=PIXELS, num_warps=8,
            )  # fmt: skip

    return label, confidence
