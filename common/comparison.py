"""Comparing methods by runs that are paired: same seed, same images, one thing changed.

A difference of two methods is the mean over seeds of (method − baseline), with the interval of Student's t over these
differences. Of several methods against one baseline the p-values are Holm's. Scores may be fractions or points.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from common.metrics import Convention, defined_mean, scores

LEVEL = 0.95


@dataclass(frozen=True)
class Difference:
    """The mean of n paired differences. None where one pair says nothing: spread, interval and p-value."""

    mean: float
    n: int
    sd: float | None = None  # of the differences, n − 1 in the denominator
    half_width: float | None = None  # of the interval around the mean
    p: float | None = None  # two-sided, that the mean of the differences is 0

    @property
    def interval(self) -> tuple[float, float] | None:
        return (
            None
            if self.half_width is None
            else (self.mean - self.half_width, self.mean + self.half_width)
        )


def paired(
    method: Sequence[float], baseline: Sequence[float], level: float = LEVEL
) -> Difference:
    """The difference of two methods whose runs are paired by place. ValueError for sequences that cannot be."""
    if len(method) != len(baseline) or not len(method):
        raise ValueError(
            f"{len(method)} runs cannot be paired with {len(baseline)}; give the same seeds of both"
        )
    return of_differences([a - b for a, b in zip(method, baseline, strict=True)], level)


def of_differences(values: Sequence[float], level: float = LEVEL) -> Difference:
    """Mean, interval and test of differences, or of the scores themselves."""
    n = len(values)
    mean = float(np.mean(values))
    if n == 1:
        return Difference(mean, n)

    sd = float(np.std(values, ddof=1))
    error = sd / math.sqrt(n)
    half_width = float(stats.t.ppf((1 + level) / 2, n - 1)) * error
    if error:
        p = float(2 * stats.t.sf(abs(mean) / error, n - 1))
    else:
        p = 1.0 if mean == 0 else 0.0

    return Difference(mean, n, sd, half_width, p)


def holm(p_values: Mapping[str, float | None]) -> dict[str, float | None]:
    """Holm's adjusted p-values of several tests (1979); those without one stay without."""
    known = sorted((p, name) for name, p in p_values.items() if p is not None)
    adjusted: dict[str, float | None] = dict.fromkeys(p_values)
    highest = 0.0

    for i, (p, name) in enumerate(known):
        highest = max(highest, min(1.0, (len(known) - i) * p))
        adjusted[name] = highest

    return adjusted


def power(pairs: int, sd: float, effect: float, level: float = LEVEL) -> float:
    """The chance that the two-sided paired t-test finds a mean difference `effect`."""
    critical = stats.t.ppf((1 + level) / 2, pairs - 1)
    shift = effect / sd * math.sqrt(pairs)
    found = stats.nct.sf(critical, pairs - 1, shift) + stats.nct.cdf(
        -critical, pairs - 1, shift
    )
    return float(found)


def pairs_needed(sd: float, effect: float, chance: float = 0.8, level: float = LEVEL) -> int:
    """The least number of pairs with that chance to find a mean difference `effect`, of differences that spread by sd.

    ValueError where neither is above 0, or it would be more than a million.
    """
    if sd <= 0 or effect <= 0:
        raise ValueError(f"spread {sd} and effect {effect} have to be above 0")

    z = stats.norm.ppf((1 + level) / 2) + stats.norm.ppf(chance)
    # by the normal distribution, which asks for a little less
    n = max(2, int((z * sd / effect) ** 2))
    if n > 1_000_000:
        raise ValueError(
            f"an effect of {effect} in a spread of {sd} needs more than a million pairs"
        )

    while power(n, sd, effect, level) < chance:
        n += 1

    return n


# Scores of confusion matrices ---------------------------------------------------------------------------------------


def head_and_tail(
    matrix: np.ndarray, tail: Sequence[int], convention: Convention = "nan_mean"
) -> dict[str, float]:
    """`miou`, `miou_tail` and `miou_head` (the classes that are not of the tail), `macc`, `aacc` of a matrix (K, K).

    Fractions; NaN for a group of which no class is defined.
    """
    got = scores(matrix, convention)
    rest = [k for k in range(len(matrix)) if k not in set(tail)]
    return {
        "miou": got["miou"],
        "miou_tail": defined_mean(got["iou"][list(tail)]),
        "miou_head": defined_mean(got["iou"][rest]),
        "macc": got["macc"],
        "aacc": got["aacc"],
    }


# Words --------------------------------------------------------------------------------------------------------------


def verdict(
    difference: Difference, p: float | None, points: float = 100.0, level: float = LEVEL
) -> str:
    """What a difference says, in words. p: adjusted for the other methods. points: how many a score of 1 is."""
    mean = points * difference.mean
    if difference.half_width is None or p is None:
        return f"{mean:+.1f} points in one pair, which says nothing about other seeds"

    half = points * difference.half_width
    text = f"{mean:+.1f} ± {half:.1f} points over {difference.n} pairs"
    if p < 1 - level:
        return f"{text}: {'better' if mean > 0 else 'worse'}"

    return f"{text}: not told apart"
