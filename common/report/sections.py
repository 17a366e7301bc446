"""The scores of a report, each a function of the `Report` to markup ("" where it has nothing to show)."""

import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from operator import itemgetter
from statistics import fmean
from typing import Any

import numpy as np

from common.comparison import Difference, head_and_tail
from common.data.imbalance import GROUPS
from common.metrics import CONVENTIONS, Convention
from common.report.compared import NOISE, Compared
from common.report.html import change, details, header, points, section, swatch, table

TITLED = 3  # methods that the title names
TILES = ("mIoU(tail)", "mIoU", "mAcc", "aAcc")
SCORES = {
    "mIoU": "miou",
    "mIoU(tail)": "miou_tail",
    "mAcc": "macc",
    "aAcc": "aacc",
    "FreqW": "fwiou",
}


def headline(report: Any) -> str:
    """Title, what was evaluated how, and the figures of the best run (beside the baseline) as tiles."""
    results = report.results
    names = report.names
    dataset = next((result.get("dataset") for result in results if result), None)
    others = [name for i, name in enumerate(names) if i and i not in report.differing]
    if len(others) > TITLED:
        others = [f"{len(others)} methods"]
    title = f"{', '.join(others)} against {names[0]}" if others else ", ".join(names)
    data = f" on {escape(dataset)}" if dataset else ""
    images = next((result["images"] for result in results if result), None)
    basis = f"{images} images, " if images else ""
    lead = f"Long-tailed semantic segmentation{data} · {basis}convention <b>{escape(report.convention)}</b>"

    return (
        f'<h1>{escape(title)}</h1><p class="soft">{lead}</p>{_words(report)}'
        f'<div class="tiles">{_tiles(report)}</div>'
    )


def _words(report: Any) -> str:
    """What the comparison of each method with the baseline says, in a sentence, and what its intervals are of."""
    compared = report.changes.values()
    if not compared:
        return ""

    items = []
    for i, found in report.changes.items():
        name, _, said = found.sentence.partition(": ")
        items.append(f'<li class="r{i}"><b>{escape(name)}</b>: {escape(said)}.</li>')

    basis = f"Against {report.names[0]}, in points of IoU"
    if any(found.half_width is not None for found in _differences(compared)):
        basis += (
            f"; ± is half of a 95 % interval (over seeds: Student’s t of paired differences). “{NOISE}”: Holm’s p is "
            "not below 0.05"
        )
    if any(found.half_width is None for found in _differences(compared)):
        basis += "; one pair says nothing of other seeds"
    return f'<ul class="words">{"".join(items)}</ul><p class="hint">{escape(basis)}.</p>'


def _differences(compared: Iterable[Compared]) -> list[Difference]:
    return [item.difference for found in compared for item in found.overall.values()]


def _tiles(report: Any) -> str:
    if not report.scored:
        return ""

    others = [i for i in report.scored if i] or report.scored
    best = max(others, key=lambda i: report.results[i]["miou"] or 0)
    result = report.results[best]
    tiles = []

    for name in TILES:
        key = SCORES[name]
        if result.get(key) is not None:
            found = report.change(best, itemgetter(key), key) if best else None
            shown = change(found, "")
            label = f"{name} · {escape(report.names[best])}" if report.compared else name
            tiles.append(
                f'<div class="tile"><span>{label}</span><b>{points(result[key])}</b>{shown}</div>'
            )

    return "".join(tiles)


def notes(report: Any) -> str:
    """What the reader has to know: missing parts, rescored runs, scores that do not compare."""
    if not report.notes:
        return ""
    items = "".join(f"<li>{escape(note)}</li>" for note in report.notes)
    return f'<section class="notes"><h2>Notes</h2><ul>{items}</ul></section>'


def run_bar(report: Any) -> str:
    """The legend of all charts; a click hides a run."""
    if not report.compared:
        return ""
    names = [name + _seeds(report, i) for i, name in enumerate(report.names)]
    entries = [
        f'<label><input type="checkbox" checked data-run="r{i}">{swatch(i)}{escape(name)}'
        + (" (baseline)" if i == 0 else "")
        + "</label>"
        for i, name in enumerate(names)
    ]
    return f'<fieldset class="runs"><legend>Shown:</legend>{"".join(entries)}</fieldset>'


def _seeds(report: Any, i: int) -> str:
    """How many seeds a method has, where it is not one."""
    count = len(report.groups[i].runs)
    return f", {count} seeds" if count > 1 else ""


def summary(report: Any) -> str:
    """One row a run: every score, the groups at both levels, and the change against the baseline."""
    rows = [_summary_row(report, i) for i in range(len(report.runs))]
    columns = [
        column
        for column in _columns(report)
        if any(column.get(row) is not None for row in rows)
    ]
    if not columns:
        return ""

    values = [[column.get(row) for column in columns] for row in rows]
    best = [_best(report, values, c, column) for c, column in enumerate(columns)]
    cells = []

    for i, row in enumerate(values):
        line = [_summary_name(report, i)]
        for c, value in enumerate(row):
            comparable = report.compared and _compares(report, i, columns[c])
            css = (
                ' class="best"' if comparable and value is not None and value == best[c] else ""
            )
            shown = (
                _change(report, i, columns[c], value, values[0][c]) if i and comparable else ""
            )
            line.append(f"<span{css}>{points(value)}</span>{shown}")

        cells.append(line)

    body = table(_summary_head(columns), cells) + _conventions(report)
    hint = (
        f"In percent, convention <b>{escape(report.convention)}</b>. Tail, rare, common and frequent use the same IoU "
        f"of each class and differ in the classes they average{_group_rules(report)}. "
        "Of several seeds the mean; changes are those of the same seeds, grey where their 95 % interval includes 0."
    )

    return section("scores", "Scores", body, hint)


