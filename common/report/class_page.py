"""One page of what a data set's labels hold: how long its tail is, what is rare in which way, what occurs together."""

import math
from collections.abc import Sequence
from html import escape
from typing import Any, NamedTuple

import numpy as np

from common.report import html
from common.report.charts import heatmap, line, log_ticks, number, percent, rect, svg, text

TOGETHER = 14  # of the rarest classes that occur, in the table of what occurs together


def class_page(result: dict[str, Any], presence: np.ndarray) -> str:
    """A whole document. result: what scripts/class_stats.py describes; presence: bool (N, K), image shows class."""
    title = f"Classes of {result['dataset']}, {result['split']}"
    classes = result["classes"]
    absent = [item["name"] for item in classes if not item["images"]]
    notes = [
        *result["warnings"],
        *([f"Never labelled: {', '.join(absent)}."] if absent else []),
    ]
    parts = [
        f"<h1>{escape(title)}</h1><p class='soft'>{escape(result['root'])}</p>",
        _tiles(result, len(absent)),
        html.section("notes", "What to know before training", _list(notes)),
        html.section(
            "tail", "The tail", f"<div class='scroll'>{_bars(classes, result['images'])}</div>",
            "Of every class the share of labelled pixels (upper bar) and of the images that show it (lower bar), on a "
            "logarithmic axis.",
        ),
        html.section(
            "concentration", "How unequal", f"<div class='charts'>{_lorenz(classes, result['gini'])}</div>",
            "The rarest classes on the left: what part of all pixels, and of all appearances in images, they hold. "
            "The diagonal is equality; Gini is twice the area below it.",
        ),
        html.section(
            "together", "What occurs together", f"<div class='scroll'>{_together(classes, presence)}</div>",
            "Of the images that show the class on the left, the percentage with the one above, among rare classes. "
            "A sampler that looks for one of them shows the other, too.",
        ),
        html.section("table", "All figures", _table(classes)),
    ]  # fmt: skip
    return html.page(title, "".join(parts), 2)


def _tiles(result: dict[str, Any], absent: int) -> str:
    ignored = result["ignored_pixels"] / (result["ignored_pixels"] + result["labelled_pixels"])
    facts = {
        "images": f"{result['images']}",
        f"classes, {absent} of them never labelled"
        if absent
        else "classes": f"{len(result['classes'])}",
        "Gini of pixels": f"{result['gini']['pixel']:.3f}",
        "Gini of images": f"{result['gini']['image']:.3f}",
        "pixels without a class": percent(ignored),
    }
    tiles = [
        f"<div class='tile'><b>{value}</b><span>{name}</span></div>"
        for name, value in facts.items()
    ]
    return f"<div class='tiles'>{''.join(tiles)}</div>"


def _list(notes: Sequence[str]) -> str:
    return f"<ul>{''.join(f'<li>{escape(note)}</li>' for note in notes)}</ul>" if notes else ""


def _bars(classes: Sequence[dict[str, Any]], num_images: int) -> str:
    """Two bars a class: pixels above, images below."""
    ordered = sorted(classes, key=lambda item: -item["share"])
    shares = [item["share"] for item in ordered if item["share"]]
    left, right, top, pitch = 190, 900, 30, 26
    low = math.log10(min(shares)) - 0.3

    def at(share: float) -> float:
        return left + (right - left) * (math.log10(share) - low) / -low

    height = top + pitch * len(ordered)
    parts = []
    for tick in log_ticks(10**low, 1.0):
        parts.append(line(at(tick), top - 6, at(tick), height, "grid"))
        parts.append(text(at(tick), top - 12, percent(tick), "tick", "middle"))

    for i, item in enumerate(ordered):
        y = top + pitch * i
        mark = '<tspan class="tailmark" dx="5">tail</tspan>' if item["tail"] else ""
        parts.append(text(left - 10, y + 16, f"{escape(item['name'])}{mark}", "name", "end"))
        images = item["images"] / num_images
        for run, (share, unit) in enumerate(((item["share"], "pixels"), (images, "images"))):
            if share:
                title = f"{item['name']}: {percent(share)} of the {unit}"
                bar = rect(left, y + 3 + 10 * run, max(at(share) - left, 1.5), 9, "bar", title)
                parts.append(f'<g class="r{run}">{bar}</g>')

    return svg(
        right + 20,
        height + 6,
        "Share of pixels (upper bar) and images (lower bar) of every class",
        parts,
    )


