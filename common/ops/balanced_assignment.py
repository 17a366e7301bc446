"""Assignment of points to k clusters of equal size at least cost, by prices.

A balanced assignment is a min-cost flow. Its dual has one price per cluster, under which every point takes
argmin_j(cost_ij + price_j); such an assignment is optimal for the sizes that it happens to have, so only k prices have
to be found. One round of that is

1. scan: one pass over all costs under the present prices gives the true sizes;
2. model: a subset of the points, those near a border between two clusters and a random part of the others, stands for
   all of them; Newton's method on its smoothed dual, the smoothing lowered step by step, corrects the prices.

A few rounds bring the sizes within a fraction of a percent of n/k. The points that are still in surplus then move along
cheapest paths from cluster to cluster (`Repair`), after which the sizes are exact and the assignment is still optimal,
up to a chosen slack. No step loops over points or clusters; the costs are read two or three times.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

EXACT_BELOW = 4096  # up to this many points the repair looks at all of them
TIGHT = 1e-3  # share of the points that may be in surplus before the repair
ROUNDS = 8


class Costs(Protocol):
    """Costs float32 (n,k) of every point and cluster."""

    n: int
    k: int

    def blocks(self) -> Iterator[tuple[slice, Tensor]]:
        """All rows, by blocks that fit the cache or the memory."""

    def take(self, where: np.ndarray) -> Tensor:
        """The rows `where`, ascending."""


class Matrix:
    """Costs that are in memory."""

    def __init__(self, matrix: Tensor):
        self.matrix, (self.n, self.k) = matrix, matrix.shape

    def blocks(self) -> Iterator[tuple[slice, Tensor]]:
        size = max(1, 2**20 // self.k)  # 4 MiB at a time
        for start in range(0, self.n, size):
            where = slice(start, min(start + size, self.n))
            yield where, self.matrix[where]

    def take(self, where: np.ndarray) -> Tensor:
        return self.matrix[torch.from_numpy(where).to(self.matrix.device)]


class Scan(NamedTuple):
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


def _scan(costs: Costs, prices: Tensor) -> Scan:
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
    return Scan(labels, margin, sizes - costs.n / costs.k, float(dual))


def _quantile(margin: Tensor, share: float) -> float:
    """The margin below which `share` of the points lie, from at most 2¹⁷ of them."""
    sample = margin[:: max(1, len(margin) // 2**17)].cpu().numpy()
    return float(np.partition(sample, (at := int(min(share, 1) * (len(sample) - 1))))[at])


def _model(scan: Scan, size: int, generator: torch.Generator) -> tuple[np.ndarray, Tensor]:
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


def _newton(
    cost: Tensor,
    weights: Tensor,
    target: Tensor,
    prices: Tensor,
    softness: float,
    enough: float,
) -> Tensor:
    """Prices (k,) under which the points of `cost` (m,k), by `weights` (m,), fill the clusters to `target` (k,).

    Maximises the dual of the assignment with its minimum over clusters softened: the gradient is (soft sizes − target),
    the Hessian −(diag(sizes) − PᵀP) / softness. A step much longer than the softness is outside of what that model
    knows, so the softness goes up until the step fits, and then down again until the sizes of the hard assignment are
    right to `enough` points, or have stopped to improve.
    """
    k = cost.shape[1]
    cost = cost - cost.amin(1, keepdim=True)
    if (scale := float(cost.max())) == 0:
        return prices
    softness = max(softness, 1e-5 * scale)
    ridge = torch.eye(k, device=cost.device, dtype=torch.float64) * (
        1e-3 * float(weights.sum()) / k
    )
    best, best_prices, stale, rising = float("inf"), None, 0, True
    for _ in range(60):
        share = torch.softmax((cost + prices) * (-1 / softness), 1)
        weighted = share * weights[:, None]
        sizes = weighted.sum(0)
        step = torch.linalg.solve(
            (torch.diag(sizes) - share.T @ weighted).double() + ridge, (sizes - target).double()
        )
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
        if excess <= enough or stale == 3 or softness < 1e-7 * scale:
            break
        softness *= 0.35
    prices = prices if best_prices is None else best_prices
    return prices - prices.mean()


def equalise(
    costs: Costs, prices: Tensor, limit: float, generator: torch.Generator
) -> tuple[Scan, Tensor]:
    """Prices (k,) that leave at most the share `limit` of the points in surplus, and the scan under them."""
    n, k = costs.n, costs.k
    size = max(8192, 192 * k)
    scan = _scan(costs, prices)
    best, stale = (scan, prices), 0
    for _ in range(ROUNDS):
        if best[0].excess <= max(limit, 0.5 / n) or stale == 2:
            break
        rows, weights = _model(scan, size, generator)
        cost = costs.take(rows)
        sizes = torch.zeros(k, device=cost.device)
        sizes.index_add_(0, scan.labels[torch.from_numpy(rows).to(cost.device)], weights)
        target = (sizes - torch.from_numpy(scan.surplus).to(sizes)).clamp_min(0)
        target *= weights.sum() / target.sum()
        # a part of the points foresees what the change does to all of them only so well
        enough = n * max(limit / 2, scan.excess / 10 if n > size else 0.0)
        prices = _newton(
            cost, weights, target, prices, _quantile(scan.margin, 2 * scan.excess), enough
        )
        scan = _scan(costs, prices)
        # ties cannot be resolved by prices
        stale = 0 if scan.excess < 0.9 * best[0].excess else stale + 1
        if scan.excess < best[0].excess:
            best = scan, prices
    return best


class Repair:
    """Moves points of `cost` (m,k), which contains `prices` (k,), until `labels` (m,) have the sizes that are wanted.

    surplus: what each cluster has above its wanted size, before the move. small: bool (k,), the clusters that are to
    have ⌊n/k⌋ points where others have one more; any cluster can take the role, at the price of its last point.
    In the beginning nobody gains by moving. Successive cheapest paths between clusters (edges: the point that loses
    least by moving, or the role of being small) keep that true, the distances becoming part of the prices: the result
    is a min-cost flow, exact for `slack` 0. A path takes as many points as are wanted and lose at most `slack` by it.
    """

    def __init__(
        self,
        cost: np.ndarray,
        prices: np.ndarray,
        labels: np.ndarray,
        surplus,
        small,
        slack: float,
    ):
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
            amount = min(
                self.surplus[path[0]], -self.surplus[path[-1]], *(most for most, _ in moves)
            )
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
            self.edges[present] = np.minimum.reduceat(
                self.cost[rows] - self.cost[rows, own][:, None], starts
            )

    def _path(self) -> list[int]:
        """The cheapest path from a cluster with surplus to one with a deficit (Bellman-Ford); moves the prices."""
        shift = self.prices - self.start
        points = self.edges + shift - shift[:, None]
        roles = np.where(
            self.small[:, None] & ~self.small, self.prices - self.prices[:, None], np.inf
        )
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
        loss = (
            self.cost[rows, b]
            - self.cost[rows, a]
            + ((self.prices - self.start)[b] - (self.prices - self.start)[a])
        )
        role = (
            self.prices[b] - self.prices[a] if self.small[a] and not self.small[b] else np.inf
        )
        if role < loss.min(initial=np.inf):
            return 1, None
        return max(1, int((loss <= self.slack + self.rounding).sum())), rows[
            loss.argsort(kind="stable")
        ]


def exact_labels(costs: Costs, scan: Scan, prices: Tensor, slack: float = 0.0) -> Tensor:
    """Labels int64 (n,) of exact sizes from a scan that is near them; costs may grow by `slack` in all."""
    n, k = costs.n, costs.k
    labels = scan.labels.cpu().numpy()
    price = prices.cpu().numpy()

    small = np.zeros(k, bool)
    small[price.argsort(kind="stable")[: -n % k]] = True  # least in demand
    largest = -(-n // k)
    sizes = np.bincount(labels, minlength=k)
    surplus = sizes - (largest - small)

    if (surplus > 0).any():
        # a cluster gives first who loses least by it
        quota = n if n <= EXACT_BELOW else 2 * surplus.clip(0) + 512
        order = np.lexsort((scan.margin.cpu().numpy(), labels))
        rank = np.arange(n) - np.repeat(sizes.cumsum() - sizes, sizes)
        quotas = np.broadcast_to(quota, k)
        rows = np.sort(order[rank < quotas[labels[order]]])

        cost = costs.take(rows).cpu().numpy() + price
        slack = slack / int(surplus.clip(0).sum())
        labels[rows] = Repair(cost, price, labels[rows], surplus, small, slack).run()
    return torch.from_numpy(labels).long()
