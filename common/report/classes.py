"""What a report shows of single classes: their chart, their table and the confusions of a run."""

from collections.abc import Sequence
from html import escape
from typing import Any

import numpy as np

from common.comparison import Difference
from common.data.imbalance import GROUPS
from common.report.charts import Run, heatmap
from common.report.class_chart import ClassRow, class_chart
from common.report.compared import NOISE, Compared
from common.report.html import (
    cell,
    change,
    details,
    header,
    points,
    scroll,
    section,
    sorting_header,
    swatch,
    table,
)

MANY = 60  # classes beyond which the class chart shows groups of neighbours in frequency
MOST_BARS = 400  # of one chart
FEW = 20  # classes up to which their chart shows at a glance which gained and lost
SHOWN = 3  # runs whose confusions are open
ENDS = 8  # classes named of those that gained most, and of those that lost most


def classes(report: Any) -> str:
    """IoU of every class in the order of its frequency."""
    if not report.scored:
        return ""

    order = sorted(range(len(report.shares)), key=lambda k: -(report.shares[k] or 0))
    runs = [Run(i, report.names[i]) for i in report.scored]
    rows = [_class_row(report, k) for k in order]

    def chart(rows: Sequence[ClassRow]) -> str:
        iou_label = f"IoU in percent, convention {report.convention}"
        wide, narrow = (
            class_chart(rows, runs, report.share_label, iou_label, narrow=form)
            for form in (False, True)
        )
        return f'<div class="wide">{scroll(wide)}</div><div class="narrow">{narrow}</div>'

    hint = "Most frequent class at the top. Longer bars are better."
    if len(order) <= MANY and len(order) * len(runs) <= MOST_BARS:
        body = chart(rows)
    else:
        bins = 20 if len(runs) <= 3 else 8
        every = (
            details("Every class", chart(rows)) if len(order) * len(runs) <= MOST_BARS else ""
        )
        body = chart(_neighbours(rows, min(bins, len(rows)))) + every
        hint = "Classes in the order of their frequency, averaged over neighbours in rank."

    ranked = _ranked(report) if len(order) > FEW else ""
    if ranked:
        hint = (
            f"First the classes that gained and lost most. Below: {hint[0].lower()}{hint[1:]}"
        )
    return section(
        "classes",
        "Classes by training frequency",
        ranked + body + _class_table(report, order),
        hint,
    )


def _ranked(report: Any) -> str:
    """For every method the classes that gained most and lost most."""
    tables = [
        f'<div class="r{i}"><h3>{swatch(i)} {escape(report.names[i])}</h3>{_ranking(found)}</div>'
        for i, found in report.changes.items()
        if found.classes
    ]
    return f'<div class="charts">{"".join(tables)}</div>' if tables else ""


def _ranking(found: Compared) -> str:
    """The ends of a method's classes by gain: IoU before and after, and the change."""
    defined = [item for item in found.classes if np.isfinite(item.change.difference.mean)]
    gained = [item for item in defined if item.change.difference.mean > 0][:ENDS]
    lost = [item for item in defined if item.change.difference.mean < 0][-ENDS:]
    rows = []

    for item in (*gained, *lost):
        tail = ' <span class="mark">tail</span>' if item.tail else ""
        shown = change(item.change.difference, "")
        doubt = (
            f' <span class="soft">{item.change.word}</span>'
            if item.change.word == NOISE
            else ""
        )
        rows.append(
            [
                f"{escape(item.name)}{tail}",
                f"{points(item.before['iou'])} → {points(item.after['iou'])}",
                shown + doubt,
            ]
        )

    return table(header(["gained and lost most", "IoU", "change"]), rows, "ranked")


def _class_row(report: Any, k: int) -> ClassRow:
    items = [report.results[i]["per_class"][k] for i in report.scored]
    found = [_class_change(report, i, k) if i else None for i in report.scored]
    changes = [None if difference is None else difference.mean for difference in found]
    iou = [item["iou"] for item in items]
    return ClassRow(items[0]["name"], items[0]["tail"], report.shares[k], iou, changes)


def _neighbours(rows: Sequence[ClassRow], bins: int) -> list[ClassRow]:
    """`rows` averaged over runs of neighbours; undefined values are left out."""
    result = []

    for part in np.array_split(np.arange(len(rows)), bins):
        members = [rows[k] for k in part]
        name = f"rank {part[0] + 1} to {part[-1] + 1}"
        share = _defined_mean([row.share for row in members])
        iou = [
            _defined_mean(column) for column in zip(*(row.iou for row in members), strict=True)
        ]
        changes = [
            _defined_mean(column)
            for column in zip(*(row.changes for row in members), strict=True)
        ]
        result.append(ClassRow(name, False, share, iou, changes))

    return result


