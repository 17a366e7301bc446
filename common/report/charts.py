"""Charts as inline SVG. Colours are CSS classes (`r0`, `r1`, … for runs), so the page's theme and toggles apply."""

import math
from collections.abc import Sequence
from html import escape
from typing import NamedTuple

Point = tuple[float, float]
LONGEST = 24  # characters of a name before it is cut; its tooltip has the rest


class Run(NamedTuple):
    """What a chart knows of a run: its number in the report (0 is the baseline) and its name."""

    number: int
    name: str


class Series(NamedTuple):
    """One line of a chart: its run, its points, and a fainter companion (raw values)."""

    run: Run
    points: Sequence[Point]
    raw: Sequence[Point] = ()


class ClassRow(NamedTuple):
    """One row of the class chart: share of the training pixels (0..1) and an IoU (0..1) for each run."""

    name: str
    tail: bool
    share: float | None
    iou: Sequence[float | None]


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers between `low` and `high`, about `count` of them."""
    if high <= low:
        return [low]
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [round(i * step, 12) for i in range(first, math.floor(high / step + 1e-9) + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten between `low` and `high`, with 2 and 5 where those are few."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    steps = (1, 2, 5) if len(decades) <= 3 else (1,)
    marks = [
        m * 10.0**d
        for d in decades
        for m in steps
        if low * 0.999 <= m * 10.0**d <= high * 1.001
    ]
    return marks[:: max(1, -(-len(marks) // 7))]


def number(value: float) -> str:
    """A tick label: 2.5k, 1.5M, 0.02, 1e-5."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g}{unit}"
    if 0 < abs(value) < 1e-3:
        mantissa, _, exponent = f"{value:.2e}".partition("e")
        return f"{float(mantissa):g}e{int(exponent)}"
    return f"{value:.3g}"


def cut(name: str, longest: int = LONGEST) -> str:
    return escape(name if len(name) <= longest else name[: longest - 1] + "…")


def text(
    x: float, y: float, content: str, css: str = "", anchor: str = "start", extra: str = ""
) -> str:
    """`content` is markup already."""
    return f'<text x="{x:.1f}" y="{y:.1f}" class="{css}" text-anchor="{anchor}" {extra}>{content}</text>'


def line(x1: float, y1: float, x2: float, y2: float, css: str) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" class="{css}"/>'


def rect(
    x: float, y: float, width: float, height: float, css: str, title: str = "", extra: str = ""
) -> str:
    body = f"<title>{escape(title)}</title>" if title else ""
    size = f'width="{max(width, 0):.1f}" height="{height:.1f}"'
    return f'<rect x="{x:.1f}" y="{y:.1f}" {size} class="{css}" {extra}>{body}</rect>'


def svg(
    width: float, height: float, label: str, parts: Sequence[str], least: float = 0.75
) -> str:
    """A drawing that fills its column; narrower than `least` of its width it scrolls, since text would be too small."""
    style = f"min-width:{least * width:.0f}px;max-width:{1.05 * width:.0f}px"
    head = f'<svg viewBox="0 0 {width:.0f} {height:.0f}" role="img" aria-label="{escape(label)}" style="{style}">'
    return f"{head}{''.join(parts)}</svg>"


class _Axis:
    """Positions of values on a linear or logarithmic axis."""

    def __init__(self, low: float, high: float, start: float, end: float, log: bool = False):
        self.log, self.low, self.high = log, low, high
        self.start, self.end = start, end

    def at(self, value: float) -> float:
        low, high = self.low, self.high
        if self.log:
            low, high, value = math.log10(low), math.log10(high), math.log10(value)
        share = (value - low) / (high - low) if high > low else 0.5
        return self.start + share * (self.end - self.start)

    def ticks(self) -> list[float]:
        return log_ticks(self.low, self.high) if self.log else ticks(self.low, self.high)


