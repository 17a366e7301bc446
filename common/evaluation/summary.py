"""What an evaluation says about its confusion matrix, under the names that results, tables and reports read."""

import math
from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
from torch import Tensor

from common.evaluation.boundaries import Boundaries
from common.evaluation.calibration import FLOOR, Calibration
from common.metrics import (
    defined_mean,
    group_scores,
    mean_iou,
    precision_and_recall,
    scores,
)


def summarise(
    matrix: Tensor | np.ndarray,
    row: Any,
    convention: str,
    groups: Mapping[str, Sequence[str]] | None = None,
) -> dict[str, Any]:
    """What `evaluate` returns about a confusion matrix (K, K) of the data set `row`."""
    got = scores(matrix, convention)
    counts = np.asarray(matrix)
    pixels = counts.sum(1)
    precision, recall, _ = precision_and_recall(counts)
    per_class = [
        {
            "id": k,
            "name": name,
            "color": [int(v) for v in row.palette[k]],
            "tail": k in row.tail,
            "groups": {level: str(names[k]) for level, names in (groups or {}).items()},
            "iou": number(got["iou"][k]),
            "acc": number(got["acc"][k]),
            "precision": number(precision[k]),
            "recall": number(recall[k]),
            "pixels": int(pixels[k]),
            "train_pixels": row.counts[k] if row.counts else None,
        }
        for k, name in enumerate(row.classes)
    ]
    means = group_scores(matrix, groups, convention) if groups else {}

    return {
        "dataset": row.name,
        "convention": convention,
        "miou": number(got["miou"]),
        "miou_tail": number(mean_iou(counts, row.tail, convention)),
        "macc": number(got["macc"]),
        "aacc": number(got["aacc"]),
        "fwiou": number(got["fwiou"]),
        "groups": {
            level: {k: number(v) for k, v in values.items()} for level, values in means.items()
        },
        "per_class": per_class,
        "confusion": counts.tolist(),
    }


def number(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def with_boundaries(result: dict[str, Any], boundaries: Boundaries) -> dict[str, Any]:
    """A summary with `tolerant_iou` and `boundary_f` of each class, their means and those of the tail.

    The means are over the defined values, whatever the convention of IoU is.
    """
    got = boundaries.scores()
    tail = _tail(result)
    means = {
        "tolerant_miou": defined_mean(got["tolerant_iou"]),
        "tolerant_miou_tail": defined_mean(got["tolerant_iou"][tail]),
        "boundary_f": defined_mean(got["boundary_f"]),
        "boundary_f_tail": defined_mean(got["boundary_f"][tail]),
    }
    return {
        **result,
        **{name: number(value) for name, value in means.items()},
        "boundary": {"pixels": boundaries.radius},
        "per_class": _extended(result, got),
    }


def with_calibration(result: dict[str, Any], calibration: Calibration) -> dict[str, Any]:
    """A summary with `ece` of the best class, `ece_tail`, and of each class `ece` and `mass` (see `calibration.py`).

    `ece_tail` is the mean over the tail classes that have one.
    """
    got = calibration.scores()
    return {
        **result,
        "ece": number(got.ece),
        "ece_tail": number(defined_mean(got.class_ece[_tail(result)])),
        "calibration": {"floor": FLOOR, **got.bins},
        "per_class": _extended(result, {"ece": got.class_ece, "mass": got.mass}),
    }


def _tail(result: Mapping[str, Any]) -> list[int]:
    return [item["id"] for item in result["per_class"] if item["tail"]]


def _extended(
    result: Mapping[str, Any], values: Mapping[str, np.ndarray]
) -> list[dict[str, Any]]:
    """The result's `per_class` with further values (K,) of each."""
    return [
        {**item, **{name: number(value[item["id"]]) for name, value in values.items()}}
        for item in result["per_class"]
    ]


def rescore(result: dict[str, Any], convention: str) -> dict[str, Any]:
    """The scores of an evaluation's confusion matrix under another convention."""
    per_class = result["per_class"]
    row = SimpleNamespace(
        name=result.get("dataset", ""),
        classes=[item["name"] for item in per_class],
        palette=[item["color"] for item in per_class],
        tail=[item["id"] for item in per_class if item["tail"]],
        counts=None,
    )
    levels = per_class[0].get("groups", {}) if per_class else {}
    groups = {level: [item["groups"][level] for item in per_class] for level in levels}
    again = summarise(np.array(result["confusion"]), row, convention, groups)
    pairs = zip(per_class, again["per_class"], strict=True)
    again["per_class"] = [{**old, "iou": new["iou"], "acc": new["acc"]} for old, new in pairs]
    if result.get("identity"):
        again["identity"] = {**result["identity"], "convention": convention}

    return {**result, **again}
