"""A comparison as text: Markdown to read, CSV to compute with, LaTeX to print."""

import csv
import io
import math
import re
from collections.abc import Iterable, Sequence
from typing import Literal, get_args

import numpy as np

from common.comparison import Difference, number
from common.report.compared import (
    FURTHER,
    NOISE,
    SCORES,
    Change,
    Compared,
    pairs_of,
    values_of,
)
from common.report.groups import Group
from common.report.runs import RunFolder

Format = Literal["markdown", "csv", "latex"]
FORMATS: tuple[str, ...] = get_args(Format)
SUFFIXES = {".md": "markdown", ".csv": "csv", ".tex": "latex"}
TITLES = {**SCORES, **FURTHER}
COLUMNS = (
    "method",
    "score",
    "over",
    "seeds",
    "mean",
    "baseline",
    "difference",
    "low",
    "high",
    "p_holm",
    "verdict",
)


def write(
    form: Format, baseline: Group, compared: Sequence[Compared], notes: Sequence[str]
) -> str:
    """The comparison in a form of FORMATS, with a line end."""
    if form == "csv":
        return _csv(baseline, compared)

    lines = (
        _markdown(baseline, compared, notes)
        if form == "markdown"
        else _latex(baseline, compared, notes)
    )
    return "\n".join([*lines, ""])


def means(runs: Iterable[RunFolder]) -> dict[str, float]:
    """The mean of each score over runs, 0..1; NaN where one has none."""
    every = [values_of(run) for run in runs]
    keys = [key for key in TITLES if all(key in values for values in every)]
    return {key: float(np.mean([values[key] for values in every])) for key in keys}


def _percent(value: float) -> str:
    return f"{100 * value:.1f}" if math.isfinite(value) else "–"


# Markdown -----------------------------------------------------------------------------------------------------------


def _markdown(baseline: Group, compared: Sequence[Compared], notes: Sequence[str]) -> list[str]:
    lines = [f"Against {baseline.name}, in points:", ""] if compared else []
    lines += [f"- {item.sentence}." for item in compared]
    lines += ["", *_rows(*_summary(baseline, compared)), ""]

    for item in compared:
        if item.classes:
            lines += [f"### {item.group.name}", "", *_rows(*_classes(item, baseline)), ""]

    return [*lines, *notes]


def _rows(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [
        _line_of(head),
        "|---" * len(head) + "|",
        *map(_line_of, rows),
    ]


def _line_of(cells: Sequence[str]) -> str:
    escaped = (cell.replace("|", "\\|") for cell in cells)
    return f"| {' | '.join(escaped)} |"


def _summary(
    baseline: Group, compared: Sequence[Compared]
) -> tuple[list[str], list[list[str]]]:
    """Heads and rows: each method's means, with the change."""
    base = means(baseline.runs.values())
    keys = list(base)
    rows = [[baseline.name, str(len(baseline.runs)), *(_percent(base[key]) for key in keys)]]

    for item in compared:
        own = means(item.group.runs.values())
        cells = [_cell(own.get(key, math.nan), item.overall.get(key)) for key in keys]
        rows.append([item.group.name, str(len(item.group.runs)), *cells])

    return ["", "seeds", *(TITLES[key] for key in keys)], rows


def _cell(mean: float, change: Change | None) -> str:
    if change is None:
        return _percent(mean)
    doubt = f", {NOISE}" if change.word == NOISE else ""
    return f"{_percent(mean)} ({number(change.difference)}{doubt})"


def _classes(item: Compared, baseline: Group) -> tuple[list[str], list[list[str]]]:
    """Heads and rows: each class of a method, by gain."""
    head = ["class", f"IoU of {baseline.name}", "IoU", "change", "", "precision", "recall"]
    rows = []

    for found in item.classes:
        rates = [
            f"{_percent(found.after[key])} ({number(Difference(found.after[key] - found.before[key], 1))})"
            for key in ("precision", "recall")
        ]
        rows.append(
            [
                found.name + (" *" if found.tail else ""),
                _percent(found.before["iou"]),
                _percent(found.after["iou"]),
                number(found.change.difference),
                found.change.word,
                *rates,
            ]
        )

    return head, rows


# CSV ----------------------------------------------------------------------------------------------------------------


def _csv(baseline: Group, compared: Sequence[Compared]) -> str:
    """One line a method and score, the classes' IoU included; fractions, unrounded. Of a method, means and seeds are of
    the pairs that its difference is of."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(COLUMNS)
    for key, mean in means(baseline.runs.values()).items():
        writer.writerow([baseline.name, key, "", len(baseline.runs), _exact(mean), *[""] * 6])

    for item in compared:
        pairs = pairs_of(item.group, baseline)
        own = means(run for run, _ in pairs) if pairs else means(item.group.runs.values())
        base = means(run for _, run in pairs) if pairs else {}
        count = len(pairs) or len(item.group.runs)
        for key in own:
            values = (count, own[key], base.get(key, math.nan))
            writer.writerow(_line(item, key, *values, item.overall.get(key)))
        for found in item.classes:
            values = (count, found.after["iou"], found.before["iou"])
            writer.writerow(_line(item, f"iou/{found.name}", *values, found.change))

    return file.getvalue()


def _line(
    item: Compared, score: str, seeds: int, mean: float, before: float, change: Change | None
) -> list:
    start = [item.group.name, score, item.over, seeds, _exact(mean), _exact(before)]
    if change is None:
        return [*start, *[""] * 5]

    low, high = change.difference.interval or (math.nan, math.nan)
    p = math.nan if change.p is None else change.p
    exact = [_exact(value) for value in (change.difference.mean, low, high, p)]
    return [*start, *exact, change.word]


def _exact(value: float) -> str:
    return repr(float(value)) if math.isfinite(value) else ""


# LaTeX --------------------------------------------------------------------------------------------------------------


def _latex(baseline: Group, compared: Sequence[Compared], notes: Sequence[str]) -> list[str]:
    """Tables for the package booktabs."""
    lines = [f"% {item.sentence}" for item in compared] + [f"% {note}" for note in notes]
    lines += _tabular(*_summary(baseline, compared))

    for item in compared:
        if item.classes:
            lines += ["", f"% {item.group.name}", *_tabular(*_classes(item, baseline))]

    return lines


def _tabular(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [
        rf"\begin{{tabular}}{{l{'r' * (len(head) - 1)}}}",
        r"\toprule",
        _row(head),
        r"\midrule",
        *map(_row, rows),
        r"\bottomrule",
        r"\end{tabular}",
    ]


def _row(cells: Sequence[str]) -> str:
    return " & ".join(map(_escaped, cells)) + r" \\"


def _escaped(text: str) -> str:
    """Text for LaTeX; a sign stands before numbers as one, not as a hyphen."""
    special = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
    special |= {sign: f"\\{sign}" for sign in "&%$#_{}"}
    special |= {"±": r"$\pm$", "–": "--"}
    escaped = "".join(special.get(letter, letter) for letter in text)
    return re.sub(r"(^|\()([+-])(?=\d)", r"\1$\2$", escaped)
