"""Segmentation scores: one int64 confusion matrix, and the papers' differing conventions under their names.

Rows of a matrix are the truth, columns the prediction. Every score is a fraction in 0..1, unrounded.

| convention | IoU of a class that neither truth nor prediction has | that is only predicted | mIoU |
|---|---|---|---|
| `nan_mean` | NaN | 0 | mean of the defined IoUs (MMSegmentation, CPSL) |
| `absent_zero` | 0 | 0 | mean over all K classes (USRN) |
| `ltss` | NaN | NaN | sum of the defined IoUs over the classes that truth or prediction has (LTSS) |
| `detectron2` | NaN | NaN | mean of the defined IoUs (detectron2 since July 2022) |

`nan_mean` and `ltss` give the same mIoU: a class that is only predicted adds nothing and counts one. It does not
count at all under `detectron2`. The accuracy of a class without truth is NaN (0 under `absent_zero`).
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from common import distributed
from common.data.imbalance import ABSENT, GROUPS

Convention = Literal["nan_mean", "absent_zero", "ltss", "detectron2"]
CONVENTIONS: tuple[str, ...] = get_args(Convention)


def confusion_matrix(pred: Tensor, label: Tensor, num_classes: int) -> Tensor:
    """Pixels of every (true, predicted) pair, int64 (K, K) on the inputs' device.

    pred, label: integer tensors of one shape; pred in [0, K), label in [-1, K) where -1 is not counted.
    Raises ValueError for another shape or a value outside these ranges.
    """
    if pred.shape != label.shape:
        raise ValueError(
            f"prediction {tuple(pred.shape)} and label {tuple(label.shape)} differ in shape"
        )

    k = num_classes
    if not pred.numel():
        return torch.zeros(k, k, dtype=torch.int64, device=pred.device)

    # Ignored pixels get a row of their own, dropped at the end: cheaper than selecting the others.
    bins = k * (k + 1)
    # bandwidth is the cost
    dtype = torch.int16 if bins <= torch.iinfo(torch.int16).max else torch.int32
    _check(pred, 0, k, "prediction")
    _check(label, -1, k, "label")
    pair = torch.add(pred.reshape(-1).to(dtype), label.reshape(-1).to(dtype), alpha=k).add_(k)

    return torch.bincount(pair, minlength=bins).view(k + 1, k)[1:]


def _check(values: Tensor, low: int, high: int, what: str) -> None:
    smallest, largest = torch.stack(values.aminmax()).tolist()
    if smallest < low or largest >= high:
        value = smallest if smallest < low else largest
        raise ValueError(
            f"{what} holds the class {value}; {high} classes allow {low} to {high - 1}"
        )


class ConfusionMatrix:
    """A confusion matrix summed over images, and over ranks on request."""

    def __init__(self, num_classes: int, device: torch.device | str = "cpu"):
        self.num_classes = num_classes
        self.matrix = torch.zeros(num_classes, num_classes, dtype=torch.int64, device=device)

    def update(self, pred: Tensor, label: Tensor) -> Tensor:
        """Count one image or batch, and return what was added; see `confusion_matrix`."""
        added = confusion_matrix(pred, label, self.num_classes).to(self.matrix.device)
        self.matrix += added
        return added

    def reduce(self) -> Tensor:
        """The matrix of all ranks, int64 (K, K) on the CPU; what this rank holds stays as it is."""
        total = self.matrix.clone()
        if dist.is_initialized() and dist.get_backend() == "nccl":
            total = total.cuda()
        return distributed.all_sum(total).cpu()


def scores(matrix: Tensor | np.ndarray, convention: Convention) -> dict[str, Any]:
    """Every score of a confusion matrix (K, K), as fractions in 0..1.

    Gives `miou`, `macc`, `aacc`, `fwiou` (floats; NaN when nothing was counted), `iou` and `acc` (float64 (K,), NaN
    for an undefined class), and `convention`. Sources: module docstring.
    """
    got = score_counts(class_counts(matrix), convention)
    means = {name: float(got[name]) for name in ("miou", "macc", "aacc", "fwiou")}
    return {"convention": convention, **means, "iou": got["iou"], "acc": got["acc"]}


def class_counts(matrix: Tensor | np.ndarray) -> np.ndarray:
    """Right, true and predicted pixels of each class, float64 (…, 3, K), of matrices (…, K, K).

    They are all that scores are made of, and exact up to 2^53 pixels.
    """
    matrix = np.asarray(matrix)
    hits = np.diagonal(matrix, axis1=-2, axis2=-1)
    return np.stack([hits, matrix.sum(-1), matrix.sum(-2)], -2).astype(np.float64)


def score_counts(
    counts: np.ndarray, convention: Convention, parts: Mapping[str, Sequence[int]] | None = None
) -> dict[str, np.ndarray]:
    """The scores of many matrices at once, from `class_counts` (…, 3, K): `iou` and `acc` (…, K), others (…).

    parts: name → class ids; under that name the mIoU of these classes, as the convention has it of all.
    """
    made = _Counts(counts, convention)
    total = made.truth.sum(-1)
    ids = np.arange(made.iou.shape[-1])
    return {
        **{
            name: made.mean_iou(np.isin(ids, list(part)))
            for name, part in (parts or {}).items()
        },
        "miou": made.mean_iou(np.ones(made.iou.shape[-1], bool)),
        "macc": defined_mean(made.acc),
        "aacc": _divide(made.hits.sum(-1), total),
        "fwiou": _divide(np.nansum(made.iou * made.truth, -1), total),
        "iou": made.iou,
        "acc": made.acc,
    }


def mean_iou(matrix: Tensor | np.ndarray, ids: Sequence[int], convention: Convention) -> float:
    """mIoU over some classes of a matrix (K, K), as the convention has it over all; NaN where none of them counts."""
    return float(score_counts(class_counts(matrix), convention, {"part": ids})["part"])


def group_scores(
    matrix: Tensor | np.ndarray, groups: Mapping[str, Sequence[str]], convention: Convention
) -> dict[str, dict[str, float]]:
    """mIoU of rare, common and frequent classes at every level, in 0..1; NaN for an empty group.

    groups: level ("image", "pixel") -> each class's group, K names; absent classes are in no mean. All levels
    use the same IoU, only the grouping differs; both index sets of the convention are intersected with the group.
    """
    counts = _Counts(class_counts(matrix), convention)
    result: dict[str, dict[str, float]] = {}

    for level, names in groups.items():
        names = np.asarray(names)
        if names.shape != counts.iou.shape:
            raise ValueError(
                f"{level} level: {len(names)} groups for {len(counts.iou)} classes"
            )

        unknown = set(names.tolist()) - {*GROUPS, ABSENT}
        if unknown:
            raise ValueError(
                f"{level} level: {min(unknown)!r} is not one of {', '.join((*GROUPS, ABSENT))}"
            )

        result[level] = {group: float(counts.mean_iou(names == group)) for group in GROUPS}

    return result


def precision_and_recall(
    matrix: Tensor | np.ndarray,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of each class: precision, recall, and predicted over true pixels (K,); NaN where undefined, in any convention."""
    hits, truth, predicted = class_counts(matrix)
    return _divide(hits, predicted), _divide(hits, truth), _divide(predicted, truth)


