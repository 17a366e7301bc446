"""What an evaluation says about its confusion matrix, under the names that results, tables and reports read."""

import math
from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
from torch import Tensor

from common.metrics import group_scores, scores, tail_miou


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
    per_class = [
        {
            "id": k,
            "name": name,
            "color": [int(v) for v in row.palette[k]],
            "tail": k in row.tail,
            "groups": {level: str(names[k]) for level, names in (groups or {}).items()},
            "iou": _number(got["iou"][k]),
            "acc": _number(got["acc"][k]),
            "pixels": int(pixels[k]),
            "train_pixels": row.counts[k] if row.counts else None,
        }
        for k, name in enumerate(row.classes)
    ]
    means = group_scores(matrix, groups, convention) if groups else {}

    return {
        "dataset": row.name,
        "convention": convention,
        "miou": _number(got["miou"]),
        "miou_tail": _number(tail_miou(got["iou"], row.tail)),
        "macc": _number(got["macc"]),
        "aacc": _number(got["aacc"]),
        "fwiou": _number(got["fwiou"]),
        "groups": {
            level: {k: _number(v) for k, v in values.items()} for level, values in means.items()
        },
        "per_class": per_class,
        "confusion": counts.tolist(),
    }


def _number(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


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
