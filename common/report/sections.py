"""The scores and curves of a report, each a function of the `Report` to markup ("" where it has nothing to show)."""

import functools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import numpy as np

from common.data.imbalance import GROUPS
from common.metrics import CONVENTIONS, scores, tail_miou
from common.report.charts import ClassRow, Run, Series, class_chart, heatmap, line_chart
from common.report.html import delta, details, header, points, section, swatch, table

SCORES = {"mIoU": "miou", "mIoU(tail)": "miou_tail", "mAcc": "macc", "aAcc": "aacc", "FreqW": "fwiou"}
MANY = 60  # classes beyond which the class chart shows groups of neighbours in frequency


def headline(report: Any) -> str:
    """Title, what was evaluated how, and the figures of the best run (beside the baseline) as tiles."""
    results, names = report.results, report.names
    dataset = next((result.get("dataset") for result in results if result), None)
    others = [name for i, name in enumerate(names) if i and i not in report.differing]
    title = f"{', '.join(others)} against {names[0]}" if others else ", ".join(names)
    data = f" on {escape(dataset)}" if dataset else ""
    images = next((result["images"] for result in results if result), None)
    basis = f"{images} images, " if images else ""
    lead = f"Long-tailed semantic segmentation{data} · {basis}convention <b>{escape(report.convention)}</b>"
    return f'<h1>{escape(title)}</h1><p class="soft">{lead}</p><div class="tiles">{_tiles(report)}</div>'


def _tiles(report: Any) -> str:
    if not report.scored:
        return ""
    others = [i for i in report.scored if i] or report.scored
    best = max(others, key=lambda i: report.results[i]["miou"] or 0)
    result, base = report.results[best], report.results[0] if best else None
    tiles = []
    for name, key in list(SCORES.items())[:4]:
        if result.get(key) is not None:
            change = delta(result[key], base[key], "") if base else ""
            label = f"{name} · {escape(report.names[best])}" if report.compared else name
            tiles.append(f'<div class="tile"><span>{label}</span><b>{points(result[key])}</b>{change}</div>')
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
    entries = [
        f'<label><input type="checkbox" checked data-run="r{i}">{swatch(i)}{escape(name)}'
        + (" (baseline)" if i == 0 else "")
        + "</label>"
        for i, name in enumerate(report.names)
    ]
    return f'<div class="runs">{"".join(entries)}</div>'


def summary(report: Any) -> str:
    """One row a run: every score, the groups at both levels, and the change against the baseline."""
    rows = [_summary_row(report, i) for i in range(len(report.runs))]
    columns = [column for column in _columns(report) if any(column.get(row) is not None for row in rows)]
    if not columns:
        return ""
    values = [[column.get(row) for column in columns] for row in rows]
    best = [_best(report, values, c, column) for c, column in enumerate(columns)]
    cells = []
    for i, row in enumerate(values):
        line = [_summary_name(report, i)]
        for c, value in enumerate(row):
            comparable = report.compared and _compares(report, i, columns[c])
            css = ' class="best"' if comparable and value is not None and value == best[c] else ""
            change = delta(value, values[0][c]) if i and comparable else ""
            line.append(f"<span{css}>{points(value)}</span>{change}")
        cells.append(line)
    body = table(_summary_head(columns), cells) + _conventions(report)
    hint = (
        f"In percent, convention <b>{escape(report.convention)}</b>. Tail, rare, common and frequent use the same IoU "
        f"of each class and differ in the classes they average{_group_rules(report)}."
    )
    return section("scores", "Scores", body, hint)


def _summary_name(report: Any, i: int) -> str:
    """A run's name, whether it is the baseline, and what has to be known of its scores."""
    role = " (baseline)" if report.compared and i == 0 else ""
    mark = report.mark(i)
    reason = escape("; ".join(report.differing.get(i, ())))
    badge = f' <span class="mark" title="{reason}">{mark}</span>' if mark else ""
    return f"{swatch(i)} {escape(report.names[i])}{role}{badge}"


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
    return report.results[i] or {key: run.last(key) for key in SCORES.values() if not run.evaluation}


@dataclass(frozen=True)
class _Column:
    """A score in the table. over: the classes of its mean, where it is not all: "tail" or a level of groups."""

    title: str  # of several columns
    name: str
    get: Callable[[dict[str, Any]], float | None]  # its value in a row
    over: str = ""


def _columns(report: Any) -> list[_Column]:
    """Every score that some run has."""
    over = {"miou_tail": "tail"}
    columns = [_Column("", name, lambda row, key=key: row.get(key), over.get(key, "")) for name, key in SCORES.items()]
    levels = {level: None for result in report.results if result for level in result.get("groups", {})}
    for level in levels:
        for group in GROUPS:
            get = functools.partial(_group, level=level, group=group)
            columns.append(_Column(f"mIoU, {level} level", group, get, level))
    return columns


