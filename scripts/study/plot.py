"""The trade-off of scripts/evidence.py as a picture: what each remedy does to head and tail, beside what is free.

A point is a remedy's mean change of mIoU(head) (across) and mIoU(tail) (up) against the baseline of the same seeds; its
cross is the 95 % interval of each. A line joins the strengths of what is changed after training, from the remedy whose
networks it changes on: a remedy that trains has to lie above the lines that begin at the baseline.
"""

from collections.abc import Iterable, Mapping, Sequence
from html import escape

from common.comparison import Difference
from common.report.charts import ticks
from scripts.study.numbers import Change

WIDTH, HEIGHT = 760, 440
LEFT, RIGHT, TOP, BOTTOM = 64, 500, 20, 390  # of the field; the legend is right of it
COLOURS = (
    "#2470c8", "#c85a08", "#0f8a66", "#8a4fc4", "#c22f7d", "#7a6a00", "#008a9a", "#a02020", "#4a5a2a", "#555577",
    "#e0a000", "#1b2027", "#6cb33f", "#e58ac0",
)  # fmt: skip
STYLE = "text{font:13px system-ui,sans-serif;fill:#1b2027}.soft{fill:#5b6572}.grid{stroke:#e6e9ed}.zero{stroke:#9aa5b3}"


def plot(remedies: Mapping[str, Change], curves: Mapping[str, Sequence[Change]], of: Mapping[str, str]) -> str:
    """SVG. curves: of each change after training its strengths in order; of: the remedy whose networks it changes."""
    curves = {name: curve for name, curve in curves.items() if curve}
    bare = [change for curve in curves.values() for change in curve]  # drawn without intervals
    across = Axis(_reach([change[0] for change in remedies.values()], [change[0] for change in bare]), LEFT, RIGHT)
    up = Axis(_reach([change[1] for change in remedies.values()], [change[1] for change in bare]), BOTTOM, TOP)

    parts = [*_grid(across, up)]
    names = [*curves, *remedies]
    colours = {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(names)}
    origin = (Difference(0.0, 1), Difference(0.0, 1))  # the baseline
    for name, curve in curves.items():
        parts += _curve([remedies.get(of[name], origin), *curve], across, up, colours[name])
    for name, change in remedies.items():
        parts += _point(change, across, up, colours[name])
    for i, name in enumerate(names):
        parts += _entry(TOP + 16 + 22 * i, name, colours[name], name in curves)

    return _picture("by remedy", parts)


def plot_strengths(curves: Mapping[str, Mapping[str, tuple[float, float]]]) -> str:
    """SVG. curves: remedy → strength → its change of mIoU(head) and of mIoU(tail), in points. A line joins the
    strengths of a remedy, which have the numbers of the legend; a dashed one those that no other beats in both."""
    places = [change for curve in curves.values() for change in curve.values()]
    across = Axis([0.0, *(head for head, _ in places)], LEFT, RIGHT)
    up = Axis([0.0, *(tail for _, tail in places)], BOTTOM, TOP)

    best = " ".join(f"{across(head):.1f},{up(tail):.1f}" for head, tail in front(places))
    dashes = 'stroke="#9aa5b3" stroke-width="6" stroke-opacity="0.5" stroke-dasharray="9 5"'
    parts = [*_grid(across, up), f'<polyline points="{best}" fill="none" {dashes}/>']
    y = TOP + 16
    for i, (name, curve) in enumerate(curves.items()):
        colour = COLOURS[i % len(COLOURS)]
        parts += _numbered([(across(head), up(tail)) for head, tail in curve.values()], colour)
        parts += _entry(y, name, colour, is_curve=True)
        for number, strength in enumerate(curve, 1):
            y += 16
            parts.append(f'<text x="{RIGHT + 40}" y="{y + 4.5}" class="soft">{number}  {escape(strength)}</text>')
        y += 26

    return _picture("by strength", parts, max(HEIGHT, y))


