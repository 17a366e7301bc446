"""The chart of classes: training frequency, IoU of every run, change against the baseline; wide, or for phones."""

import math
from collections.abc import Sequence
from html import escape
from typing import NamedTuple

from common.report.charts import LONGEST, Axis, Run, cut, line, percent, rect, svg, text


class ClassRow(NamedTuple):
    """One row of the class chart: share of the training pixels (0..1) and an IoU (0..1) for each run.

    changes: against the baseline, for each run; without them those of the IoUs.
    """

    name: str
    tail: bool
    share: float | None
    iou: Sequence[float | None]
    changes: Sequence[float | None] = ()


def class_chart(
    rows: Sequence[ClassRow],
    runs: Sequence[Run],
    share_label: str,
    iou_label: str,
    narrow: bool = False,
) -> str:
    """A row for each class: training frequency on a log axis, IoU of every run, change against the baseline (run 0).

    The IoUs of a row are in the order of `runs`. narrow: for a phone, with the name above the bars.
    """
    return (_narrow if narrow else _wide)(rows, runs, share_label, iou_label)


def _narrow(
    rows: Sequence[ClassRow], runs: Sequence[Run], share_label: str, iou_label: str
) -> str:
    """Name and frequency of a class in one line, a bar with IoU and change for each run below it."""
    width, bar, longest = 340, 15, 30
    iou = Axis(0, 1, 0, 226)
    baseline = _baseline(runs)
    parts = [
        text(0, 14, escape(iou_label), "label"),
        text(
            width,
            32,
            escape(f"right: {share_label.partition(' (')[0]}; change, points"),
            "label",
            "end",
        ),
    ]
    y = 40

    for row in rows:
        mark = '<tspan class="tailmark" dx="5">tail</tspan>' if row.tail else ""
        name = cut(row.name, longest - 4 if row.tail else longest)
        share = "unknown" if row.share is None else percent(row.share)
        parts.append(line(0, y, width, y, "rule"))
        parts.append(text(0, y + 17, f"<title>{escape(row.name)}</title>{name}{mark}", "name"))
        parts.append(text(width, y + 17, share, "tick", "end"))
        y += 22

        for run, value, change in zip(runs, row.iou, _changes(row, baseline), strict=True):
            bars = _narrow_bar(f"{row.name}, {run.name}", value, change, (y, bar, width), iou)
            parts.append(f'<g class="r{run.number}">{"".join(bars)}</g>')
            y += bar
        y += 8

    return svg(width, y, "IoU of every class beside its training frequency", parts, least=0)


def _narrow_bar(
    title: str,
    value: float | None,
    change: float | None,
    place: tuple[float, float, float],
    iou: Axis,
) -> list[str]:
    y, bar, width = place
    foot = y + bar - 3.5
    parts = _value_bar(title, value, iou, y + 1, bar - 2, foot)
    if value is None or change is None:
        return parts

    shown = _points(change)
    kind = "up" if shown > 0 else "down" if shown < 0 else ""
    return [*parts, text(width, foot, f"{shown:+.1f}", f"value {kind}", "end")]


def _value_bar(
    title: str, value: float | None, iou: Axis, top: float, height: float, foot: float
) -> list[str]:
    """The bar of an IoU, and its number on the line `foot`."""
    if value is None:
        return [text(iou.start + 4, foot, "undefined", "tick")]

    end = iou.at(value)
    bar = rect(iou.start, top, end - iou.start, height, "bar", _titled(title, value))
    return [bar, text(end + 4, foot, f"{100 * value:.1f}", "value")]


def _titled(title: str, value: float) -> str:
    return f"{title}: IoU {100 * value:.2f} %"


def _points(change: float) -> float:
    """A change in points, as it is shown."""
    return round(100 * change, 1) + 0.0  # no negative zero


