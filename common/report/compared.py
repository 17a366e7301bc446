"""Methods against a baseline: differences with intervals over seeds or, of single runs, over images."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from common.comparison import Difference, bootstrap, head_and_tail, holm, number, paired
from common.evaluation.per_image import FILE as PER_IMAGE
from common.evaluation.per_image import read_per_image
from common.metrics import precision_and_recall, scores
from common.report.groups import Group
from common.report.runs import RunFolder

SCORES = {
    "miou": "mIoU",
    "miou_tail": "mIoU(tail)",
    "miou_head": "mIoU(head)",
    "macc": "mAcc",
    "aacc": "aAcc",
}
# of an evaluation that was asked for them
FURTHER = {
    "tolerant_miou": "mIoU~",
    "tolerant_miou_tail": "mIoU~(tail)",
    "boundary_f": "F~",
    "boundary_f_tail": "F~(tail)",
    "ece": "ECE",
    "ece_tail": "ECE(tail)",
}
LEVEL = 0.05
NAMED = 6  # classes that a sentence names before it counts the rest
NOISE = "within noise"


@dataclass(frozen=True)
class Change:
    """A difference to the baseline. p: Holm's, over methods or classes; None where one pair says nothing."""

    difference: Difference
    p: float | None

    @property
    def told_apart(self) -> bool:
        return self.p is not None and self.p < LEVEL

    @property
    def word(self) -> str:
        if not math.isfinite(self.difference.mean):
            return "undefined"
        if self.p is None:
            return "one pair"
        if not self.told_apart:
            return NOISE
        return "higher" if self.difference.mean > 0 else "lower"


@dataclass(frozen=True)
class ClassChange:
    """One class: means of IoU, precision and recall (0..1) of baseline and method over the seeds that both have, and
    the change of IoU."""

    name: str
    tail: bool
    before: Mapping[str, float]
    after: Mapping[str, float]
    change: Change


@dataclass(frozen=True)
class Compared:
    """One method against the baseline. over: what the intervals are of, such as "3 seeds"."""

    group: Group
    over: str
    overall: Mapping[str, Change]  # by score; {} where nothing is paired
    classes: Sequence[ClassChange]  # by gain, the highest first

    @property
    def sentence(self) -> str:
        """What the comparison says, in words."""
        if not self.overall:
            return f"{self.group.name}: {self.over}"

        parts = [
            f"tail {self._number('miou_tail')} over {self.over}{self._doubt('miou_tail')}",
            f"head {self._number('miou_head')}{self._doubt('miou_head')}",
            f"all {self._number('miou')}{self._doubt('miou')}",
        ]
        clear = [item for item in self.classes if item.change.told_apart]
        gained = [item.name for item in clear if item.change.difference.mean > 0]
        lost = [item.name for item in reversed(clear) if item.change.difference.mean < 0]
        parts += [f"gained: {_listed(gained)}"] if gained else []
        parts += [f"lost: {_listed(lost)}"] if lost else []
        if not clear and self.overall["miou"].p is not None:
            parts.append("no class beyond noise")

        return f"{self.group.name}: {'; '.join(parts)}"

    def _number(self, key: str) -> str:
        return number(self.overall[key].difference)

    def _doubt(self, key: str) -> str:
        return f" ({NOISE})" if self.overall[key].word == NOISE else ""


def _listed(names: Sequence[str]) -> str:
    more = len(names) - NAMED
    return ", ".join(names[:NAMED]) + (f" and {more} more" if more > 0 else "")


def values_of(run: RunFolder) -> dict[str, float]:
    """The scores of a run, 0..1; NaN where undefined."""
    result = run.evaluation
    further = {key: result[key] for key in FURTHER if key in result}
    return {
        **head_and_tail(matrix_of(run), tail_of(run), result["convention"]),
        **{key: float("nan") if value is None else value for key, value in further.items()},
    }


def _with_tail_error(run: RunFolder) -> set[str]:
    """The tail classes that `ece_tail` is the mean of: those that get a probability worth counting."""
    classes = run.evaluation["per_class"]
    return {item["name"] for item in classes if item["tail"] and item.get("ece") is not None}


def matrix_of(run: RunFolder) -> np.ndarray:
    return np.array(run.evaluation["confusion"])


def tail_of(run: RunFolder) -> list[int]:
    return [item["id"] for item in run.evaluation["per_class"] if item["tail"]]


def class_values(run: RunFolder) -> dict[str, np.ndarray]:
    """IoU, precision and recall of each class (K,)."""
    matrix = matrix_of(run)
    precision, recall, _ = precision_and_recall(matrix)
    iou = scores(matrix, run.evaluation["convention"])["iou"]
    return {"iou": iou, "precision": precision, "recall": recall}


def compare(groups: Sequence[Group], baseline: Group, block: int | str = 1) -> list[Compared]:
    """Every other group against the baseline. block: images that are resampled together, for single runs (`blocks_of`).

    Differences are taken seed by seed; of single runs on the same images, with the matrix of each image, intervals are
    over images. p-values of a score are Holm's over the methods, those of a class over the classes of its method.
    """
    others = [group for group in groups if group is not baseline]
    found = {group.name: _differences(group, baseline, block) for group in others}

    keys = dict.fromkeys(key for overall, _, _ in found.values() for key in overall)
    adjusted = {
        key: holm(
            {name: overall[key].p for name, (overall, _, _) in found.items() if key in overall}
        )
        for key in keys
    }

    result = []
    for group in others:
        overall, classes, over = found[group.name]
        changes = {key: Change(overall[key], adjusted[key][group.name]) for key in overall}
        result.append(Compared(group, over, changes, _by_gain(group, baseline, classes)))

    return result


