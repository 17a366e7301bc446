"""K-means whose clusters all have ⌊n/k⌋ or ⌈n/k⌉ points.

The objective is that of balanced clustering ("Balanced Clustering: A Uniform Model and Fast Algorithm", IJCAI 2019,
strict form), with which USRN splits frequent classes: min Σ ‖x_i − μ_a(i)‖² subject to ⌊n/k⌋ ≤ |cluster| ≤ ⌈n/k⌉, by
Lloyd's alternation of assignment and means. The assignment is a network simplex there, prices and a repair here
(`balanced_assignment`); during the alternation it may be a little unbalanced, and what comes out never is.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from common.ops.balanced_assignment import EXACT_BELOW, TIGHT, Matrix, equalise, exact_labels

# share of the points that may be in surplus: this to the power of the iteration, …
GRADUAL = 0.8
LOOSE = 5e-3  # … down to this; up to EXACT_BELOW points every assignment is exact
# up to this many distances a second thread gains little, and loses much on a busy machine
ONE_THREAD = 2**21
SLACK = 1e-4  # relative increase of the objective that the repair may cause by moving points in bulk


class Clusters(NamedTuple):
    """What `balanced_kmeans` found.

    labels: int64 (n,) on the CPU; centres: float32 (k,d), the clusters' means; objective: Σ ‖x_i − μ_a(i)‖²;
    iterations: Lloyd iterations on all points; converged: False if they ended at `max_iter`.
    """

    labels: Tensor
    centres: Tensor
    objective: float
    iterations: int
    converged: bool


class _Rows:
    """Blocks of float32 rows of an array, a memory map or a tensor; `index` selects the rows, in ascending order."""

    def __init__(
        self, data, index: np.ndarray | None, device: torch.device, block: int = 16384
    ):
        self.data, self.index, self.device, self.block = data, index, device, block
        self.n, self.dim = len(data) if index is None else len(index), data.shape[1]

    def get(self, where: slice | np.ndarray) -> Tensor:
        if self.index is not None:
            where = self.index[where]
        if isinstance(self.data, Tensor):
            where = (
                where
                if isinstance(where, slice)
                else torch.from_numpy(where).to(self.data.device)
            )
            return self.data[where].to(self.device, torch.float32)
        return torch.from_numpy(np.array(self.data[where])).to(self.device).float()

    def blocks(self) -> Iterator[tuple[slice, Tensor]]:
        for start in range(0, self.n, self.block):
            where = slice(start, min(start + self.block, self.n))
            yield where, self.get(where)

    def take(self, where: np.ndarray) -> _Rows:
        return _Rows(
            self.data,
            where if self.index is None else self.index[where],
            self.device,
            self.block,
        )

    def resident(self) -> _Rows:
        whole = torch.empty(self.n, self.dim, device=self.device)
        for where, x in self.blocks():
            whole[where] = x
        return _Rows(whole, None, self.device, self.block)


class _Distances:
    """Squared distances (n,k) of rows to centres, up to a constant per row.

    What would need more than `memory` bytes is not kept but computed again in every pass.
    """

    def __init__(self, rows: _Rows, k: int, memory: float):
        self.rows, self.n, self.k = rows, rows.n, k
        keep = self.n * k * 4 <= memory
        self.kept = Matrix(torch.empty(self.n, k, device=rows.device)) if keep else None

    def update(self, centres: Tensor, origin: Tensor) -> None:
        """Take new `centres` (k,d); measuring from `origin` (d,), the points' mean, keeps float32 accurate."""
        self.weight = (-2 * (centres - origin)).T.float().contiguous()
        self.bias = (centres.square().sum(1) - origin.square().sum()).float()
        if self.kept is not None:
            for where, x in self.rows.blocks():
                torch.addmm(self.bias, x, self.weight, out=self.kept.matrix[where])

    def blocks(self) -> Iterator[tuple[slice, Tensor]]:
        return self._computed(self.rows) if self.kept is None else self.kept.blocks()

    def take(self, where: np.ndarray) -> Tensor:
        if self.kept is not None:
            return self.kept.take(where)
        return torch.cat([block for _, block in self._computed(self.rows.take(where))])

    def _computed(self, rows: _Rows) -> Iterator[tuple[slice, Tensor]]:
        for where, x in rows.blocks():
            yield where, torch.addmm(self.bias, x, self.weight)


def _means(rows: _Rows, labels: Tensor, centres: Tensor) -> tuple[Tensor, np.ndarray]:
    """Means float64 (k,d) and sizes (k,) of the clusters; an empty one keeps its centre."""
    sums = torch.zeros_like(centres)
    for where, x in rows.blocks():
        cluster = labels[where].to(x.device)
        part = torch.zeros(centres.shape, device=x.device)
        sums += part.index_add_(0, cluster, x)

    sizes = torch.bincount(labels, minlength=len(centres)).to(sums.device)
    column = sizes[:, None]
    means = sums / column.clamp_min(1)
    return torch.where(column > 0, means, centres), sizes


