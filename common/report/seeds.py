"""Runs that differ by their seed alone as one run of a report: means of what they left."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from statistics import fmean
from typing import Any

from common.evaluation.identity import differences, other_means
from common.report.groups import Group, by_settings, seed_of, without_seed
from common.report.runs import RunFolder


def methods(runs: Sequence[RunFolder]) -> list[Group]:
    """The runs as a report shows them, seeds together, in the order of the runs.

    Runs that cannot be one method stand alone: two of one seed, scores that do not compare.
    """
    found = []

    for members in by_settings(runs):
        if len(members) > 1 and _are_one(members):
            seeds = {seed_of(run): run for run in members}
            found.append(Group(without_seed(members[0]), dict(sorted(seeds.items()))))
        else:
            found += [Group(run.name, {seed_of(run): run}) for run in members]

    return found


def _are_one(runs: Sequence[RunFolder]) -> bool:
    seeds = {seed_of(run) for run in runs}
    known = all("seed" in run.record or "seed" in run.tree for run in runs)
    if not known or len(seeds) < len(runs):
        return False

    first, *others = [run.evaluation for run in runs]
    return first is not None and all(_alike(other, first) for other in others)


def _alike(result: Mapping[str, Any] | None, first: Mapping[str, Any]) -> bool:
    if result is None or result["convention"] != first["convention"]:
        return False

    names, others = ([item["name"] for item in side["per_class"]] for side in (result, first))
    return (
        names == others
        and not differences(result, first)
        and not other_means(result["per_class"], first["per_class"])
    )


def pooled(group: Group) -> RunFolder:
    """The runs of a group as one: means of scores and logs, everything else of the first."""
    runs = list(group.runs.values())
    first = runs[0]
    if len(runs) == 1:
        return first

    minutes = [run.record.get("minutes") for run in runs]
    record = {
        **first.record,
        "seed": ", ".join(map(str, group.runs)),
        "minutes": None if None in minutes else fmean(minutes),
    }
    missing = dict.fromkeys(part for run in runs for part in run.missing)

    return replace(
        first,
        name=group.name,
        record=record,
        log=_mean_log([run.log for run in runs]),
        evaluation=mean_result([run.evaluation for run in runs if run.evaluation]),
        missing=tuple(missing),
    )


def mean_result(results: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """The mean of evaluations that compare: their scores averaged, their confusion matrices added up."""
    if len(results) < 2:
        return results[0] if results else None

    mean = _mean([{**result, "confusion": None} for result in results])
    matrices = [result.get("confusion") for result in results]
    mean["confusion"] = None if None in matrices else _sum(matrices)
    return mean


def _sum(matrices: Sequence[Sequence[Sequence[int]]]) -> list[list[int]]:
    return [
        [sum(cells) for cells in zip(*rows, strict=True)]
        for rows in zip(*matrices, strict=True)
    ]


def _mean(values: Sequence[Any]) -> Any:
    """Means of the numbers in values of one form; None where one is undefined, the first where they are no numbers."""
    first = values[0]
    if all(isinstance(value, Mapping) for value in values):
        return {key: _mean([value.get(key) for value in values]) for key in first}
    if all(isinstance(value, list) for value in values):
        return [_mean(items) for items in zip(*values, strict=False)]

    if all(value == first for value in values):
        return first
    if None in values:
        return None
    return fmean(values) if all(isinstance(value, int | float) for value in values) else first


def _mean_log(logs: Sequence[Sequence[Mapping[str, Any]]]) -> list[dict[str, Any]]:
    """Lines of the steps that all logs have, averaged."""
    tables = [{(line.get("kind"), line.get("step")): line for line in log} for log in logs]
    first, *others = tables
    shared = [key for key in first if all(key in table for table in others)]
    return [_mean([table[key] for table in tables]) for key in shared]