def _compares(report: Any, i: int, column: _Column) -> bool:
    """Whether a run's value in a column compares with the baseline's."""
    return i not in report.differing and column.over not in report.regrouped.get(i, ())


def _best(report: Any, values: Sequence[Sequence[float | None]], c: int, column: _Column) -> float | None:
    """The highest value in a column among those that compare."""
    found = [row[c] for i, row in enumerate(values) if row[c] is not None and _compares(report, i, column)]
    return max(found, default=None)


def _group(row: dict[str, Any], level: str, group: str) -> float | None:
    return row.get("groups", {}).get(level, {}).get(group)


def _summary_head(columns: Sequence[_Column]) -> str:
    groups = list(dict.fromkeys(column.title for column in columns if column.title))
    names = header(["run", *(column.name for column in columns)])
    if not groups:
        return names
    plain = sum(not column.title for column in columns) + 1
    spans = "".join(f'<th class="group" colspan="{len(GROUPS)}">{escape(group)}</th>' for group in groups)
    return f'<tr><th colspan="{plain}"></th>{spans}</tr>{names}'


def _conventions(report: Any) -> str:
    """mIoU and mIoU(tail) under the other conventions, recomputed from the confusion matrices."""
    rows, differ = [], False
    for i in report.scored:
        result = report.results[i]
        if not result.get("confusion"):
            continue
        got = [scores(np.array(result["confusion"]), convention) for convention in CONVENTIONS]
        tail = [item["id"] for item in result["per_class"] if item["tail"]]
        values = [(s["miou"], tail_miou(s["iou"], tail) if tail else math.nan) for s in got]
        differ |= len({round(m, 9) for m, _ in values}) > 1
        rows.append([escape(report.names[i]), *(f"{_percent(m)} / {_percent(t)}" for m, t in values)])
    if not rows:
        return ""
    if not differ:
        return '<p class="hint" style="margin:12px 0 0">All conventions give the same mIoU here.</p>'
    return details("mIoU / mIoU(tail) under every convention", table(header(["run", *CONVENTIONS]), rows))


def _percent(value: float) -> str:
    return points(value if math.isfinite(value) else None)


def curves(report: Any) -> str:
    """Loss, learning rate and validation over the training steps."""
    conventions = {line.get("convention") for run in report.runs for line in run.log if line.get("kind") == "eval"}
    named = ", ".join(sorted(c for c in conventions if c)) or report.convention
    charts = [
        ("Training loss", _chart(report, "train", "loss", "loss", log=True)),
        ("Validation mIoU", _chart(report, "eval", "miou", f"mIoU in percent ({named})", scale=100)),
        ("Validation mIoU(tail)", _chart(report, "eval", "miou_tail", f"mIoU(tail) in percent ({named})", scale=100)),
        ("Learning rate", _chart(report, "train", "lr", "learning rate")),
    ]
    known = {"kind", "step", "loss", "lr", "data_seconds", "memory_gib", "minutes"}
    keys = dict.fromkeys(k for run in report.runs for line in run.log if line.get("kind") == "train" for k in line)
    others = [(key, _chart(report, "train", key, key, log=True)) for key in keys if key not in known]
    return section(
        "training",
        "Training",
        _grid(charts) + details("Other logged values", _grid(others)),
        "Thin: logged values. Thick: their running mean." if _grid(charts) else "",
    )


def _grid(charts: Iterable[tuple[str, str]]) -> str:
    cells = "".join(f"<div><h3>{escape(title)}</h3>{chart}</div>" for title, chart in charts if chart)
    return f'<div class="charts">{cells}</div>' if cells else ""


