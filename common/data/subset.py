"""Long-tailed subsets of a data set, made by taking images away one at a time.

The LTSS benchmark (TMM 2024) samples COCO-Stuff-LT and MHP-v2-LT greedily: images are removed so that the Gini
coefficient of the class weights rises at every step. Its lists are not public, nor is the stopping rule. Here a step
removes the image that leaves the largest coefficient; where both a number of images and a coefficient are asked for,
the one that leaves the coefficient nearest to a straight line between start and goal. No class loses its last image,
and the coefficient never falls.
"""

from dataclasses import dataclass

import numpy as np
from scipy import sparse

from common.data.imbalance import gini
from common.data.statistics import Level, Statistics

SHORTLIST = 64
TOLERANCE = 0.01  # of the coefficient, where the number of images is given too


@dataclass(frozen=True)
class Subset:
    """kept: indices of the images that remain, ascending; removed: the others in the order of their removal.
    path: the Gini coefficient before each removal and at the end."""

    kept: np.ndarray
    removed: np.ndarray
    path: np.ndarray


def presence_weights(statistics: Statistics, level: Level) -> sparse.csr_array:
    """What each image adds to each class, (N, K): 1 where it shows the class, or the class's share of its pixels."""
    pixels = sparse.csr_array(statistics.pixels.astype(np.float64))
    if level == "image":
        pixels.data[:] = 1
        return pixels

    total = statistics.pixels.sum(1, dtype=np.int64) + statistics.ignored
    pixels.data /= np.repeat(np.maximum(total, 1), np.diff(pixels.indptr))

    return pixels


def greedy_subset(
    weights: sparse.csr_array,
    *,
    images: int | None = None,
    goal: float | None = None,
    seed: int = 0,
) -> Subset:
    """Remove images until `images` of them remain, or the Gini coefficient has reached `goal`; with both, the number
    is exact and the coefficient follows a straight line to the goal, which it meets within TOLERANCE.

    weights: (N, K) ≥ 0, what each image adds to each class. seed: decides between equally good images.
    A step ranks all images by the change of the coefficient at unchanged class order, and evaluates the SHORTLIST
    best of them exactly: with integer weights of few ties, or N ≤ SHORTLIST, that is the exact best.
    Raises ValueError where the goal cannot be reached without emptying a class or a fall of the coefficient.
    """
    n = weights.shape[0]
    if images is None and goal is None:
        raise ValueError("give a number of images, a Gini coefficient, or both")
    if images is not None and not 0 < images <= n:
        raise ValueError(f"{images} images of {n}: take between 1 and {n}")

    order = np.random.default_rng(seed).permutation(n)
    state = _Removal(sparse.csr_array(weights[order]))
    if images is not None and goal is not None and goal < state.gini - TOLERANCE:
        raise ValueError(
            f"a Gini coefficient of {goal}: the whole set already has {state.gini:.4f}, and it never falls"
        )

    path = [state.gini]
    removed = []

    while (len(removed) < n - images) if images is not None else (state.gini < goal):
        aim = np.inf
        if images is not None and goal is not None:
            aim = state.gini + max(goal - state.gini, 0) / (n - images - len(removed))

        image = state.step(aim)
        if image is None:
            raise ValueError(_stuck(n - len(removed), state.gini, images, goal))

        removed.append(image)
        path.append(state.gini)

    if images is not None and goal is not None and abs(state.gini - goal) > TOLERANCE:
        raise ValueError(_stuck(images, state.gini, images, goal))

    return Subset(
        np.sort(order[state.alive]), order[np.array(removed, np.int64)], np.array(path)
    )


def _stuck(remaining: int, reached: float, images: int | None, goal: float | None) -> str:
    """Why a goal is out of reach, in one line."""
    asked = " and ".join(
        [f"{images} images"] * (images is not None)
        + [f"a Gini coefficient of {goal}"] * (goal is not None)
    )
    if remaining == images:
        return f"{asked} cannot be reached: with {images} images the coefficient is {reached:.4f}; change one of them"
    return (
        f"{asked} cannot be reached: with {remaining} images and a coefficient of {reached:.4f}, every further removal "
        "would lower it or empty a class; ask for more images or a smaller coefficient"
    )


