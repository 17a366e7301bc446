"""Triton kernel of the labels of a query network; with TRITON_INTERPRET=1 it runs on the CPU.

A program has some columns of one row of the image. For a block of classes it makes the masks of a block of queries
there, mixes them by a matrix product, and keeps the best class so far. Products are split into three of TF32, on tensor
cores, which are as exact as float32 to some 1e-6; devices without them take float32. Masks are made again for every
block of classes: kept for all of them, they would take the registers and the shared memory of a second program.
"""

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from common.ops.resize import Size, size_of
from common.ops.upsampled_loss import Axis, axis
from common.ops.upsampled_loss_triton import cells_at, place_of, taps_of

PIXELS = 32  # columns of the image that a program works on
CLASSES = 64  # at a time
QUERIES = 32  # at a time
LEAST = 16  # classes: of a side of a matrix product


@triton.jit
def _enlarged(
    line, row, column, inside, live, row_low, row_share, column_low, column_share, h, w, step_y, step_x
):  # fmt: skip
    """σ of masks (QUERIES, PIXELS) at columns of one row of the network's input. line: pointers (QUERIES, 1)."""
    left, right, across = taps_of(column_low, column_share, column, inside, w)
    top, bottom, down = taps_of(row_low, row_share, row, row >= 0, h)
    upper = cells_at(line + top * step_y, left, right, across, live, step_x)
    lower = cells_at(line + bottom * step_y, left, right, across, live, step_x)
    return tl.sigmoid((1 - down) * upper + down * lower)


@triton.jit
def _resized(
    line, row, left, right, across, inside, live, row_low, row_share, column_low, column_share, h, w, step_y, step_x
):  # fmt: skip
    """A row of the input at columns of the image, each between two of its own."""
    first = _enlarged(
        line, row, left, inside, live, row_low, row_share, column_low, column_share, h, w, step_y, step_x
    )  # fmt: skip
    second = _enlarged(
        line, row, right, inside, live, row_low, row_share, column_low, column_share, h, w, step_y, step_x
    )  # fmt: skip
    return (1 - across)[None, :] * first + across[None, :] * second


@triton.jit
def _shown(
    line, row, column, inside, live, row_low, row_share, column_low, column_share, h, w, step_y, step_x,
    out_row_low, out_row_share, out_column_low, out_column_share, inner_h, inner_w, TWICE: tl.constexpr,
):  # fmt: skip
    """The same at columns of one row of the image: resized once more where it has another size than the input."""
    if TWICE:
        left, right, across = taps_of(out_column_low, out_column_share, column, inside, inner_w)
        top, bottom, down = taps_of(out_row_low, out_row_share, row, row >= 0, inner_h)
        upper = _resized(
            line, top, left, right, across, inside, live,
            row_low, row_share, column_low, column_share, h, w, step_y, step_x,
        )  # fmt: skip
        lower = _resized(
            line, bottom, left, right, across, inside, live,
            row_low, row_share, column_low, column_share, h, w, step_y, step_x,
        )  # fmt: skip
        return (1 - down) * upper + down * lower
    else:
        return _enlarged(
            line, row, column, inside, live, row_low, row_share, column_low, column_share, h, w, step_y, step_x
        )  # fmt: skip


@triton.jit
def _label_kernel(
    probability, masks, row_low, row_share, column_low, column_share,
    out_row_low, out_row_share, out_column_low, out_column_share, labels, confidences,
    classes, queries, h, w, inner_h, inner_w, height, width, tiles,
    p_b, p_k, p_q, step_b, step_q, step_y, step_x,
    TWICE: tl.constexpr,
    CLASSES: tl.constexpr, QUERIES: tl.constexpr, PIXELS: tl.constexpr, TINY: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    image, row, column = place_of(tiles, height, PIXELS)
    inside = column < width
    largest = tl.full([PIXELS], float("-inf"), tl.float32)
    total = tl.zeros([PIXELS], tl.float32)
    winner = tl.zeros([PIXELS], tl.int32)

    for start in range(0, classes, CLASSES):
        klass = start + tl.arange(0, CLASSES)
        known = (klass < classes)[:, None]
        weights = probability + image * p_b + klass[:, None] * p_k
        scores = tl.zeros([CLASSES, PIXELS], tl.float32)
        for first in range(0, queries, QUERIES):
            query = first + tl.arange(0, QUERIES)
            live = (query < queries)[:, None] & inside[None, :]
            line = masks + image * step_b + query[:, None] * step_q
            shown = _shown(
                line, row, column, inside, live,
                row_low, row_share, column_low, column_share, h, w, step_y, step_x,
                out_row_low, out_row_share, out_column_low, out_column_share, inner_h, inner_w, TWICE,
            )  # fmt: skip
            # 0 for queries past the last, whatever their masks are
            taken = known & (query < queries)[None, :]
            weight = tl.load(weights + query[None, :] * p_q, mask=taken, other=0.0).to(
                tl.float32
            )
            scores = tl.dot(weight, shown, scores, input_precision=PRECISION)

        total += tl.sum(tl.where(known, scores, 0.0), 0)
        best, which = tl.max(tl.where(known, scores, float("-inf")), 0, return_indices=True)
        winner = tl.where(best > largest, start + which, winner)
        largest = tl.maximum(largest, best)

    place = (image * height + row) * width + column
    tl.store(labels + place, winner.to(tl.int64), mask=inside)
    tl.store(confidences + place, largest / tl.maximum(total, TINY), mask=inside)


def _axes(small: Size, large: Size, device: torch.device) -> tuple[Axis, Axis]:
    rows, columns = (
        axis(cells, pixels, False, device) for cells, pixels in zip(small, large, strict=True)
    )
    return rows, columns


@lru_cache
def _precision(device: torch.device) -> str:
    """Of the products: three of TF32 where the tensor cores have it."""
    if torch.version.hip:
        return "ieee"
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
        return "ieee"

    return "tf32x3"


def labels(
    probability: Tensor, masks: Tensor, padded: Size, inner: Size, size: Size
) -> tuple[Tensor, Tensor]:
    """See `query_labels`."""
    batch, classes, queries = probability.shape
    h, w = size_of(masks)
    height, width = size
    rows, columns = _axes((h, w), padded, masks.device)
    out_rows, out_columns = _axes(inner, size, masks.device)

    label = torch.empty(batch, height, width, dtype=torch.int64, device=masks.device)
    confidence = torch.empty_like(label, dtype=torch.float32)
    tiles = triton.cdiv(width, PIXELS)
    block = min(CLASSES, max(LEAST, triton.next_power_of_2(classes)))

    if label.numel() > 0:
        with torch.cuda.device_of(masks):  # Triton launches on the current one
            _label_kernel[(batch * height * tiles,)](
                probability, masks, rows.low, rows.share, columns.low, columns.share,
                out_rows.low, out_rows.share, out_columns.low, out_columns.share, label, confidence,
                classes, queries, h, w, *inner, height, width, tiles, *probability.stride(), *masks.stride(),
                TWICE=tuple(inner) != tuple(size), CLASSES=block, QUERIES=QUERIES, PIXELS=PIXELS,
                TINY=torch.finfo(torch.float32).tiny, PRECISION=_precision(masks.device), num_warps=8, num_stages=1,
            )  # fmt: skip

    return label, confidence
