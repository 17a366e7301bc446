"""What a report shows of single classes: their chart, their table and the confusions of a run."""

from collections.abc import Sequence
from html import escape
from typing import Any

import numpy as np

from common.data.imbalance import GROUPS
from common.report.charts import ClassRow, Run, class_chart, heatmap
from common.report.html import (
    cell,
    delta,
    details,
    points,
    section,
    sorting_header,
    swatch,
    table,
)

MANY = 60  # classes beyond which the class chart shows groups of neighbours in frequency


def classes(report: Any) -> str:
    """IoU of every class in the order of its frequency."""
    if not report.scored:
        return ""

    order = sorted(range(len(report.shares)), key=lambda k: -(report.shares[k] or 0))
    runs = [Run(i, report.names[i]) for i in report.scored]
    rows = [_class_row(report, k) for k in order]

    def chart(rows: Sequence[ClassRow]) -> str:
        drawing = class_chart(
            rows, runs, report.share_label, f"IoU in percent, convention {report.convention}"
        )
        return f'<div class="scroll">{drawing}</div>'

    hint = "Most frequent class at the top. Longer bars are better."
    if len(order) <= MANY:
        body = chart(rows)
    else:
        body = chart(_neighbours(rows)) + details("Every class", chart(rows))
        hint = "Classes in the order of their frequency, averaged over neighbours in rank."

    return section(
        "classes", "Classes by training frequency", body + _class_table(report, order), hint
    )


def _class_row(report: Any, k: int) -> ClassRow:
    items = [report.results[i]["per_class"][k] for i in report.scored]
    return ClassRow(
        items[0]["name"], items[0]["tail"], report.shares[k], [item["iou"] for item in items]
    )


def _neighbours(rows: Sequence[ClassRow], bins: int = 20) -> list[ClassRow]:
    """`rows` averaged over runs of neighbours; undefined IoUs are left out."""
    result = []
    for part in np.array_split(np.arange(len(rows)), bins):
        members = [rows[k] for k in part]
        shares = [row.share for row in members if row.share is not None]
        columns = [
            [v for v in column if v is not None]
            for column in zip(*(row.iou for row in members), strict=True)
        ]
        result.append(
            ClassRow(
                f"rank {part[0] + 1} to {part[-1] + 1}",
                False,
                sum(shares) / len(shares) if shares else None,
                [sum(c) / len(c) if c else None for c in columns],
            )
        )

    return result


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
        before = report.results[0]["per_class"][k]["iou"]
        change = None if mine["iou"] is None or before is None else mine["iou"] - before
        cells.append(cell(change, delta(mine["iou"], before)))

    rates = [mine["acc"], mine.get("precision")]
    return [*cells, *(cell(value, points(value)) for value in rates)]


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
        basis = 190 + (31 if len(runs) > 1 else 40) * len(
            columns
        )  # narrow ones stand side by side
        charts.append(
            f'<div class="r{i}" style="flex:0 1 {basis}px">{title}<div class="scroll">{chart}</div></div>'
        )

    hint = (
        f"Rows: true class, the {called} (rarest last). Columns: predicted class, first these classes, then those that "
        "they are most often taken for. Percent of the row's pixels; outlined: correct."
    )

    return section(
        "confusion",
        f"Confusion of the {called}",
        f'<div class="stack">{"".join(charts)}</div>',
        hint,
    )


def _row_shares(row: np.ndarray, columns: Sequence[int]) -> list[float | None]:
    total = row.sum()
    if not total:
        return [None] * min(len(columns) + 1, len(row))

    shares = [float(row[k] / total) for k in columns]
    return [*shares, max(0.0, 1.0 - sum(shares))][: len(row)]