def _numbered(spots: Sequence[tuple[float, float]], colour: str) -> list[str]:
    """A line through dots, which are numbered from 1."""
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in spots)
    parts = [f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.5"/>']
    for number, (x, y) in enumerate(spots, 1):
        parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" fill="{colour}"/>')
        parts.append(f'<text x="{x + 6:.1f}" y="{y - 5:.1f}" style="font-size:11px;fill:{colour}">{number}</text>')

    return parts


def front(places: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    """The Pareto front: the places that no other is above in one direction and at least equal to in the other."""
    found: list[tuple[float, float]] = []
    for place in sorted(set(places), reverse=True):
        if not found or place[1] > found[-1][1]:
            found.append(place)
    return found


def _picture(what: str, parts: Iterable[str], height: float = HEIGHT) -> str:
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img">'
    title = f"<title>Change of mIoU(tail) against change of mIoU(head), {what}</title>"
    paper = f'<rect width="{WIDTH}" height="{height}" fill="#ffffff"/>'
    return "\n".join([head, title, f"<style>{STYLE}</style>", paper, *parts, "</svg>", ""])


def _reach(crossed: Iterable[Difference], bare: Iterable[Difference]) -> list[float]:
    """What has to be in sight, in points: 0, the intervals of some differences, the means of others."""
    ends = [0.0, *(100 * difference.mean for difference in bare)]
    for difference in crossed:
        half = difference.half_width or 0.0
        ends += [100 * (difference.mean - half), 100 * (difference.mean + half)]

    return ends


class Axis:
    """Points of mIoU to pixels."""

    def __init__(self, ends: Sequence[float], start: float, end: float):
        margin = 0.06 * (max(ends) - min(ends)) + 0.1
        self.low, self.high = min(ends) - margin, max(ends) + margin
        self.start, self.end = start, end

    def __call__(self, points: float) -> float:
        share = (points - self.low) / (self.high - self.low)
        return self.start + share * (self.end - self.start)

    @property
    def marks(self) -> list[float]:
        return ticks(self.low, self.high)


def _grid(across: Axis, up: Axis) -> list[str]:
    parts = []
    for mark in across.marks:
        x = across(mark)
        parts.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{BOTTOM}" class="{_line(mark)}"/>')
        parts.append(f'<text x="{x:.1f}" y="{BOTTOM + 18}" text-anchor="middle" class="soft">{_signed(mark)}</text>')
    for mark in up.marks:
        y = up(mark)
        parts.append(f'<line x1="{LEFT}" x2="{RIGHT}" y1="{y:.1f}" y2="{y:.1f}" class="{_line(mark)}"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end" class="soft">{_signed(mark)}</text>')

    middle = (TOP + BOTTOM) / 2
    centre = (LEFT + RIGHT) / 2
    parts.append(f'<text x="{centre}" y="{BOTTOM + 40}" text-anchor="middle">change of mIoU(head), points</text>')
    turned = f'transform="rotate(-90 18 {middle})"'
    parts.append(f'<text x="18" y="{middle}" text-anchor="middle" {turned}>change of mIoU(tail), points</text>')
    return parts


def _signed(mark: float) -> str:
    return f"{mark:+g}" if mark else "0"


def _line(mark: float) -> str:
    return "zero" if mark == 0 else "grid"


def _curve(curve: Sequence[Change], across: Axis, up: Axis, colour: str) -> list[str]:
    """curve: what is changed itself, which is strength 0, and the strengths."""
    places = [(across(100 * head.mean), up(100 * tail.mean)) for head, tail in curve]
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
    dots = [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>' for x, y in places[1:]]
    return [f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.5"/>', *dots]


def _point(change: Change, across: Axis, up: Axis, colour: str) -> list[str]:
    head, tail = change
    x, y = across(100 * head.mean), up(100 * tail.mean)
    parts = [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="5.5" fill="{colour}"/>']
    if head.interval is not None and tail.interval is not None:
        left, right = (across(100 * value) for value in head.interval)
        low, high = (up(100 * value) for value in tail.interval)
        line = f'stroke="{colour}" stroke-width="1.5" stroke-opacity="0.6"'
        parts.append(f'<line x1="{left:.1f}" x2="{right:.1f}" y1="{y:.1f}" y2="{y:.1f}" {line}/>')
        parts.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{low:.1f}" y2="{high:.1f}" {line}/>')
    return parts


def _entry(y: int, name: str, colour: str, is_curve: bool) -> list[str]:
    """A line of the legend."""
    x = RIGHT + 24
    if is_curve:
        mark = f'<line x1="{x - 6}" x2="{x + 8}" y1="{y}" y2="{y}" stroke="{colour}" stroke-width="2"/>'
    else:
        mark = f'<circle cx="{x}" cy="{y}" r="5.5" fill="{colour}"/>'
    return [mark, f'<text x="{x + 16}" y="{y + 4.5}">{escape(name)}</text>']
