"""Scalar products of resampled features, for which the features themselves need not be resampled.

A resampled feature mixes a few cells of its map, ẑ = Σ_ij r_i c_j z_ij with r a row of R and c a row of C (see
`resize_chain`). Its products are mixtures, too:

    ẑ·v  = Σ_ij r_i c_j (z_ij·v)                              K maps of products are resampled in place of D of features
    ‖ẑ‖² = Σ_ij Σ_i'j' r_i r_i' c_j c_j' (z_ij·z_i'j')          only cells close to one another meet

Taking the pairs by their offset (Δy, Δx), the second is a sum of resampled maps as well: of the products of each cell
with its neighbour at that offset, by matrices of the entries r_i r_{i+Δy} and c_j c_{j+Δx}.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from common.ops.resize_chain import exactly, seen_part

# that are multiplied at a time: what stands in between stays in the cache; on CUDA all, so that fewer kernels start: it
# is as large as the map of one image
CHANNELS = {"cpu": 64, "cuda": 1 << 16}


def resampled_products(
    maps: Tensor, vectors: Tensor, rows: Tensor, columns: Tensor, reach: int
) -> tuple[Tensor, Tensor]:
    """Products with vectors, and squared norms, of the features ẑ = rows · map · columnsᵀ.

    maps: (B, D, h, w); vectors: (K, D); rows: (B, H, h); columns: (B, W, w); reach: how far apart two cells can be
    that a row of the matrices mixes. Returns float32 (B, K, H, W) and (B, H, W); a squared norm may lie below 0 by a
    rounding. Gradients flow to the maps and the vectors, once.
    """
    with exactly(maps):
        dots = []
        squares = []

        for sides in zip(maps, rows, columns, strict=True):
            image, r, c = seen_part(*sides)
            image = image.to(r.dtype).contiguous()
            dots.append(r @ (torch.einsum("dhw,kd->khw", image, vectors) @ c.T))
            squares.append(_square_norm(image, r, c, reach))

        return torch.stack(dots), torch.stack(squares)


def _square_norm(image: Tensor, rows: Tensor, columns: Tensor, reach: int) -> Tensor:
    """‖ẑ‖² (H, W) of one image (D, h, w)."""
    pairs = NeighbourProducts.apply(image, reach)  # (Δy, h, Δx, w)
    # (Δy, h, W)
    lines = pairs.flatten(2) @ _products(columns, range(-reach, reach + 1)).flatten(1).T
    return _products(rows, range(reach + 1)).flatten(1) @ lines.flatten(0, 1)


def _products(matrix: Tensor, offsets: range) -> Tensor:
    """matrix[:, i] · matrix[:, i + offset], 0 beyond the edge: (n, m) → (n, offsets, m)."""
    reach = offsets[-1]
    cells = matrix.shape[1]
    padded = F.pad(matrix, (reach, reach))
    return torch.stack([matrix * padded[:, reach + o : reach + o + cells] for o in offsets], 1)


def _at_once(maps: Tensor) -> int:
    return CHANNELS.get(maps.device.type, CHANNELS["cuda"])


class NeighbourProducts(torch.autograd.Function):
    """Products of each cell of a map (D, h, w) with its neighbours: (reach + 1, h, 2·reach + 1, w).

    Entry [Δy, i, reach + Δx, j] is z_ij·z_{i+Δy, j+Δx}, twice that but for Δy = Δx = 0, since a pair counts in both
    orders; so those with Δy = 0, Δx < 0 are left 0, as are those whose neighbour lies outside.
    """

    @staticmethod
    def forward(ctx: Any, maps: Tensor, reach: int) -> Tensor:
        ctx.save_for_backward(maps)
        ctx.reach = reach
        _, h, w = maps.shape
        out = maps.new_zeros(reach + 1, h, 2 * reach + 1, w)

        for part in maps.split(_at_once(maps)):
            for pair in _pairs(h, w, reach):
                out[pair.entry].add_(
                    (part[pair.here] * part[pair.there]).sum(0), alpha=pair.times
                )

        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (maps,) = ctx.saved_tensors
        out = torch.zeros_like(maps)

        count = _at_once(maps)
        for part, result in zip(maps.split(count), out.split(count), strict=True):
            for pair in _pairs(*maps.shape[1:], ctx.reach):
                weight = gradient[pair.entry]
                result[pair.here].addcmul_(part[pair.there], weight, value=pair.times)
                result[pair.there].addcmul_(part[pair.here], weight, value=pair.times)

        return out, None


class _Pair(NamedTuple):
    """Where the products of one offset stand, the cells that have a neighbour there, and these neighbours."""

    entry: tuple[int | slice, ...]
    here: tuple[slice, ...]
    there: tuple[slice, ...]
    times: int


def _pairs(h: int, w: int, reach: int) -> Iterator[_Pair]:
    for dy in range(min(reach, h - 1) + 1):
        for dx in range(-reach if dy else 0, reach + 1):
            rows = slice(0, h - dy)
            rows_there = slice(dy, h)

            right = max(0, dx)
            left = max(0, -dx)
            columns = slice(left, max(0, w - right))
            columns_there = slice(right, max(0, w - left))

            entry = (dy, rows, reach + dx, columns)
            here = (slice(None), rows, columns)
            there = (slice(None), rows_there, columns_there)
            itself = dy == 0 and dx == 0
            yield _Pair(entry, here, there, 1 if itself else 2)
