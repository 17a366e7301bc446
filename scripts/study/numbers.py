"""What the results of an evidence plan say, in numbers: scores, changes against the baseline and against what is free.

results: what the step `collect` of scripts/evidence.py has left; split: one of its splits.
"""

import math
from collections.abc import Mapping
from functools import lru_cache
from itertools import chain
from typing import Any

import numpy as np

from common.comparison import LEVEL, Difference, holm, number, paired, paired_by_seed, scores_of_counts
from common.metrics import Convention, class_counts

Compared = Mapping[str, tuple[Difference, float | None]]  # remedy → difference to the baseline, Holm's p
Change = tuple[Difference, Difference]  # of mIoU(head) and of mIoU(tail)
HEAD_ALLOWED = 0.005  # of mIoU(head): what may be given up for the tail, as the project's goal has it


def total_of(images: list[list[int]], num_classes: int) -> np.ndarray:
    """The confusion matrix (K, K) of all images, from the packed ones of each."""
    pairs = np.fromiter(chain.from_iterable(images), np.int64)  # place, count, place, count, …
    total = np.bincount(pairs[0::2], weights=pairs[1::2], minlength=num_classes**2)
    return total.astype(np.int64).reshape(num_classes, num_classes)


def matrices_of(split: Mapping[str, Any], names: list[str]) -> dict[str, dict[str, np.ndarray]]:
    """Of the runs that are recorded: name → seed → confusion matrix of all images."""
    return {
        name: {seed: total_of(run["matrices"], len(split["classes"])) for seed, run in split["runs"][name].items()}
        for name in names
        if name in split["runs"]
    }


def score(matrix: np.ndarray, split: Mapping[str, Any], key: str) -> float:
    """One of the scores of `head_and_tail`, of a matrix (K, K)."""
    return _scores(class_counts(matrix).tobytes(), tuple(split["tail"]), split["convention"])[key]


@lru_cache(maxsize=1 << 12)  # a page asks for those of a run a dozen times; of 847 classes these keys are 80 MB
def _scores(counts: bytes, tail: tuple[int, ...], convention: Convention) -> dict[str, float]:
    """counts: `class_counts` (3, K)."""
    found = scores_of_counts(np.frombuffer(counts).reshape(3, -1), tail, convention)
    return {name: float(value) for name, value in found.items() if name != "iou"}


def of_curve(split: Mapping[str, Any], name: str) -> list[str]:
    """The recorded results of one remedy after training, a strength each, in order."""
    return [run for run in split["runs"] if run.startswith(f"{name} ")]


def changed(results: Mapping[str, Any]) -> dict[str, str]:
    """What is changed after training → the remedy whose networks it changes."""
    return {name: after["of"] for name, after in results["after"].items()}


def unpaired(matrices: Mapping[str, Any], baseline: str) -> list[str]:
    return [name for name in matrices if not set(matrices[name]) & set(matrices[baseline])]


def compare(
    matrices: Mapping[str, Mapping[str, np.ndarray]],
    baseline: str,
    split: Mapping[str, Any],
    key: str,
    planned: int | None = None,
) -> dict[str, tuple[Difference, float | None]]:
    """Remedy → its difference to the baseline over the seeds that both have, and Holm's p over the remedies, or over as
    many as are `planned`."""
    values = {
        remedy: {seed: score(matrix, split, key) for seed, matrix in seeds.items()}
        for remedy, seeds in matrices.items()
    }
    return paired_by_seed(values, baseline, planned)


def between(split: Mapping[str, Any], pairs: Mapping[str, str], key: str) -> dict[str, tuple[Difference, float | None]]:
    """Remedy → its difference to what `pairs` names over the seeds that both have, and Holm's p over the pairs, those
    that are not run yet among them."""
    found = {}
    for remedy, other in pairs.items():
        matrices = matrices_of(split, [other, remedy])
        if len(matrices) == 2 and set(matrices[other]) & set(matrices[remedy]):
            found[remedy] = compare(matrices, other, split, key)[remedy][0]

    adjusted = holm({remedy: difference.p for remedy, difference in found.items()}, len(pairs))
    return {remedy: (difference, adjusted[remedy]) for remedy, difference in found.items()}


def changes_of(
    split: Mapping[str, Any], remedies: list[str], after: list[str]
) -> tuple[dict[str, Change], dict[str, list[Change]]] | None:
    """What the plot shows: the change of every remedy, and those of every strength after training."""
    baseline = remedies[0]
    if baseline not in split["runs"]:
        return None

    matrices = matrices_of(split, list(split["runs"]))
    head, tail = (compare(matrices, baseline, split, key) for key in ("miou_head", "miou_tail"))
    changes = {name: (head[name][0], tail[name][0]) for name in head}
    curves = {name: [changes[run] for run in of_curve(split, name) if run in changes] for name in after}
    points = {name: changes[name] for name in remedies if name in changes}

    return (points, curves) if changes else None


def best_free(
    split: Mapping[str, Any], baseline: str, remedy: str, free: list[str], allowed: float = HEAD_ALLOWED
) -> tuple[str, Difference] | None:
    """What a remedy has to beat, and its difference to it in mIoU(tail).

    That is the one of `free` and the baseline with the highest mIoU(tail) whose mIoU(head) is at most `allowed` below
    the remedy's. None where there is none, or no seed that all have.
    """
    matrices = matrices_of(split, [baseline, remedy, *free])
    if not free or remedy not in matrices or baseline not in matrices:
        return None

    seeds = sorted(set.intersection(*(set(runs) for runs in matrices.values())))
    if not seeds:
        return None

    heads, tails = (
        {name: [score(runs[seed], split, key) for seed in seeds] for name, runs in matrices.items()}
        for key in ("miou_head", "miou_tail")
    )
    least = np.mean(heads[remedy]) - allowed
    others = [name for name in matrices if name != remedy and np.mean(heads[name]) >= least]
    if not others:
        return None

    best = max(others, key=lambda name: float(np.mean(tails[name])))
    return best, paired(tails[remedy], tails[best])


def percent(value: float) -> str:
    return f"{100 * value:.1f}" if np.isfinite(value) else "–"


def decided(difference: Difference, p: float | None) -> str:
    """A difference, bold where Holm's p decides it."""
    text = number(difference)
    return f"**{text}**" if p is not None and math.isfinite(p) and p < 1 - LEVEL else text