class _Removal:
    """The images that remain, and for each of them what its removal would change.

    With classes in ascending order of weight x and r = 1 … K their ranks, G = (2 Σ r·x / Σ x − (K + 1)) / K. Removing
    image i takes `loss` = Σ r·w_i from the first sum and `size` = Σ w_i from the second.
    """

    def __init__(self, weights: sparse.csr_array):
        self.rows = weights
        self.columns = sparse.csc_array(weights)
        self.x = weights.sum(0)
        self.count = np.bincount(weights.indices[weights.data > 0], minlength=weights.shape[1])
        self.gini = gini(self.x)
        self.alive = np.ones(weights.shape[0], bool)
        self.size = weights.sum(1)
        self.rank = self._ranks()
        self.loss = weights @ self.rank  # infinite: not to be removed
        self._lock(np.flatnonzero(self.count == 1))

    def step(self, aim: float) -> int | None:
        """Remove the image that leaves the coefficient nearest to `aim` without lowering it; None: all lower it."""
        for target in (aim, np.inf)[: 1 if aim == np.inf else 2]:
            removed = self._remove_best(self._shortlist(target), target)
            if removed is not None:
                return removed

        # where classes are equally heavy, the first-order change may overrate all of a shortlist
        return self._remove_best(np.flatnonzero(np.isfinite(self.loss)), aim)

    def _remove_best(self, candidates: np.ndarray, target: float) -> int | None:
        """Remove the one that leaves the coefficient nearest to `target` without lowering it, if there is such."""
        parts = np.array_split(candidates, max(len(candidates) // SHORTLIST, 1))
        after = np.concatenate([self._exact(part) for part in parts])
        allowed = after >= self.gini
        if not allowed.any():
            return None

        score = after if target == np.inf else -np.abs(after - target)
        best = int(np.where(allowed, score, -np.inf).argmax())
        self._remove(candidates[best], after[best])

        return int(candidates[best])

    def _shortlist(self, aim: float) -> np.ndarray:
        """The best images by the first-order change, ascending."""
        ascending = np.sort(self.x)
        n = len(ascending)
        first = float(ascending @ np.arange(1, n + 1))
        total = ascending.sum()
        score = (first - self.loss) / np.maximum(total - self.size, np.finfo(float).tiny)
        if aim != np.inf:
            score = -np.abs(score - (aim * n + n + 1) / 2)

        if len(score) > SHORTLIST:
            chosen = np.sort(np.argpartition(score, -SHORTLIST)[-SHORTLIST:])
        else:
            chosen = np.arange(len(score))

        return chosen[np.isfinite(self.loss[chosen])]

    def _exact(self, candidates: np.ndarray) -> np.ndarray:
        """The coefficient after the removal of each candidate."""
        after = np.sort(self.x - self.rows[candidates].toarray(), axis=1)
        n = after.shape[1]
        return (2 * (after @ np.arange(1.0, n + 1)) / after.sum(1) - (n + 1)) / n

    def _remove(self, image: int, after: float) -> None:
        row = slice(self.rows.indptr[image], self.rows.indptr[image + 1])
        classes = self.rows.indices[row]
        self.x[classes] -= self.rows.data[row]
        self.count[classes] -= 1
        self.alive[image] = False
        self.loss[image] = np.inf
        self.gini = float(after)
        self._lock(classes[self.count[classes] == 1])
        rank = self._ranks()
        changed = np.flatnonzero(rank != self.rank)
        if len(changed):
            self.loss += self.columns[:, changed] @ (rank - self.rank)[changed]
            self.rank = rank

    def _ranks(self) -> np.ndarray:
        """1 + the number of lighter classes: equal classes share the lowest rank, which is what one of them has after
        it lost an image."""
        return np.searchsorted(np.sort(self.x), self.x).astype(np.float64) + 1

    def _lock(self, classes: np.ndarray) -> None:
        """Keep the only image that is left of each class."""
        for k in classes:
            shown = self.columns.indices[self.columns.indptr[k] : self.columns.indptr[k + 1]]
            self.loss[shown[self.alive[shown]]] = np.inf
