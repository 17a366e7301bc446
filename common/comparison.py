"""Comparing methods by runs that are paired: same seed, same images, one thing changed.

A difference of two methods is the mean over seeds of (method − baseline), with the interval of Student's t over these
differences. Of several methods against one baseline the p-values are Holm's. Two single runs are compared by resampling
the images that both were evaluated on. Scores may be fractions or points.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from common.lazy import Lazy
from common.metrics import Convention, class_counts, score_counts

stats = Lazy("scipy.stats")

LEVEL = 0.95
RESAMPLES = 10_000
PER_CLASS = 60  # resamples at least: the smallest p of all, times the classes, is then 2/60
NODES = 200  # of the integral that is the power of a test
CHUNK = 500  # resamples that are scored at once


@dataclass(frozen=True)
class Difference:
    """The mean of n paired differences, or a difference over n images. None where one pair says nothing: spread,
    interval and p-value."""

    mean: float
    n: int
    sd: float | None = None  # of the differences, n − 1 in the denominator
    half_width: float | None = None  # of the interval around the mean
    p: float | None = None  # two-sided, that the mean of the differences is 0
    bounds: tuple[float, float] | None = None  # of an interval that is not symmetric

    @property
    def interval(self) -> tuple[float, float] | None:
        if self.bounds is not None or self.half_width is None:
            return self.bounds
        return self.mean - self.half_width, self.mean + self.half_width


def paired(
    method: Sequence[float], baseline: Sequence[float], level: float = LEVEL
) -> Difference:
    """The difference of two methods whose runs are paired by place. ValueError for sequences that cannot be."""
    if len(method) != len(baseline) or not len(method):
        raise ValueError(
            f"{len(method)} runs cannot be paired with {len(baseline)}; give the same seeds of both"
        )
    return of_differences([a - b for a, b in zip(method, baseline, strict=True)], level)


def of_differences(
    values: Sequence[float], level: float = LEVEL, *, shared: float = 0.0
) -> Difference:
    """Mean, interval and test of differences, or of the scores themselves.

    shared: what the variance of the mean has beside 1/n of that of a difference, where the differences have training
    images in common: images tested over images trained on (Nadeau and Bengio, Machine Learning 2003).
    """
    n = len(values)
    mean = float(np.mean(values))
    if n == 1:
        return Difference(mean, n)

    sd = float(np.std(values, ddof=1))
    error = sd * math.sqrt(1 / n + shared)
    half_width = float(stats.t.ppf((1 + level) / 2, n - 1)) * error
    if error:
        p = float(2 * stats.t.sf(abs(mean) / error, n - 1))
    else:
        p = 1.0 if mean == 0 else 0.0

    return Difference(mean, n, sd, half_width, p)


def holm(
    p_values: Mapping[str, float | None], planned: int | None = None
) -> dict[str, float | None]:
    """Holm's adjusted p-values of several tests (1979). Those without one, or with NaN, get none.

    planned: how many tests there are to be, where not all are done yet: what is missing counts as if nothing came out
    (p = 1), so that a result which is told of a part stands when the rest is there. None: those without count for none.
    """
    known = sorted(
        (p, name) for name, p in p_values.items() if p is not None and math.isfinite(p)
    )
    tests = len(known) if planned is None else max(planned, len(known))
    adjusted: dict[str, float | None] = dict.fromkeys(p_values)
    highest = 0.0

    for i, (p, name) in enumerate(known):
        highest = max(highest, min(1.0, (tests - i) * p))
        adjusted[name] = highest

    return adjusted


def paired_by_seed(
    values: Mapping[str, Mapping[Any, float]], baseline: str, planned: int | None = None
) -> dict[str, tuple[Difference, float | None]]:
    """Method → its difference to the baseline over the seeds that both have, and Holm's p over the methods.

    values: method → seed → score. Methods without a seed in common with the baseline are left out. planned: number of
    methods beside the baseline, where that is more (see `holm`).
    """
    found = {}

    for method, scored in values.items():
        seeds = [seed for seed in scored if seed in values[baseline]]
        if method != baseline and seeds:
            before = [values[baseline][seed] for seed in seeds]
            found[method] = paired([scored[seed] for seed in seeds], before)

    adjusted = holm({method: difference.p for method, difference in found.items()}, planned)
    return {method: (difference, adjusted[method]) for method, difference in found.items()}


def power(pairs: int, sd: float, effect: float, level: float = LEVEL) -> float:
    """The chance that the two-sided paired t-test finds a mean difference `effect`.

    That is P(|Z + shift| > critical · W) with Z normal and W the estimated over the true deviation, integrated over the
    quantiles of W. The noncentral t of SciPy (1.17) is the same but for large shifts, where it is NaN at times.
    """
    freedom = pairs - 1
    critical = stats.t.ppf((1 + level) / 2, freedom)
    shift = effect / sd * math.sqrt(pairs)

    nodes, weights = np.polynomial.legendre.leggauss(NODES)
    deviation = stats.chi.ppf((nodes + 1) / 2, freedom) / math.sqrt(freedom)
    found = stats.norm.sf(critical * deviation - shift) + stats.norm.cdf(
        -critical * deviation - shift
    )

    return float(weights @ found / 2)


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
    got = scores_of_counts(class_counts(matrix), tail, convention)
    del got["iou"]
    return {name: float(value) for name, value in got.items()}


def scores_of_counts(
    counts: np.ndarray, tail: Sequence[int], convention: Convention
) -> dict[str, np.ndarray]:
    """The scores of `head_and_tail` (…), and `iou` (…, K), of `metrics.class_counts` (…, 3, K)."""
    rest = [k for k in range(counts.shape[-1]) if k not in set(tail)]
    got = score_counts(counts, convention, {"miou_tail": tail, "miou_head": rest})
    return {key: got[key] for key in ("miou", "miou_tail", "miou_head", "macc", "aacc", "iou")}


# Resampled images ---------------------------------------------------------------------------------------------------


def bootstrap(
    method: np.ndarray,
    baseline: np.ndarray,
    tail: Sequence[int],
    convention: Convention = "nan_mean",
    *,
    blocks: Sequence[int] | None = None,
    resamples: int | None = None,
    seed: int = 0,
    level: float = LEVEL,
) -> tuple[dict[str, Difference], list[Difference]]:
    """Differences of two runs, with percentile intervals over resampled images (Efron and Tibshirani 1993, chapter 13).

    method, baseline: confusion matrices (N, K, K) of the same images; both get the same resamples, each scored as a
    whole. blocks: (N,) numbers; images of one block are drawn together, since frames of a video are not independent.
    Gives the differences of `head_and_tail` by name and of the IoU of each class; `n` counts blocks. A class that a
    resample does not show is left out of it. resamples: None: 10,000, and more where classes are so many that Holm's
    correction of the smallest p, 2 of the resamples, would decide nothing. ValueError for other shapes or fewer than
    two blocks.
    """
    if method.shape != baseline.shape or method.ndim != 3:
        raise ValueError(
            f"matrices of shapes {method.shape} and {baseline.shape} are not of the same images"
        )

    sums = [_block_sums(class_counts(matrices), blocks) for matrices in (method, baseline)]
    count = len(sums[0])
    if count < 2:
        raise ValueError(f"{count} block of images cannot be resampled; give two or more")

    if resamples is None:
        resamples = max(RESAMPLES, PER_CLASS * method.shape[1])

    change = _change(*(part.sum(0) for part in sums), tail, convention)
    draw = np.random.default_rng(seed)
    drawn = []

    for start in range(0, resamples, CHUNK):
        size = min(CHUNK, resamples - start)
        weights = draw.multinomial(count, np.full(count, 1 / count), size)
        parts = [np.tensordot(weights, part, 1) for part in sums]
        drawn.append(_change(*parts, tail, convention))

    values = np.concatenate(drawn)
    found = [_resampled(change[i], values[:, i], count, level) for i in range(len(change))]
    names = ("miou", "miou_tail", "miou_head", "macc", "aacc")
    return dict(zip(names, found[: len(names)], strict=True)), found[len(names) :]


def _block_sums(counts: np.ndarray, blocks: Sequence[int] | None) -> np.ndarray:
    """Counts (N, 3, K) summed over the images of each block."""
    if blocks is None:
        return counts

    _, place = np.unique(np.asarray(blocks), return_inverse=True)
    total = np.zeros((place.max() + 1, *counts.shape[1:]))
    np.add.at(total, place, counts)

    return total


def _change(
    method: np.ndarray, baseline: np.ndarray, tail: Sequence[int], convention: Convention
) -> np.ndarray:
    """Of counts (…, 3, K): the differences of all scores, then of all IoUs (…, 5 + K)."""
    sides = []

    for counts in (method, baseline):
        got = scores_of_counts(counts, tail, convention)
        iou = got.pop("iou")
        sides.append(np.concatenate([np.stack(list(got.values()), -1), iou], -1))

    return sides[0] - sides[1]


def _resampled(mean: float, values: np.ndarray, count: int, level: float) -> Difference:
    """The difference `mean`, and what its resampled values say of it."""
    values = values[np.isfinite(values)]
    if not np.isfinite(mean) or not len(values):
        return Difference(float(mean), count)

    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    beyond = min((values <= 0).sum(), (values >= 0).sum())

    return Difference(
        mean=float(mean),
        n=count,
        sd=float(values.std()),
        half_width=float(high - low) / 2,
        p=min(1.0, 2 * float(beyond + 1) / (len(values) + 1)),
        bounds=(float(low), float(high)),
    )


# Words --------------------------------------------------------------------------------------------------------------


def number(difference: Difference, points: float = 100.0) -> str:
    """A difference in points, with half of its interval where there is one; "–" where it is undefined."""
    if not math.isfinite(difference.mean):
        return "–"

    text = f"{points * difference.mean:+.1f}"
    half = difference.half_width
    return text if half is None else f"{text} ± {points * half:.1f}"


def verdict(
    difference: Difference, p: float | None, points: float = 100.0, level: float = LEVEL
) -> str:
    """What a difference says, in words. p: adjusted for the other methods. points: how many a score of 1 is."""
    said = number(difference, points)
    if not math.isfinite(difference.mean):
        return f"{said}, undefined in a run of {difference.n} pairs"
    if difference.half_width is None or p is None:
        return f"{said} points in one pair, which says nothing about other seeds"

    text = f"{said} points over {difference.n} pairs"
    if p < 1 - level:
        return f"{text}: {'better' if difference.mean > 0 else 'worse'}"

    return f"{text}: not told apart"