class _Square(NamedTuple):
    """A square of a drawing whose sides are shares from 0 to 1."""

    left: float
    right: float
    top: float
    bottom: float

    def x(self, share: float) -> float:
        return self.left + share * (self.right - self.left)

    def y(self, share: float) -> float:
        return self.bottom - share * (self.bottom - self.top)


def _lorenz(classes: Sequence[dict[str, Any]], gini: dict[str, float]) -> str:
    """The Lorenz curves of pixels and images."""
    square = _Square(left=46, right=400, top=12, bottom=300)
    parts = _lorenz_axes(square)

    for run, unit in enumerate(("pixel", "image")):
        counted = f"{unit}s"
        counts = [item[counted] for item in classes]
        parts.append(_lorenz_curve(square, counts, run))

        colour = f"var(--c{html.run_colour(run)})"
        mark = f'<tspan style="fill:{colour}">■</tspan>'
        height = square.top + 22 + 20 * run
        parts.append(text(square.left + 14, height, f"{mark} {counted}, Gini {gini[unit]:.3f}"))

    return svg(
        square.right + 30, square.bottom + 26, "Lorenz curves of pixels and images", parts
    )


def _lorenz_axes(square: _Square) -> list[str]:
    """The frame, the diagonal of equality, and the shares along both sides."""
    width = square.right - square.left
    height = square.bottom - square.top
    frame = f'<rect x="{square.left}" y="{square.top}" width="{width}" height="{height}" fill="none" class="grid"/>'
    diagonal = line(square.x(0), square.y(0), square.x(1), square.y(1), "axis")
    parts = [frame, diagonal]

    for share in (0, 0.5, 1):
        parts.append(
            text(square.x(share), square.bottom + 18, percent(share), "tick", "middle")
        )
        parts.append(text(square.left - 6, square.y(share) + 4, percent(share), "tick", "end"))

    return parts


def _lorenz_curve(square: _Square, counts: Sequence[int], run: int) -> str:
    """What the rarest classes hold together, over the share of classes, in the colour of `run`."""
    ascending = np.sort(counts)
    held = ascending.cumsum() / ascending.sum()
    heights = [0, *held]
    shares = np.linspace(0, 1, len(heights))

    corners = zip(shares, heights, strict=True)
    points = (f"{square.x(x):.1f},{square.y(y):.1f}" for x, y in corners)
    style = 'fill="none" style="stroke:var(--run)" stroke-width="2"'
    return f'<polyline class="r{run}" points="{" ".join(points)}" {style}/>'


def _together(classes: Sequence[dict[str, Any]], presence: np.ndarray) -> str:
    """Among the rarest classes: the share of the images of one (row) that show another (column)."""
    found = [item for item in classes if item["images"]]
    rarest = sorted(found, key=lambda item: item["pixels"])[:TOGETHER]
    rarest.sort(key=lambda item: item["id"])

    ids = [item["id"] for item in rarest]
    shown = presence[:, ids].astype(np.float64)
    both = shown.T @ shown
    images = shown.sum(0)
    shares = both / images[:, None]

    names = [item["name"] for item in rarest]
    title = "Classes that occur in the same images"
    return heatmap(title, names, names, shares.tolist(), "of {row}, {column}")


def _table(classes: Sequence[dict[str, Any]]) -> str:
    """All figures of every class."""
    levels = list(classes[0]["groups"])
    titles = [f"{level} level" for level in levels]
    head = html.header(["class", "images", "pixels", "share", *titles, "BLV weight"])
    return html.table(head, [_table_row(item, levels) for item in classes])


def _table_row(item: dict[str, Any], levels: Sequence[str]) -> list[str]:
    mark = " <span class='mark'>tail</span>" if item["tail"] else ""
    groups = [escape(str(item["groups"][level])) for level in levels]

    return [
        f"{escape(item['name'])}{mark}",
        f"{item['images']}",
        number(item["pixels"]),
        percent(item["share"]),
        *groups,
        f"{item['blv_weight']:.3f}",
    ]