def _chart(report: Any, kind: str, key: str, y_label: str, log: bool = False, scale: float = 1.0) -> str:
    series = []
    for i, (run, run_name) in enumerate(zip(report.runs, report.names, strict=True)):
        if kind == "eval" and i in report.differing:
            continue
        lines = [line for line in run.log if line.get("kind") == kind and isinstance(line.get(key), int | float)]
        values = [(line["step"], float(line[key])) for line in lines if math.isfinite(line[key])]
        noisy = kind == "train" and key != "lr" and len(values) > 30
        smooth = running_mean(values, max(len(values) // 25, 3)) if noisy else values
        series.append(Series(Run(i, run_name), _thinned(smooth), _thinned(values) if noisy else ()))
    return line_chart(f"{key} over training steps", series, y_label=y_label, log=log, scale=scale)


def running_mean(values: Sequence[tuple[float, float]], window: int) -> list[tuple[float, float]]:
    """The mean over the `window` values around every step (over fewer at the ends)."""
    total = np.concatenate([[0.0], np.cumsum([y for _, y in values])])
    middle = np.arange(len(values))
    starts, ends = np.maximum(middle - window // 2, 0), np.minimum(middle + window // 2 + 1, len(values))
    means = (total[ends] - total[starts]) / (ends - starts)
    return [(x, float(y)) for (x, _), y in zip(values, means, strict=True)]


def _thinned(values: Sequence[tuple[float, float]], most: int = 400) -> list[tuple[float, float]]:
    step = -(-len(values) // most) or 1
    return [*values[::step], *(values[-1:] if (len(values) - 1) % step else [])]


def classes(report: Any) -> str:
    """IoU of every class in the order of its frequency."""
    if not report.scored:
        return ""
    order = sorted(range(len(report.shares)), key=lambda k: -(report.shares[k] or 0))
    runs = [Run(i, report.names[i]) for i in report.scored]
    rows = [_class_row(report, k) for k in order]

    def chart(rows: Sequence[ClassRow]) -> str:
        drawing = class_chart(rows, runs, report.share_label, f"IoU in percent, convention {report.convention}")
        return f'<div class="scroll">{drawing}</div>'

    hint = "Most frequent class at the top. Longer bars are better."
    if len(order) <= MANY:
        body = chart(rows)
    else:
        body = chart(_neighbours(rows)) + details("Every class", chart(rows))
        hint = "Classes in the order of their frequency, averaged over neighbours in rank."
    return section("classes", "Classes by training frequency", body + _class_table(report, order), hint)


def _class_row(report: Any, k: int) -> ClassRow:
    items = [report.results[i]["per_class"][k] for i in report.scored]
    return ClassRow(items[0]["name"], items[0]["tail"], report.shares[k], [item["iou"] for item in items])


def _neighbours(rows: Sequence[ClassRow], bins: int = 20) -> list[ClassRow]:
    """`rows` averaged over runs of neighbours; undefined IoUs are left out."""
    result = []
    for part in np.array_split(np.arange(len(rows)), bins):
        members = [rows[k] for k in part]
        shares = [row.share for row in members if row.share is not None]
        columns = [[v for v in column if v is not None] for column in zip(*(row.iou for row in members), strict=True)]
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
    """Every class's numbers."""
    runs = report.scored
    first = report.results[runs[0]]["per_class"]
    levels = list(first[0].get("groups", {})) if first else []
    head = ["class", "tail", *(f"{level} group" for level in levels), "evaluated pixels"]
    head += [f"{score} {report.names[i]}" for i in runs for score in ("IoU", "Acc")]
    rows = []
    for k in order:
        item = first[k]
        row = [escape(item["name"]), "tail" if item["tail"] else ""]
        row += [escape(item["groups"][level]) for level in levels] + [f"{item['pixels']:,}"]
        for i in runs:
            mine = report.results[i]["per_class"][k]
            base = report.results[0]["per_class"][k] if i and report.results[0] else None
            row += [points(mine[s]) + (delta(mine[s], base[s]) if base else "") for s in ("iou", "acc")]
        rows.append(row)
    return details(f"Table: IoU and accuracy of every class ({report.convention})", table(header(head), rows))


def confusion(report: Any) -> str:
    """Where the pixels of the tail go."""
    runs = [i for i in report.scored if report.results[i].get("confusion")]
    if not runs:
        return ""
    ids, called = report.tail()
    names = [item["name"] for item in report.results[runs[0]]["per_class"]]
    matrices = [np.array(report.results[i]["confusion"], np.float64) for i in runs]
    mass = np.sum([m[ids] / np.maximum(m[ids].sum(1, keepdims=True), 1) for m in matrices], axis=(0, 1))
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
        basis = 190 + (31 if len(runs) > 1 else 40) * len(columns)  # narrow ones stand side by side
        charts.append(f'<div class="r{i}" style="flex:0 1 {basis}px">{title}<div class="scroll">{chart}</div></div>')
    hint = (
        f"Rows: true class, the {called} (rarest last). Columns: predicted class, first these classes, then those that "
        "they are most often taken for. Percent of the row's pixels; outlined: correct."
    )
    return section("confusion", f"Confusion of the {called}", f'<div class="stack">{"".join(charts)}</div>', hint)


def _row_shares(row: np.ndarray, columns: Sequence[int]) -> list[float | None]:
    total = row.sum()
    if not total:
        return [None] * min(len(columns) + 1, len(row))
    shares = [float(row[k] / total) for k in columns]
    return [*shares, max(0.0, 1.0 - sum(shares))][: len(row)]