def _wide(
    rows: Sequence[ClassRow], runs: Sequence[Run], share_label: str, iou_label: str
) -> str:
    name_end, share_x, iou_x, delta_x, width = 186, (196, 346), (446, 836), (872, 1104), 1120
    baseline = _baseline(runs)
    bar = 11 if len(runs) > 1 else 14
    pitch, top = bar * len(runs) + 12, 52
    height = top + pitch * len(rows) + 8
    shares = [row.share for row in rows if row.share]
    lowest = 10.0 ** math.floor(math.log10(min(shares) * 0.999)) if shares else 0.1
    share = Axis(lowest, max(10.0 * lowest, 1.0), *share_x, log=True)
    changes = [c for row in rows for c in _changes(row, baseline) if c is not None]
    iou = Axis(0, 1, *(iou_x if changes else (iou_x[0], delta_x[1] - 30)))
    least = 0.1 * max([abs(c) for c in changes] + [0.01])
    delta = Axis(
        min([*changes, -least]), max([*changes, least]), delta_x[0] + 34, delta_x[1] - 34
    )
    parts = _class_axes(
        share, iou, delta if changes else None, (top, height), share_label, iou_label
    )
    for i, row in enumerate(rows):
        y = top + i * pitch
        middle = y + pitch / 2
        parts.append(line(0, y + pitch, width, y + pitch, "rule"))
        title = f"<title>{escape(row.name)}</title>"
        mark = '<tspan class="tailmark" dx="5">tail</tspan>' if row.tail else ""
        name = cut(row.name, 18 if row.tail else LONGEST)
        parts.append(text(name_end, middle + 4, f"{title}{name}{mark}", "name", "end"))
        parts += _share_bar(row, share, middle)
        for r, (run, value, change) in enumerate(
            zip(runs, row.iou, _changes(row, baseline), strict=True)
        ):
            bars = _class_bars(
                f"{row.name}, {run.name}", value, change, (y + 6 + r * bar, bar), iou, delta
            )
            parts.append(f'<g class="r{run.number}">{"".join(bars)}</g>')
    return svg(width, height, "IoU of every class beside its training frequency", parts)


def _class_axes(
    share: Axis,
    iou: Axis,
    delta: Axis | None,
    span: tuple[float, float],
    share_label: str,
    iou_label: str,
) -> list[str]:
    top, height = span
    parts = [
        text(share.start, 14, escape(share_label), "label"),
        text(iou.start, 14, escape(iou_label), "label"),
    ]
    decades = share.ticks()
    # a label is some 40 pixels wide
    room = max(1, math.ceil(42 * len(decades) / (share.end - share.start)))
    columns = [
        (share, decades[:: max(1, room)], percent),
        (iou, [0, 0.2, 0.4, 0.6, 0.8, 1], percent),
    ]
    if delta:
        parts.append(
            text(
                (delta.start + delta.end) / 2,
                14,
                "change against the baseline, points",
                "label",
                "middle",
            )
        )
        columns.append((delta, [0.0], lambda v: "0"))
    for axis, marks, form in columns:
        for value in marks:
            parts.append(line(axis.at(value), top - 6, axis.at(value), height - 8, "grid"))
            parts.append(text(axis.at(value), top - 12, form(value), "tick", "middle"))
    return parts


def _share_bar(row: ClassRow, share: Axis, middle: float) -> list[str]:
    if not row.share:
        return [
            text(share.start + 4, middle + 4, "none" if row.share == 0 else "unknown", "tick")
        ]
    end = share.at(row.share)
    title = f"{row.name}: {100 * row.share:.4g} % of the labelled pixels"
    return [
        rect(share.start, middle - 4, end - share.start, 8, "share", title),
        text(end + 4, middle + 4, percent(row.share), "tick"),
    ]


def _class_bars(
    title: str,
    value: float | None,
    change: float | None,
    place: tuple[float, float],
    iou: Axis,
    delta: Axis,
) -> list[str]:
    y, bar = place
    top, height = y + 0.5, bar - 1.5
    foot = y + bar - 2.5
    parts = _value_bar(title, value, iou, top, height, foot)
    if value is None or change is None:
        return parts

    start, end = sorted((delta.at(0), delta.at(change)))
    said = f"{_titled(title, value)} ({100 * change:+.2f} points)"
    parts.append(rect(start, top, end - start, height, "bar", said))

    shown = _points(change)
    x, anchor = (end + 4, "start") if shown >= 0 else (start - 4, "end")
    return [*parts, text(x, foot, f"{shown:+.1f}", "value", anchor)]


def _baseline(runs: Sequence[Run]) -> int | None:
    """The place of the baseline among the runs."""
    return next((r for r, run in enumerate(runs) if run.number == 0), None)


def _changes(row: ClassRow, baseline: int | None) -> Sequence[float | None]:
    """Every run's change against the baseline; None for the baseline itself and where one is undefined."""
    if row.changes:
        return row.changes

    before = None if baseline is None else row.iou[baseline]
    return [
        None if value is None or before is None or r == baseline else value - before
        for r, value in enumerate(row.iou)
    ]