def _defined_mean(values: Sequence[float | None]) -> float | None:
    defined = [value for value in values if value is not None]
    return sum(defined) / len(defined) if defined else None


def _class_table(report: Any, order: Sequence[int]) -> str:
    """Every class's numbers; each column sorts."""
    runs = report.scored
    first = report.results[runs[0]]["per_class"]
    levels = list(first[0].get("groups", {})) if first else []
    head = ["class", "tail", *(f"{level} group" for level in levels), "frequency, %", "pixels"]
    for i in runs:
        titles = ["IoU", *(["change"] if _changes(report, i) else []), "Acc", "precision"]
        head += [f"{title} {report.names[i]}" for title in titles]

    rows = []
    for k in order:
        item = first[k]
        share = report.shares[k]
        row = [escape(item["name"]), cell(int(item["tail"]), "tail" if item["tail"] else "")]
        row += [cell(_rank(item["groups"][level]), item["groups"][level]) for level in levels]
        row.append(cell(share, "–" if share is None else f"{100 * share:.3g}"))
        row.append(cell(item["pixels"], f"{item['pixels']:,}"))
        for i in runs:
            row += _class_cells(report, i, k)
        rows.append(row)

    return details(
        f"Table: every class ({report.convention}); a click on a head sorts",
        table(sorting_header(head), rows, "sortable"),
    )


def _changes(report: Any, i: int) -> bool:
    """Whether a run has changes against the baseline."""
    return bool(i and report.results[0])


def _rank(group: str) -> int | None:
    """The place of a group's name, rare ones highest; None for classes that are in none."""
    return len(GROUPS) - GROUPS.index(group) if group in GROUPS else None


def _class_cells(report: Any, i: int, k: int) -> list[str]:
    """IoU, its change against the baseline, accuracy and precision of one class in one run."""
    mine = report.results[i]["per_class"][k]
    cells = [cell(mine["iou"], points(mine["iou"]))]

    if _changes(report, i):
        found = _class_change(report, i, k)
        cells.append(cell(None if found is None else found.mean, change(found)))

    rates = [mine["acc"], mine.get("precision")]
    return [*cells, *(cell(value, points(value)) for value in rates)]


def _class_change(report: Any, i: int, k: int) -> Difference | None:
    """The change of a class's IoU against the baseline."""

    def iou(result: Any) -> float | None:
        return result["per_class"][k]["iou"]

    return report.change(i, iou)


def confusion(report: Any) -> str:
    """Where the pixels of the tail go."""
    runs = [i for i in report.scored if report.results[i].get("confusion")]
    if not runs:
        return ""

    ids, called = report.tail()
    names = [item["name"] for item in report.results[runs[0]]["per_class"]]
    matrices = [np.array(report.results[i]["confusion"], np.float64) for i in runs]
    mass = np.sum(
        [m[ids] / np.maximum(m[ids].sum(1, keepdims=True), 1) for m in matrices], axis=(0, 1)
    )
    mass[ids] = -1
    columns = ids + [int(k) for k in np.argsort(-mass)[:8] if mass[k] > 0]
    rest = ["all others"] if len(columns) < len(names) else []
    charts = []

    for i, matrix in zip(runs, matrices, strict=True):
        chart = heatmap(
            f"Confusion of the {called}, {report.names[i]}",
            [names[k] for k in ids],
            [names[k] for k in columns] + rest,
            [_row_shares(matrix[k], columns) for k in ids],
        )
        title = f"<h3>{swatch(i)} {escape(report.names[i])}</h3>"
        # narrow ones stand side by side
        basis = 190 + (31 if len(runs) > 1 else 40) * len(columns)
        charts.append(
            f'<div class="r{i}" style="flex:0 1 {basis}px">{title}{scroll(chart)}</div>'
        )

    hint = (
        f"Rows: true class, the {called} (rarest last). Columns: predicted class, first these classes, then those that "
        "they are most often taken for. Percent of the row's pixels; outlined: correct."
    )

    return section(
        "confusion",
        f"Confusion of the {called}",
        _stack(charts[:SHOWN]) + details("The other runs", _stack(charts[SHOWN:])),
        hint,
    )


def _stack(charts: Sequence[str]) -> str:
    return f'<div class="stack">{"".join(charts)}</div>' if charts else ""


def _row_shares(row: np.ndarray, columns: Sequence[int]) -> list[float | None]:
    total = row.sum()
    if not total:
        return [None] * min(len(columns) + 1, len(row))

    shares = [float(row[k] / total) for k in columns]
    return [*shares, max(0.0, 1.0 - sum(shares))][: len(row)]