def line_chart(
    label: str, series: Sequence[Series], *, y_label: str, log: bool = False, scale: float = 1.0
) -> str:
    """Lines over training steps; values are multiplied by `scale` (100 for percent). Empty without points.

    With `log` the axis is logarithmic if the values are positive and span a factor of 20 or more.
    """
    series = [_finite(s, scale) for s in series]
    points = [p for s in series for p in (*s.points, *s.raw)]
    if not points:
        return ""
    left, right, top, bottom, width, height = 70, 14, 12, 44, 560, 270
    values = [y for _, y in points]
    low, high = min(values), max(values)
    log = log and low > 0 and high >= 20 * low
    margin = 0.06 * (high - low) or 0.05 * abs(high) or 1.0
    if not log:
        low, high = max(low - margin, 0) if low >= 0 else low - margin, high + margin
    x = _Axis(min(p[0] for p in points), max(p[0] for p in points), left, width - right)
    y = _Axis(low, high, height - bottom, top, log)
    parts = []
    for value in y.ticks():
        parts.append(line(left, y.at(value), width - right, y.at(value), "grid"))
        parts.append(text(left - 7, y.at(value) + 4, number(value), "tick", "end"))
    for value in x.ticks():
        parts.append(
            line(x.at(value), height - bottom, x.at(value), height - bottom + 4, "axis")
        )
        parts.append(text(x.at(value), height - bottom + 18, number(value), "tick", "middle"))
    parts.append(line(left, height - bottom, width - right, height - bottom, "axis"))
    parts.append(
        text((left + width - right) / 2, height - 6, "training step", "label", "middle")
    )
    middle = (top + height - bottom) / 2
    turned = f'transform="rotate(-90 14 {middle:.0f})"'
    scale_note = f"{y_label} (log scale)" if log else y_label
    parts.append(text(14, middle, escape(scale_note), "label", "middle", turned))
    dashed = len(series) > 1  # the baseline, drawn last: equal lines stay visible
    parts += [_path(s, x, y, dashed and s.run.number == 0) for s in reversed(series)]
    return svg(width, height, label, parts)


def _finite(series: Series, scale: float) -> Series:
    points, raw = (
        [(px, py * scale) for px, py in part if py is not None and math.isfinite(py)]
        for part in (series.points, series.raw)
    )
    return series._replace(points=points, raw=raw)


def _path(series: Series, x: _Axis, y: _Axis, dashed: bool) -> str:
    def d(points: Sequence[Point]) -> str:
        return "M" + "L".join(f"{x.at(px):.1f} {y.at(py):.1f}" for px, py in points)

    parts = [f'<path d="{d(series.raw)}" class="raw"/>'] if len(series.raw) > 1 else []
    if len(series.points) > 1:
        parts.append(
            f'<path d="{d(series.points)}" class="line{" dashed" if dashed else ""}"/>'
        )
    if len(series.points) <= 40 and not series.raw:
        for px, py in series.points:
            title = f"<title>{escape(series.run.name)}: {py:.4g} at step {px:g}</title>"
            parts.append(
                f'<circle cx="{x.at(px):.1f}" cy="{y.at(py):.1f}" r="3">{title}</circle>'
            )
    return f'<g class="r{series.run.number}">{"".join(parts)}</g>'