def _moments(rows: _Rows) -> tuple[Tensor, float]:
    """Mean float64 (d,) of all points and Σ ‖x − mean‖²."""
    mean = torch.zeros(rows.dim, dtype=torch.float64, device=rows.device)
    for _, x in rows.blocks():
        mean += x.sum(0, dtype=torch.float64) / rows.n
    return mean, sum(
        float((x - mean.float()).square_().sum(dtype=torch.float64)) for _, x in rows.blocks()
    )


def _lloyd(
    rows: _Rows,
    centres: Tensor,
    prices: Tensor,
    *,
    max_iter: int,
    tol: float,
    memory: float,
    generator: torch.Generator,
    gradual: bool = True,
    final: bool = True,
) -> tuple[Clusters, Tensor]:
    """Lloyd's alternation from `centres` (k,d) and `prices` (k,), and the prices at its end.

    gradual: the sizes become equal over the first iterations, which finds better optima than equal sizes from the
    start; final: they are exact at the end.
    """
    n, k = rows.n, len(centres)
    costs = _Distances(rows, k, memory)
    origin, spread = _moments(rows)
    if not np.isfinite(spread):
        raise ValueError("balanced k-means: the features contain NaN or infinity")
    small = n <= EXACT_BELOW
    lower, iterations, converged, exact = float("inf"), 0, False, False
    while not (converged or iterations == max_iter) or (final and not exact):
        last = converged or iterations == max_iter
        costs.update(centres, origin)
        limit = LOOSE if small or not gradual else max(LOOSE, GRADUAL**iterations)
        scan, prices = equalise(costs, prices, TIGHT if last else limit, generator)
        exact = last or small or scan.excess > 2 * limit
        # unlike the cost, hardly changed by a size that is not quite n/k
        previous, lower = (
            lower,
            spread + scan.dual,
        )
        converged = converged or (
            iterations > 0 and limit == LOOSE and previous - lower <= tol * previous
        )
        iterations += not last
        labels = exact_labels(costs, scan, prices, SLACK * lower) if exact else scan.labels
        centres, sizes = _means(rows, labels, centres)
    objective = spread - float((sizes * (centres - origin).square().sum(1)).sum())
    return Clusters(
        labels.long().cpu(), centres.float().cpu(), max(objective, 0.0), iterations, converged
    ), prices


@contextmanager
def _threads(distances: int) -> Iterator[None]:
    """One CPU thread for small problems; the caller's number again afterwards."""
    before = torch.get_num_threads()
    if distances <= ONE_THREAD:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def balanced_kmeans(
    data: np.ndarray | Tensor,
    k: int,
    *,
    rows: np.ndarray | None = None,
    centres: np.ndarray | Tensor | None = None,
    seed: int = 0,
    max_iter: int = 100,
    tol: float = 1e-4,
    sample: int = 2**18,
    device: torch.device | str | None = None,
    memory: float = 2.5e9,
) -> Clusters:
    """Cluster the rows of `data` (N,d) into k groups of ⌊n/k⌋..⌈n/k⌉ rows each.

    data: float array, memory map (read forwards, by blocks) or tensor; rows: ascending row numbers (n,), default all;
    centres: initial ones (k,d), default k distinct random rows (Forgy). More than twice `sample` rows are preceded by
    the same iterations on a random `sample` of them. Lloyd's alternation ends when an iteration lowers the objective by
    less than the share `tol`, or after `max_iter`; the sizes are exact in either case. k is lowered to n if n < k.
    `memory` (bytes) bounds what is kept of the data and distances; beyond it they are read and computed again in every
    pass. The result depends on `seed`, and on CUDA on the order of additions unless torch's deterministic mode is on.
    """
    if device is None:
        device = data.device if isinstance(data, Tensor) else "cpu"
    points = _Rows(data, None if rows is None else np.asarray(rows), torch.device(device))
    if k < 1 or points.n < 1:
        raise ValueError(
            f"balanced k-means needs k ≥ 1 and at least one row, not k = {k}, n = {points.n}"
        )
    k, generator = min(k, points.n), torch.Generator().manual_seed(seed)
    if 4 * points.n * points.dim <= memory / 2:
        points = points.resident()
        memory -= 4 * points.n * points.dim
    if centres is None:
        centres = points.get(
            torch.randperm(points.n, generator=generator)[:k].sort().values.numpy()
        )
    centres = torch.as_tensor(
        np.asarray(centres.cpu() if isinstance(centres, Tensor) else centres)
    ).to(points.device)
    if centres.shape != (k, points.dim):
        raise ValueError(
            f"initial centres have shape {tuple(centres.shape)}, expected {(k, points.dim)}"
        )
    centres, prices = centres.double(), torch.zeros(k, device=points.device)
    settings = {"max_iter": max_iter, "tol": tol, "memory": memory, "generator": generator}
    if points.n <= 2 * sample:
        with _threads(points.n * k):
            return _lloyd(points, centres, prices, **settings)[0]
    chosen = np.sort(
        torch.randperm(points.n, generator=generator)[: max(sample, 256 * k)].numpy()
    )
    first, prices = _lloyd(
        points.take(chosen).resident(), centres, prices, **settings, final=False
    )
    return _lloyd(
        points, first.centres.to(points.device).double(), prices, **settings, gradual=False
    )[0]