def _summary_name(report: Any, i: int) -> str:
    """A run's name, whether it is the baseline, and what has to be known of its scores."""
    role = " (baseline)" if report.compared and i == 0 else ""
    mark = report.mark(i)
    reason = escape("; ".join(report.differing.get(i, ())))
    badge = f' <span class="mark" title="{reason}">{mark}</span>' if mark else ""

    seeds = _seeds(report, i)
    return f"{swatch(i)} {escape(report.names[i])}{seeds}{role}{badge}"


def _change(
    report: Any, i: int, column: "_Column", value: float | None, before: float | None
) -> str:
    """A value's change against the baseline: of evaluations seed by seed, of logged values as they are."""
    if report.results[i] and report.results[0]:
        return change(report.change(i, column.get, column.key))
    if value is None or before is None:
        return ""
    return change(Difference(value - before, 1))


def _group_rules(report: Any) -> str:
    """By what the classes are grouped: one rule, or one per run."""
    rules = {report.names[i]: report.results[i].get("group_rule") for i in report.scored}
    said = {name: escape(rule) for name, rule in rules.items() if rule}
    if len(set(said.values())) < 2:
        return f"; groups {next(iter(said.values()))}" if said else ""

    return "; groups " + "; ".join(f"of {escape(name)} {rule}" for name, rule in said.items())


def _summary_row(report: Any, i: int) -> dict[str, Any]:
    """The evaluation; without one, what the log last said."""
    run = report.runs[i]
    return report.results[i] or {
        key: run.last(key) for key in SCORES.values() if not run.evaluation
    }


@dataclass(frozen=True)
class _Column:
    """A score in the table. over: the classes of its mean, where it is not all: "tail" or a level of groups."""

    title: str  # of several columns
    name: str
    get: Callable[[dict[str, Any]], float | None]  # its value in a row
    over: str = ""
    key: str = ""  # in an evaluation, of what is no group


def _columns(report: Any) -> list[_Column]:
    """Every score that some run has."""
    over = {"miou_tail": "tail"}
    columns = [
        _Column("", name, lambda row, key=key: row.get(key), over.get(key, ""), key)
        for name, key in SCORES.items()
    ]
    levels = {
        level: None for result in report.results if result for level in result.get("groups", {})
    }

    for level in levels:
        for group in GROUPS:
            get = functools.partial(_group, level=level, group=group)
            columns.append(_Column(f"mIoU, {level} level", group, get, level))

    return columns


def _compares(report: Any, i: int, column: _Column) -> bool:
    """Whether a run's value in a column compares with the baseline's."""
    return i not in report.differing and column.over not in report.regrouped.get(i, ())


def _best(
    report: Any, values: Sequence[Sequence[float | None]], c: int, column: _Column
) -> float | None:
    """The highest value in a column among those that compare."""
    found = [
        row[c]
        for i, row in enumerate(values)
        if row[c] is not None and _compares(report, i, column)
    ]
    return max(found, default=None)


def _group(row: dict[str, Any], level: str, group: str) -> float | None:
    return row.get("groups", {}).get(level, {}).get(group)


def _summary_head(columns: Sequence[_Column]) -> str:
    groups = list(dict.fromkeys(column.title for column in columns if column.title))
    names = header(["run", *(column.name for column in columns)])
    if not groups:
        return names

    plain = sum(not column.title for column in columns) + 1
    spans = "".join(
        f'<th class="group" colspan="{len(GROUPS)}">{escape(group)}</th>' for group in groups
    )

    return f'<tr><th colspan="{plain}"></th>{spans}</tr>{names}'


def _conventions(report: Any) -> str:
    """mIoU and mIoU(tail) under the other conventions, recomputed from the confusion matrix of each seed."""
    rows = []
    differ = False

    for i in report.scored:
        seeds = [run.evaluation for run in report.groups[i].runs.values()]
        if not all(result and result.get("confusion") for result in seeds):
            continue

        values = [_rescored(seeds, convention) for convention in CONVENTIONS]
        differ |= len({round(m, 9) for m, _ in values}) > 1
        rows.append(
            [escape(report.names[i]), *(f"{_percent(m)} / {_percent(t)}" for m, t in values)]
        )

    if not rows:
        return ""
    if not differ:
        return '<p class="hint" style="margin:12px 0 0">All conventions give the same mIoU here.</p>'

    return details(
        "mIoU / mIoU(tail) under every convention", table(header(["run", *CONVENTIONS]), rows)
    )


def _rescored(
    results: Sequence[Mapping[str, Any]], convention: Convention
) -> tuple[float, float]:
    """mIoU and mIoU(tail) under a convention, the mean of some evaluations; NaN where one has none."""
    scored = []
    for result in results:
        tail = [item["id"] for item in result["per_class"] if item["tail"]]
        scored.append(head_and_tail(np.array(result["confusion"]), tail, convention))

    return fmean(s["miou"] for s in scored), fmean(s["miou_tail"] for s in scored)


def _percent(value: float) -> str:
    return points(value if math.isfinite(value) else None)