class _Counts:
    """Scores of classes, and which of them count, of counts (…, 3, K)."""

    def __init__(self, counts: np.ndarray, convention: Convention):
        if convention not in CONVENTIONS:
            raise ValueError(
                f"convention {convention!r} is not one of {', '.join(CONVENTIONS)}"
            )

        self.hits, self.truth, predicted = np.moveaxis(counts, -2, 0)
        self.acc = _divide(self.hits, self.truth)
        self.iou = _divide(self.hits, self.truth + predicted - self.hits)
        if convention == "absent_zero":
            self.acc, self.iou = np.nan_to_num(self.acc), np.nan_to_num(self.iou)
        elif convention in ("ltss", "detectron2"):
            self.iou[self.truth == 0] = np.nan

        self.counted = (
            self.truth + predicted > 0 if convention == "ltss" else np.isfinite(self.iou)
        )

    def mean_iou(self, members: np.ndarray) -> np.ndarray:
        """The mean (…) over the classes of which `members` (K,) is true."""
        total = np.nansum(self.iou[..., members], -1)
        return _divide(total, self.counted[..., members].sum(-1))


def _divide(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """The ratio of float64 arrays (…), NaN where the whole is 0."""
    return np.divide(part, whole, out=np.full_like(part, np.nan), where=whole > 0)


def defined_mean(values: np.ndarray) -> np.ndarray:
    """The mean over the last axis of the values that are not NaN (…); NaN where none is left."""
    return _divide(np.nansum(values, -1), np.isfinite(values).sum(-1))
