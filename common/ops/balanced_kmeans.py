"""K-means whose clusters all have ⌊n/k⌋ or ⌈n/k⌉ points.

The objective is that of balanced clustering ("Balanced Clustering: A Uniform Model and Fast Algorithm", IJCAI 2019,
strict form), with which USRN splits frequent classes: min Σ ‖x_i − μ_a(i)‖² subject to ⌊n/k⌋ ≤ |cluster| ≤ ⌈n/k⌉, by
Lloyd's alternation of assignment and means. There the assignment is a network simplex. Here it is the dual of that
min-cost flow: one price per cluster, and every point takes argmin_j(d²_ij + price_j). Such an assignment is optimal
for the sizes that it happens to have, so only k prices have to be found. One round of that is

1. scan: one pass over all distances under the present prices gives the true sizes;
2. model: a subset of the points, those near a border between two clusters and a random part of the others, stands for
   all of them; Newton's method on its smoothed dual, the smoothing lowered step by step, corrects the prices.

A few rounds bring the sizes within a fraction of a percent of n/k. The points that are still in surplus then move along
cheapest paths from cluster to cluster (`_Repair`), after which the sizes are exact and, for these sizes, the assignment
still optimal up to a chosen slack. Measured per point and iteration this is two or three passes over the distances.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

EXACT_BELOW = 4096  # up to this many points every assignment step gets exact sizes, not only the last one
LOOSE = 5e-3  # share of the points that may be in surplus while Lloyd's iterations go on, …
TIGHT = 1e-3  # … and before the final repair
ROUNDS = 8  # scans for one assignment step; exact ties cannot be resolved by prices and are left to the repair
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

    def __init__(self, data, index: np.ndarray | None, device: torch.device, block: int = 16384):
        self.data, self.index, self.device, self.block = data, index, device, block
        self.n, self.dim = len(data) if index is None else len(index), data.shape[1]

    def get(self, where: slice | np.ndarray) -> Tensor:
        if self.index is not None:
            where = self.index[where]
        if isinstance(self.data, Tensor):
            where = where if isinstance(where, slice) else torch.from_numpy(where).to(self.data.device)
            return self.data[where].to(self.device, torch.float32)
        return torch.from_numpy(np.array(self.data[where])).to(self.device).float()

    def blocks(self) -> Iterator[tuple[slice, Tensor]]:
        for start in range(0, self.n, self.block):
            where = slice(start, min(start + self.block, self.n))
            yield where, self.get(where)

    def take(self, where: np.ndarray) -> _Rows:
        return _Rows(self.data, where if self.index is None else self.index[where], self.device, self.block)

    def resident(self) -> _Rows:
        whole = torch.empty(self.n, self.dim, device=self.device)
        for where, x in self.blocks():
            whole[where] = x
        return _Rows(whole, None, self.device, self.block)


class _Costs:
    """Assignment costs (n,k): a given matrix, or squared distances up to a constant per row.

    Distances of more than `memory` bytes are not kept but computed again in every pass.
    """

    def __init__(self, n: int, k: int, matrix: Tensor | None = None, rows: _Rows | None = None, memory: float = 0):
        self.n, self.k, self.matrix, self.rows = n, k, matrix, rows
        if matrix is None and n * k * 4 <= memory:
            self.matrix = torch.empty(n, k, device=rows.device)

    def update(self, centres: Tensor, origin: Tensor) -> None:
        """Take new `centres` (k,d); measuring from `origin` (d,), the points' mean, keeps float32 accurate."""
        self.weight = (-2 * (centres - origin)).T.float().contiguous()
        self.bias = (centres.square().sum(1) - origin.square().sum()).float()
        if self.matrix is not None:
            for where, x in self.rows.blocks():
                torch.addmm(self.bias, x, self.weight, out=self.matrix[where])

    def blocks(self) -> Iterator[tuple[slice, Tensor]]:
        if self.matrix is None:
            for where, x in self.rows.blocks():
                yield where, torch.addmm(self.bias, x, self.weight)
            return
        size = max(1, 2**20 // self.k)  # 4 MiB of costs at a time stay in the cache
        for start in range(0, self.n, size):
            where = slice(start, min(start + size, self.n))
            yield where, self.matrix[where]

    def take(self, where: np.ndarray) -> Tensor:
        if self.matrix is not None:
            return self.matrix[torch.from_numpy(where).to(self.matrix.device)]
        return torch.cat([torch.addmm(self.bias, x, self.weight) for _, x in self.rows.take(where).blocks()])


class _Scan(NamedTuple):
    """Cheapest cluster int32 (n,), what the second cheapest costs more float32 (n,), the clusters' size − n/k (k,), and
    the dual value Σ_i min_j (cost_ij + price_j) − n/k Σ_j price_j, below the cost of any balanced assignment."""

    labels: Tensor
    margin: Tensor
    surplus: np.ndarray
    dual: float

    @property
    def excess(self) -> float:
        """Share of the points that are too many in their cluster."""
        return float(self.surplus.clip(0).sum()) / len(self.labels)


def _scan(costs: _Costs, prices: Tensor) -> _Scan:
    """One pass over all costs under `prices` (k,)."""
    labels = torch.empty(costs.n, dtype=torch.int32, device=prices.device)
    margin = torch.empty(costs.n, device=prices.device)
    dual = -costs.n * prices.double().mean()
    for where, block in costs.blocks():
        total = block + prices
        low, best = total.min(1)
        dual += low.sum(dtype=torch.float64)
        labels[where] = best
        total.scatter_(1, best[:, None], torch.inf)
        torch.sub(total.amin(1), low, out=margin[where])
    sizes = torch.bincount(labels, minlength=costs.k).cpu().numpy()
    return _Scan(labels, margin, sizes - costs.n / costs.k, float(dual))


def _quantile(margin: Tensor, share: float) -> float:
    """The margin below which `share` of the points lie, from at most 2¹⁷ of them."""
    sample = margin[:: max(1, len(margin) // 2**17)].cpu().numpy()
    return float(np.partition(sample, (at := int(min(share, 1) * (len(sample) - 1))))[at])


def _model(scan: _Scan, size: int, generator: torch.Generator) -> tuple[np.ndarray, Tensor]:
    """Rows (ascending) and weights (m,) that stand for all points: half at the borders, half a random part."""
    n = len(scan.margin)
    if n <= size:
        return np.arange(n), torch.ones(n, device=scan.margin.device)
    margin = scan.margin.cpu().numpy()
    near = np.flatnonzero(margin <= _quantile(scan.margin, size / 2 / n))
    near = near[:: -(-len(near) // size)]  # exact ties can make it long
    chosen = np.zeros(n, bool)
    chosen[torch.randint(n, (size // 2,), generator=generator).numpy()] = True
    chosen[near] = False
    rest = np.flatnonzero(chosen)
    rows = np.concatenate([near, rest])
    weights = np.repeat([1.0, (n - len(near)) / max(len(rest), 1)], [len(near), len(rest)])
    order = rows.argsort()
    return rows[order], torch.from_numpy(weights[order]).float().to(scan.margin.device)


def _newton(cost: Tensor, weights: Tensor, target: Tensor, prices: Tensor, softness: float, enough: float) -> Tensor:
    """Prices (k,) under which the points of `cost` (m,k), by `weights` (m,), fill the clusters to `target` (k,).

    Maximises the dual of the assignment with its minimum over clusters softened: the gradient is (soft sizes − target),
    the Hessian −(diag(sizes) − PᵀP) / softness. A step much longer than the softness is outside of what that model
    knows, so the softness goes up until the step fits, and then down again until the sizes of the hard assignment are
    right to `enough` points, or have stopped to improve.
    """
    k = cost.shape[1]
    cost = cost - cost.amin(1, keepdim=True)
    ridge = torch.eye(k, device=cost.device, dtype=torch.float64) * (1e-3 * float(weights.sum()) / k)
    best, best_prices, stale, rising = float("inf"), None, 0, True
    for _ in range(60):
        share = torch.softmax((cost + prices) * (-1 / softness), 1)
        weighted = share * weights[:, None]
        sizes = weighted.sum(0)
        step = torch.linalg.solve((torch.diag(sizes) - share.T @ weighted).double() + ridge, (sizes - target).double())
        step -= step.mean()
        length = float(step.max() - step.min())
        if rising and length > 16:
            softness *= 3
            continue
        rising = False
        prices = prices + (step.clamp(-3, 3) * softness).float()
        if length > 6:
            continue
        hard = torch.zeros_like(target).index_add_(0, (cost + prices).argmin(1), weights)
        excess = float((hard - target).clamp_min(0).sum())
        stale = 0 if excess < 0.8 * best else stale + 1
        if excess < best:
            best, best_prices = excess, prices
        if excess <= enough or stale == 3:
            break
        softness *= 0.35
    prices = prices if best_prices is None else best_prices
    return prices - prices.mean()


def _equalise(costs: _Costs, prices: Tensor, limit: float, generator: torch.Generator) -> tuple[_Scan, Tensor]:
    """Prices (k,) that leave at most the share `limit` of the points in surplus, and the scan under them."""
    n, k = costs.n, costs.k
    size = max(8192, 192 * k)
    scan = _scan(costs, prices)
    best = scan, prices
    for _ in range(ROUNDS):
        if best[0].excess <= max(limit, 0.5 / n):
            break
        rows, weights = _model(scan, size, generator)
        cost = costs.take(rows)
        sizes = torch.zeros(k, device=cost.device)
        sizes.index_add_(0, scan.labels[torch.from_numpy(rows).to(cost.device)], weights)
        target = (sizes - torch.from_numpy(scan.surplus).to(sizes)).clamp_min(0)
        target *= weights.sum() / target.sum()
        softness = _quantile(scan.margin, 2 * scan.excess)
        softness = softness if softness > 0 else float(cost.std()) + 1e-30
        # a part of the points foresees what the change does to all of them only so well
        enough = n * max(limit / 2, scan.excess / 10 if n > size else 0.0)
        prices = _newton(cost, weights, target, prices, softness, enough)
        scan = _scan(costs, prices)
        if scan.excess < best[0].excess:
            best = scan, prices
    return best


class _Repair:
    """Moves points of `cost` (m,k), which contains `prices` (k,), until `labels` (m,) have the sizes that are wanted.

    surplus: what each cluster has above its wanted size, before the move. small: bool (k,), the clusters that are to
    have ⌊n/k⌋ points where others have one more; any cluster can take the role, at the price of its last point.
    In the beginning nobody gains by moving. Successive cheapest paths between clusters (edges: the point that loses
    least by moving, or the role of being small) keep that true, the distances becoming part of the prices: the result
    is a min-cost flow, exact for `slack` 0. A path takes as many points as are wanted and lose at most `slack` by it.
    """

    def __init__(self, cost: np.ndarray, prices: np.ndarray, labels: np.ndarray, surplus, small, slack: float):
        self.cost, self.labels, self.slack = cost, labels.copy(), slack
        self.surplus, self.small = surplus.copy(), small.copy()
        self.start, self.prices = prices.astype(np.float64), prices.astype(np.float64)
        self.edges = np.empty((len(prices), len(prices)))
        self.rounding = 1e-6 * float(np.abs(cost).max(initial=0))

    def run(self) -> np.ndarray:
        self._measure(np.arange(len(self.small)))
        while (self.surplus > 0).any():
            path = self._path()
            moves = [self._move(a, b) for a, b in zip(path[:-1], path[1:], strict=True)]
            amount = min(self.surplus[path[0]], -self.surplus[path[-1]], *(most for most, _ in moves))
            for (_, rows), a, b in zip(moves, path[:-1], path[1:], strict=True):
                if rows is None:
                    self.small[a], self.small[b] = False, True
                else:
                    self.labels[rows[:amount]] = b
            self.surplus[path[0]] -= amount
            self.surplus[path[-1]] += amount
            self._measure(np.asarray(path))
        return self.labels

    def _measure(self, clusters: np.ndarray) -> None:
        """edges[j,l] = what it costs at least, at the first prices, to move a point of j to l, for `clusters` j."""
        self.edges[clusters] = np.inf
        rows = np.flatnonzero(np.isin(self.labels, clusters))
        rows = rows[self.labels[rows].argsort(kind="stable")]
        if len(rows):
            own = self.labels[rows]
            present, starts = np.unique(own, return_index=True)
            self.edges[present] = np.minimum.reduceat(self.cost[rows] - self.cost[rows, own][:, None], starts)

    def _path(self) -> list[int]:
        """The cheapest path from a cluster with surplus to one with a deficit (Bellman-Ford); moves the prices."""
        shift = self.prices - self.start
        points = self.edges + shift - shift[:, None]
        roles = np.where(self.small[:, None] & ~self.small, self.prices - self.prices[:, None], np.inf)
        edges = np.maximum(np.minimum(points, roles), 0)
        distance = np.where(self.surplus > 0, 0.0, np.inf)
        before = np.full(len(distance), -1)
        while True:
            through = distance[:, None] + edges
            shorter = (nearest := through.min(0)) < distance
            if not shorter.any():
                break
            before[shorter] = through.argmin(0)[shorter]
            distance = np.minimum(distance, nearest)
        path = [int(np.where(self.surplus < 0, distance, np.inf).argmin())]
        self.prices = self.prices - np.minimum(distance, distance[path[0]])
        while self.surplus[path[-1]] <= 0:
            path.append(int(before[path[-1]]))
        return path[::-1]

    def _move(self, a: int, b: int) -> tuple[int, np.ndarray | None]:
        """How much may go from a to b now, and the points, best first; None: the role goes."""
        rows = np.flatnonzero(self.labels == a)
        loss = self.cost[rows, b] - self.cost[rows, a] + ((self.prices - self.start)[b] - (self.prices - self.start)[a])
        role = self.prices[b] - self.prices[a] if self.small[a] and not self.small[b] else np.inf
        if role < loss.min(initial=np.inf):
            return 1, None
        return max(1, int((loss <= self.slack + self.rounding).sum())), rows[loss.argsort(kind="stable")]


def _exact(costs: _Costs, scan: _Scan, prices: Tensor, slack: float) -> Tensor:
    """Labels int64 (n,) of exact sizes."""
    n, k = costs.n, costs.k
    labels, price = scan.labels.cpu().numpy(), prices.cpu().numpy()
    small = np.zeros(k, bool)
    small[price.argsort(kind="stable")[: -n % k]] = True  # least in demand
    sizes = np.bincount(labels, minlength=k)
    surplus = sizes - (-(-n // k) - small)
    if (surplus > 0).any():
        quota = n if n <= EXACT_BELOW else 2 * surplus.clip(0) + 512  # a cluster gives first who loses least by it
        order = np.lexsort((scan.margin.cpu().numpy(), labels))
        rank = np.arange(n) - np.repeat(sizes.cumsum() - sizes, sizes)
        rows = np.sort(order[rank < np.broadcast_to(quota, k)[labels[order]]])
        cost = costs.take(rows).cpu().numpy() + price
        slack = slack / int(surplus.clip(0).sum())
        labels[rows] = _Repair(cost, price, labels[rows], surplus, small, slack).run()
    return torch.from_numpy(labels).long()


def _means(rows: _Rows, labels: Tensor, centres: Tensor) -> tuple[Tensor, np.ndarray]:
    """Means float64 (k,d) and sizes (k,) of the clusters; an empty one keeps its centre."""
    sums = torch.zeros_like(centres)
    for where, x in rows.blocks():
        part = torch.zeros(centres.shape, device=x.device)
        sums += part.index_add_(0, labels[where].to(x.device), x)
    sizes = torch.bincount(labels, minlength=len(centres)).to(sums.device)
    return torch.where(sizes[:, None] > 0, sums / sizes.clamp_min(1)[:, None], centres), sizes


def _moments(rows: _Rows) -> tuple[Tensor, float]:
    """Mean float64 (d,) of all points and Σ ‖x − mean‖²."""
    mean = torch.zeros(rows.dim, dtype=torch.float64, device=rows.device)
    for _, x in rows.blocks():
        mean += x.sum(0, dtype=torch.float64) / rows.n
    return mean, sum(float((x - mean.float()).square_().sum(dtype=torch.float64)) for _, x in rows.blocks())


def _lloyd(rows, centres, prices, max_iter, tol, memory, generator, final: bool) -> tuple[Clusters, Tensor]:
    """Lloyd's alternation from `centres` (k,d) and `prices` (k,); exact sizes at its end only if `final`."""
    n, k = rows.n, len(centres)
    costs = _Costs(n, k, rows=rows, memory=memory)
    origin, spread = _moments(rows)
    lower, iterations, converged, exact = float("inf"), 0, False, False
    while not (converged or iterations == max_iter) or (final and not exact):
        last = converged or iterations == max_iter
        costs.update(centres, origin)
        scan, prices = _equalise(costs, prices, TIGHT if last else LOOSE, generator)
        exact = last or n <= EXACT_BELOW or scan.excess > 2 * LOOSE
        previous, lower = lower, spread + scan.dual  # unlike the cost, hardly changed by a size that is not quite n/k
        converged = converged or (iterations > 0 and previous - lower <= tol * previous)
        iterations += not last
        labels = _exact(costs, scan, prices, SLACK * lower) if exact else scan.labels
        centres, sizes = _means(rows, labels, centres)
    objective = spread - float((sizes * (centres - origin).square().sum(1)).sum())
    return Clusters(labels.long().cpu(), centres.float().cpu(), max(objective, 0.0), iterations, converged), prices


def balanced_assign(cost: Tensor, *, seed: int = 0) -> Tensor:
    """Assignment int64 (n,) of the points of `cost` (n,k) to k clusters of ⌊n/k⌋..⌈n/k⌉ points, of (nearly) least cost.

    Up to `EXACT_BELOW` points it is exact up to rounding; above, the final repair looks only at the points that are
    nearest to a border.
    """
    n, k = cost.shape
    if k < 2:
        return torch.zeros(n, dtype=torch.long)
    costs = _Costs(n, k, matrix=cost.float())
    generator = torch.Generator().manual_seed(seed)
    scan, prices = _equalise(costs, torch.zeros(k, device=cost.device), TIGHT, generator)
    return _exact(costs, scan, prices, 0.0)


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
    centres: initial ones (k,d), default k distinct random rows (Forgy). More than `sample` rows are preceded by the
    same iterations on a random `sample` of them. Lloyd's alternation ends when an iteration lowers the objective by
    less than the share `tol`, or after `max_iter`; the sizes are exact in either case. k is lowered to n if n < k.
    `memory` (bytes) bounds what is kept of the data and distances; beyond it they are read and computed again in every
    pass. The result depends on `seed`, and on CUDA on the order of additions unless torch's deterministic mode is on.
    """
    if device is None:
        device = data.device if isinstance(data, Tensor) else "cpu"
    points = _Rows(data, None if rows is None else np.asarray(rows), torch.device(device))
    if k < 1 or points.n < 1:
        raise ValueError(f"balanced k-means needs k ≥ 1 and at least one row, not k = {k}, n = {points.n}")
    k, generator = min(k, points.n), torch.Generator().manual_seed(seed)
    if 4 * points.n * points.dim <= memory / 2:
        points = points.resident()
        memory -= 4 * points.n * points.dim
    if centres is None:
        centres = points.get(torch.randperm(points.n, generator=generator)[:k].sort().values.numpy())
    centres = torch.as_tensor(np.asarray(centres.cpu() if isinstance(centres, Tensor) else centres)).to(points.device)
    if centres.shape != (k, points.dim):
        raise ValueError(f"initial centres have shape {tuple(centres.shape)}, expected {(k, points.dim)}")
    centres, prices = centres.double(), torch.zeros(k, device=points.device)
    if points.n > 2 * sample:
        chosen = np.sort(torch.randperm(points.n, generator=generator)[: max(sample, 256 * k)].numpy())
        part = points.take(chosen).resident()
        first, prices = _lloyd(part, centres, prices, max_iter, tol, memory, generator, final=False)
        centres = first.centres.to(points.device).double()
    return _lloyd(points, centres, prices, max_iter, tol, memory, generator, final=True)[0]
