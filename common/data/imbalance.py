"""How long a tail is: the Gini coefficient, and the rare, common and frequent classes."""

import numpy as np

GROUPS = ("rare", "common", "frequent")
ABSENT = "absent"  # the group of a class that the training set does not show
FEWEST_CLASSES = 5  # of fewer the lowest fifth is none


def gini(counts: np.ndarray) -> float:
    """Gini coefficient of per-class counts (K,): 0 is balanced, towards 1 is long-tailed; empty classes take part.

    G = (n + 1 - 2 · Σ_i C_i / C_n) / n, with C the cumulative sums of the ascending counts (LTSS, TMM 2024).
    """
    cumulative = np.cumsum(np.sort(np.asarray(counts, np.float64)))
    n = len(cumulative)
    if n == 0 or cumulative[-1] <= 0:
        raise ValueError("the Gini coefficient needs at least one class that occurs")

    return float((n + 1 - 2 * cumulative.sum() / cumulative[-1]) / n)


def groups(counts: np.ndarray) -> np.ndarray:
    """0 rare, 1 common, 2 frequent for each class (K,), by the rank of its training count; -1 for a count of 0.

    Of the n classes that occur, the thresholds are the ⌊0.2 n⌋-th and ⌊0.4 n⌋-th smallest counts; a class at a
    threshold belongs above it (LTSS, whose data sets show every class).
    """
    counts = np.asarray(counts)
    occurring = np.sort(counts[counts > 0])
    n = len(occurring)
    if n == 0:
        return np.full(len(counts), -1)

    thresholds = occurring[[n * 2 // 10, n * 4 // 10]]
    rank = np.searchsorted(thresholds, counts, side="right")

    return np.where(counts > 0, rank, -1)