def _differences(
    group: Group, baseline: Group, block: int | str
) -> tuple[dict[str, Difference], list[Difference], str]:
    """Differences of scores and of the classes' IoU, and what they are over."""
    if len(group.runs) == len(baseline.runs) == 1:
        return _of_images(group.first, baseline.first, block)

    pairs = pairs_of(group, baseline)
    if not pairs:
        return {}, [], f"no seed in common with {baseline.name}, so nothing is paired"

    shared = [seed for seed in group.runs if seed in baseline.runs]
    over = f"{len(shared)} seeds" if len(shared) > 1 else f"seed {shared[0]} alone"
    return *_of_pairs(pairs), over


def pairs_of(group: Group, baseline: Group) -> list[tuple[RunFolder, RunFolder]]:
    """Runs of both by seed; two single runs whatever their seeds."""
    if len(group.runs) == len(baseline.runs) == 1:
        return [(group.first, baseline.first)]
    return [
        (group.runs[seed], baseline.runs[seed]) for seed in group.runs if seed in baseline.runs
    ]


def _of_pairs(
    pairs: Sequence[tuple[RunFolder, RunFolder]],
) -> tuple[dict[str, Difference], list[Difference]]:
    """Differences over pairs of runs: of every score that all have, and of the classes' IoU."""
    ours = [values_of(run) for run, _ in pairs]
    theirs = [values_of(run) for _, run in pairs]
    keys = [key for key in ours[0] if all(key in values for values in (*ours, *theirs))]
    overall = {
        key: _paired([values[key] for values in ours], [values[key] for values in theirs])
        for key in keys
    }
    if not all(_with_tail_error(run) == _with_tail_error(other) for run, other in pairs):
        overall |= {
            key: Difference(float("nan"), len(pairs)) for key in ("ece_tail",) if key in keys
        }

    iou, iou_before = (
        np.stack([class_values(run)["iou"] for run in side], 1)
        for side in zip(*pairs, strict=True)
    )
    return overall, [_paired(a, b) for a, b in zip(iou, iou_before, strict=True)]


def _paired(method: Sequence[float], baseline: Sequence[float]) -> Difference:
    """`paired`; nothing but NaN where a value is undefined."""
    if not np.isfinite([*method, *baseline]).all():
        return Difference(float("nan"), len(method))
    return paired(list(method), list(baseline))


def _of_images(
    run: RunFolder, other: RunFolder, block: int | str
) -> tuple[dict[str, Difference], list[Difference], str]:
    """Differences of two runs with intervals over images, where both have kept the matrix of each."""
    overall, classes = _of_pairs([(run, other)])
    if not all((side.path / PER_IMAGE).is_file() for side in (run, other)):
        return overall, classes, "one pair"

    names, matrices = _matrices(run)
    other_names, other_matrices = _matrices(other)
    if names != other_names:
        raise ValueError(
            f"{run.path / PER_IMAGE} is of other images than {other.path / PER_IMAGE}"
        )

    convention = run.evaluation["convention"]
    blocks = blocks_of(names, block)
    resampled, classes = bootstrap(
        matrices, other_matrices, tail_of(run), convention, blocks=blocks
    )
    count = len(set(blocks))
    over = (
        f"{count} images" if count == len(names) else f"{count} blocks of {len(names)} images"
    )

    return overall | resampled, classes, over


def _matrices(run: RunFolder) -> tuple[list[str], np.ndarray]:
    """Names and matrices of a run's images, by name. ValueError where they do not add up to its evaluation."""
    kept = read_per_image(run.path / PER_IMAGE)
    if not np.array_equal(kept.matrices.sum(0), matrix_of(run)):
        raise ValueError(
            f"{run.path / PER_IMAGE}: is of another evaluation than evaluation.json; evaluate again"
        )

    order = sorted(range(len(kept.names)), key=lambda i: kept.names[i])
    return [kept.names[i] for i in order], kept.matrices[order]


def blocks_of(names: Sequence[str], block: int | str) -> list[int]:
    """The block of each image, of names in order: so many neighbours, or the images of one folder ("folder")."""
    if block != "folder":
        return [i // int(block) for i in range(len(names))]

    folders = [str(Path(name).parent) for name in names]
    order = list(dict.fromkeys(folders))
    return [order.index(folder) for folder in folders]


def _by_gain(
    group: Group, baseline: Group, differences: Sequence[Difference]
) -> list[ClassChange]:
    """The classes, the highest gain first, undefined ones last; p-values are Holm's over them."""
    items = baseline.first.evaluation["per_class"]
    adjusted = holm({str(k): difference.p for k, difference in enumerate(differences)})
    pairs = pairs_of(group, baseline)
    if not pairs:
        return []

    after, before = map(_mean_values, zip(*pairs, strict=True))

    classes = [
        ClassChange(
            name=items[k]["name"],
            tail=items[k]["tail"],
            before={key: float(values[k]) for key, values in before.items()},
            after={key: float(values[k]) for key, values in after.items()},
            change=Change(difference, adjusted[str(k)]),
        )
        for k, difference in enumerate(differences)
    ]
    return sorted(classes, key=_order)


def _order(item: ClassChange) -> tuple[bool, float]:
    gain = item.change.difference.mean
    return not np.isfinite(gain), -gain


def _mean_values(runs: Sequence[RunFolder]) -> dict[str, np.ndarray]:
    """Means over runs; NaN where one has none."""
    every = [class_values(run) for run in runs]
    return {key: np.mean([values[key] for values in every], 0) for key in every[0]}
