"""What precise borders and probabilities say of runs: the tables of the evidence page beyond the confusion matrix."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from common.comparison import number, paired_by_seed
from scripts.study.numbers import percent

FURTHER = {"tolerant_miou_tail": "mIoU~(tail)", "boundary_f_tail": "F~(tail)", "ece": "ECE", "ece_tail": "ECE(tail)"}
FURTHER_OF_CLASS = ("tolerant_iou", "boundary_f", "ece", "mass")
FURTHER_HEAD = (
    "Beyond IoU ([scores.md](scores.md)): `~` forgives the pixels of `eval.boundary` at borders, ECE is the expected "
    "calibration error (of the best class; of a class over the pixels with p ≥ 0.05), mass a class's predicted "
    "probability over its pixels. Of ECE less is better, of mass 1 is best.\n"
)


def further_tables(split: Mapping[str, Any], names: list[str]) -> list[str]:
    """What precise borders and probabilities say of the runs that were scored for them; nothing where none was."""
    found = {
        name: {seed: run["further"] for seed, run in split["runs"].get(name, {}).items() if run.get("further")}
        for name in names
    }
    found = {name: seeds for name, seeds in found.items() if seeds}
    if not found:
        return []

    return [FURTHER_HEAD, _further_means(found, names[0]), _further_classes(found)]


def _further_means(found: Mapping[str, Mapping[str, Any]], baseline: str) -> str:
    lines = ["| | seeds | " + " | ".join(FURTHER.values()) + " |", "|---" * (len(FURTHER) + 2) + "|"]
    columns = {key: _further_column(found, baseline, key) for key in FURTHER}
    for name, seeds in found.items():
        cells = [columns[key][name] for key in FURTHER]
        lines.append(f"| {name} | {len(seeds)} | {' | '.join(cells)} |")

    return "\n".join([*lines, ""])


def _further_column(found: Mapping[str, Mapping[str, Any]], baseline: str, key: str) -> dict[str, str]:
    """Name → mean of one score, with the change against the baseline where both have it."""
    values = {
        name: {seed: run[key] for seed, run in seeds.items() if run.get(key) is not None}
        for name, seeds in found.items()
    }
    changes = dict(paired_by_seed(values, baseline)) if baseline in values else {}
    for name in list(changes):
        shared = set(values[name]) & set(values[baseline])
        if key == "ece_tail" and not all(_alike(found[name][seed], found[baseline][seed]) for seed in shared):
            del changes[name]

    cells = {}
    for name, scored in values.items():
        mean = percent(np.mean(list(scored.values()))) if scored else "–"
        cells[name] = f"{mean} ({number(changes[name][0])})" if name in changes else mean

    return cells


def _alike(run: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether the same classes have a calibration error, so that its means over them compare."""
    have = [{name for name, item in side["classes"].items() if item.get("ece") is not None} for side in (run, other)]
    return have[0] == have[1]


def _further_classes(found: Mapping[str, Mapping[str, Any]]) -> str:
    """IoU~ / F~ / ECE / mass of each class of the tail, means over the seeds."""
    classes = list(dict.fromkeys(name for seeds in found.values() for run in seeds.values() for name in run["classes"]))
    lines = ["IoU~ / F~ / ECE / mass:", "", "| | " + " | ".join(classes) + " |", "|---" * (len(classes) + 1) + "|"]
    for remedy, seeds in found.items():
        runs = [run["classes"] for run in seeds.values()]
        cells = [" / ".join(_mean_of(runs, name, key) for key in FURTHER_OF_CLASS) for name in classes]
        lines.append(f"| {remedy} | {' | '.join(cells)} |")

    return "\n".join([*lines, ""])


def _mean_of(runs: list[Mapping[str, Any]], name: str, key: str) -> str:
    values = [run[name][key] for run in runs if run.get(name, {}).get(key) is not None]
    if not values:
        return "–"
    return f"{np.mean(values):.2f}" if key == "mass" else percent(np.mean(values))
