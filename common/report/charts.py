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
    width: float,
    height: float,
    label: str,
    parts: Sequence[str],
    least: float = 0.75,
    css: str = "",
) -> str:
    """A drawing that fills its column; narrower than `least` of its width it scrolls, since text would be too small."""
    style = f"min-width:{least * width:.0f}px;max-width:{1.05 * width:.0f}px"
    shape = f'viewBox="0 0 {width:.0f} {height:.0f}" class="{css}" style="{style}"'
    head = f'<svg {shape} role="img" aria-label="{escape(label)}">'
    return f"{head}{''.join(parts)}</svg>"


class Axis:
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
    # room for text that phones show larger
    left, right, top, bottom, width, height = 78, 22, 36, 52, 560, 306
    values = [y for _, y in points]
    low, high = min(values), max(values)
    log = log and low > 0 and high >= 20 * low
    margin = 0.06 * (high - low) or 0.05 * abs(high) or 1.0
    if not log:
        low, high = max(low - margin, 0) if low >= 0 else low - margin, high + margin
    x = Axis(min(p[0] for p in points), max(p[0] for p in points), left, width - right)
    y = Axis(low, high, height - bottom, top, log)
    parts = []
    for value in y.ticks():
        parts.append(line(left, y.at(value), width - right, y.at(value), "grid"))
        parts.append(text(left - 7, y.at(value) + 4, number(value), "tick", "end"))
    marks = x.ticks()
    for value in marks[::2] if len(marks) > 6 else marks:
        parts.append(
            line(x.at(value), height - bottom, x.at(value), height - bottom + 4, "axis")
        )
        parts.append(text(x.at(value), height - bottom + 20, number(value), "tick", "middle"))
    parts.append(line(left, height - bottom, width - right, height - bottom, "axis"))
    parts.append(
        text((left + width - right) / 2, height - 6, "training step", "label", "middle")
    )
    parts.append(text(4, 21, escape(f"{y_label} (log scale)" if log else y_label), "label"))
    dashed = len(series) > 1  # the baseline, drawn last: equal lines stay visible
    parts += [_path(s, x, y, dashed and s.run.number == 0) for s in reversed(series)]
    return svg(width, height, f"{label}. {_ends(series)}", parts, least=0, css="curve")


def _ends(series: Sequence[Series]) -> str:
    """The last value of each line, in words."""
    ends = ((s.run.name, *s.points[-1]) for s in series if s.points)
    return "At the end: " + ", ".join(f"{name} {y:.4g} at step {x:g}" for name, x, y in ends)


def _finite(series: Series, scale: float) -> Series:
    points, raw = (
        [(px, py * scale) for px, py in part if py is not None and math.isfinite(py)]
        for part in (series.points, series.raw)
    )
    return series._replace(points=points, raw=raw)


DOTS = 40  # points of a line up to which each is a dot, too


def _path(series: Series, x: Axis, y: Axis, dashed: bool) -> str:
    parts = []
    if len(series.raw) > 1:
        parts.append(_line_through(series.raw, x, y, "raw"))
    if len(series.points) > 1:
        css = "line dashed" if dashed else "line"
        parts.append(_line_through(series.points, x, y, css))
    if len(series.points) <= DOTS and not series.raw:
        parts += _dots(series, x, y)

    shapes = "".join(parts)
    return f'<g class="r{series.run.number}">{shapes}</g>'


def _line_through(points: Sequence[Point], x: Axis, y: Axis, css: str) -> str:
    places = [f"{x.at(px):.1f} {y.at(py):.1f}" for px, py in points]
    way = "L".join(places)
    return f'<path d="M{way}" class="{css}"/>'


def _dots(series: Series, x: Axis, y: Axis) -> list[str]:
    """A dot a point, which tells its value."""
    name = escape(series.run.name)
    dots = []
    for px, py in series.points:
        title = f"<title>{name}: {py:.4g} at step {px:g}</title>"
        dots.append(f'<circle cx="{x.at(px):.1f}" cy="{y.at(py):.1f}" r="3">{title}</circle>')

    return dots


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
    top = 26 + 5.2 * max(min(len(name), 18) for name in columns)
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