def class_chart(
    rows: Sequence[ClassRow], runs: Sequence[Run], share_label: str, iou_label: str
) -> str:
    """A row for each class: training frequency on a log axis, IoU of every run, change against the baseline (run 0).

    The IoUs of a row are in the order of `runs`.
    """
    name_end, share_x, iou_x, delta_x, width = 186, (196, 346), (446, 836), (872, 1104), 1120
    baseline = next((r for r, run in enumerate(runs) if run.number == 0), None)
    bar = 11 if len(runs) > 1 else 14
    pitch, top = bar * len(runs) + 12, 52
    height = top + pitch * len(rows) + 8
    shares = [row.share for row in rows if row.share]
    lowest = 10.0 ** math.floor(math.log10(min(shares) * 0.999)) if shares else 0.1
    share = _Axis(lowest, max(10.0 * lowest, 1.0), *share_x, log=True)
    changes = [c for row in rows for c in _changes(row, baseline) if c is not None]
    iou = _Axis(0, 1, *(iou_x if changes else (iou_x[0], delta_x[1] - 30)))
    least = 0.1 * max([abs(c) for c in changes] + [0.01])
    delta = _Axis(
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
    share: _Axis,
    iou: _Axis,
    delta: _Axis | None,
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
    room = max(1, round(42 * len(decades) / (share.end - share.start)))
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


def _share_bar(row: ClassRow, share: _Axis, middle: float) -> list[str]:
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
    iou: _Axis,
    delta: _Axis,
) -> list[str]:
    y, bar = place
    if value is None:
        return [text(iou.start + 4, y + bar - 2.5, "undefined", "tick")]
    end, title = iou.at(value), f"{title}: IoU {100 * value:.2f} %"
    parts = [rect(iou.start, y + 0.5, end - iou.start, bar - 1.5, "bar", title)]
    parts.append(text(end + 4, y + bar - 2.5, f"{100 * value:.1f}", "value"))
    if change is not None:
        start, end = sorted((delta.at(0), delta.at(change)))
        parts.append(
            rect(
                start,
                y + 0.5,
                end - start,
                bar - 1.5,
                "bar",
                f"{title} ({100 * change:+.2f} points)",
            )
        )
        shown = round(100 * change, 1) + 0.0  # no negative zero
        x, anchor = (end + 4, "start") if shown >= 0 else (start - 4, "end")
        parts.append(text(x, y + bar - 2.5, f"{shown:+.1f}", "value", anchor))
    return parts


def _changes(row: ClassRow, baseline: int | None) -> list[float | None]:
    """Every run's change against the baseline; None for the baseline itself and where one is undefined."""
    before = None if baseline is None else row.iou[baseline]
    return [
        None if value is None or before is None or r == baseline else value - before
        for r, value in enumerate(row.iou)
    ]


def percent(share: float) -> str:
    """A share as percent with two digits: 33 %, 0.021 %."""
    value = 100 * share
    return f"{value:.0f} %" if value >= 9.95 or value == 0 else f"{value:.2g} %"


def heatmap(
    label: str,
    rows: Sequence[str],
    columns: Sequence[str],
    values: Sequence[Sequence[float | None]],
    said: str = "true {row}, predicted {column}",
) -> str:
    """Shares (0..1) as cells with their percentage; rows are named at the left, columns slanted above.

    A cell whose row and column have the same name (a correct prediction) is outlined. said: of a cell, in its tooltip.
    """
    left, cell_w, cell_h = 168, 40, 26
    top = 26 + 5.2 * max(len(cut(name, 18)) for name in columns)
    width, height = left + cell_w * len(columns) + 70, top + cell_h * len(rows) + 6
    parts = []
    for j, name in enumerate(columns):
        x, y = left + cell_w * (j + 0.5), top - 8
        parts.append(
            text(
                x, y, cut(name, 18), "tick", "start", f'transform="rotate(-45 {x:.0f} {y:.0f})"'
            )
        )
    for i, name in enumerate(rows):
        y = top + cell_h * i
        parts.append(text(left - 8, y + cell_h / 2 + 4, cut(name, 24), "name", "end"))
        for j, value in enumerate(values[i]):
            x, share = left + cell_w * j, value or 0.0
            title = f"{said.format(row=name, column=columns[j])}: {100 * share:.2f} %"
            parts.append(rect(x + 1, y + 1, cell_w - 2, cell_h - 2, "cellback"))
            hit = " hit" if columns[j] == name else ""
            opacity = f'fill-opacity="{share**0.7:.3f}"'
            parts.append(
                rect(x + 1, y + 1, cell_w - 2, cell_h - 2, f"cell{hit}", title, opacity)
            )
            shown = "–" if value is None else f"{100 * share:.0f}" if share >= 0.005 else ""
            css = "cellvalue strong" if share > 0.45 else "cellvalue"
            parts.append(text(x + cell_w / 2, y + cell_h / 2 + 4, shown, css, "middle"))
    return svg(width, height, label, parts)
