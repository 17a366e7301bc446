"""What a report shows beside its scores: images with predictions and errors, how the runs were made, their configs."""

import base64
import io
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from common.data import IGNORE
from common.report.html import chip, details, header, section, swatch, table
from common.visualize import IGNORED, WRONG, WRONG_TAIL, colourise, error_map

MOST, WIDTH = 8, 560  # images shown, and their width in pixels
_COUNTED = ("cores", "threads")
CHIPS = 24  # classes named below the images


class _Panel:
    """One evaluated image at the size it is shown, with every run's prediction."""

    def __init__(self, key: str, files: Sequence[Mapping[str, Path]]):
        parts = [part for part in files if {"image", "truth"} <= part.keys()]
        self.key = key

        with Image.open(parts[0]["image"]) as opened:
            image = opened.convert("RGB")

        self.size = (
            min(WIDTH, image.width),
            max(1, round(image.height * min(WIDTH, image.width) / image.width)),
        )
        # a gap of 2 first averages whole pixels: half the time, no difference to be seen
        self.image = np.asarray(image.resize(self.size, Image.Resampling.LANCZOS, reducing_gap=2.0))
        truth = read_label(parts[0]["truth"])
        self.truth = self._small(truth)
        self.predictions: list[np.ndarray | None] = []
        self.right: list[float | None] = []

        for part in files:
            pred = read_label(part["prediction"]) if "prediction" in part else None
            usable = pred is not None and pred.shape == truth.shape
            self.predictions.append(self._small(pred) if usable else None)
            known = truth != IGNORE
            self.right.append(
                float((pred == truth)[known].mean()) if usable and known.any() else None
            )

    def _small(self, label: np.ndarray) -> np.ndarray:
        return np.asarray(Image.fromarray(label).resize(self.size, Image.Resampling.NEAREST))


def read_label(path: Path) -> np.ndarray:
    """Class ids int32 (H, W) of a label panel, IGNORE where its value is the highest of its depth."""
    with Image.open(path) as opened:
        raw = np.array(opened)

    if raw.ndim != 2:
        raise ValueError(
            f"{path}: expected a palette or grey PNG of class ids, got {raw.shape[-1]} channels"
        )

    highest = 255 if raw.dtype == np.uint8 else 65535
    return np.where(raw == highest, IGNORE, raw.astype(np.int32)).astype(np.int32)


def panels(report: Any) -> str:
    """Image, truth, and every run's prediction and errors, side by side."""
    if not report.scored:
        return ""

    shown = [i for i, run in enumerate(report.runs) if run.panels and i in report.scored]
    keys = dict.fromkeys(key for i in shown for key in report.runs[i].panels)
    complete = [
        k
        for k in keys
        if any({"image", "truth"} <= report.runs[i].panels.get(k, {}).keys() for i in shown)
    ]
    if not complete:
        return ""

    per_class = report.results[report.scored[0]]["per_class"]
    palette = [item["color"] for item in per_class]
    tail = [item["id"] for item in per_class if item["tail"]]
    cells = ["<div></div><div></div>"] if report.compared else []
    if report.compared:
        cells += [
            f'<div class="head run">{swatch(i)} {escape(report.names[i])}</div>' for i in shown
        ]

    cells += [
        f'<div class="head">{part}</div>'
        for part in ("image", "truth", *("prediction", "errors") * len(shown))
    ]
    area = np.zeros(len(palette), np.int64)

    for key in complete[:MOST]:
        panel = _Panel(key, [report.runs[i].panels.get(key, {}) for i in shown])
        cells += _panel_row(panel, palette, tail)
        labels = [panel.truth, *(p for p in panel.predictions if p is not None)]
        area += sum(np.bincount(label[label >= 0], minlength=len(palette)) for label in labels)

    columns = f'style="grid-template-columns:repeat({2 + 2 * len(shown)},minmax(0,1fr))"'
    grid = f'<div class="scroll"><div class="panels" {columns}>{"".join(cells)}</div></div>'
    hint = "A click enlarges an image. Under each error map: the share of its labelled pixels that are right."

    return section("images", "Images", grid + _legend(per_class, area, bool(tail)), hint)


def _panel_row(
    panel: _Panel, palette: Sequence[Sequence[int]], tail: Sequence[int]
) -> list[str]:
    truth = colourise(panel.truth, palette)
    row = [f'<div class="caption">image {escape(panel.key)}</div>']
    row += [
        _figure(panel.image, f"image {panel.key}", photo=True),
        _figure(truth, f"truth of image {panel.key}"),
    ]

    for pred, right in zip(panel.predictions, panel.right, strict=True):
        if pred is None:
            row += [
                '<div class="caption" style="grid-column:auto">no prediction</div>',
                "<div></div>",
            ]
            continue

        row.append(_figure(colourise(pred, palette), f"prediction for image {panel.key}"))
        caption = "" if right is None else f"{100 * right:.1f} % right"
        errors = error_map(panel.image, panel.truth, pred, tail)
        row.append(_figure(errors, f"errors in image {panel.key}", caption, photo=True))

    return row


def _figure(picture: np.ndarray, alt: str, caption: str = "", photo: bool = False) -> str:
    """A picture as a data URI: JPEG for photographs, palette PNG for flat colours."""
    buffer = io.BytesIO()
    image = Image.fromarray(picture)
    if photo:
        image.save(buffer, "JPEG", quality=82, subsampling=0)
    else:
        image.quantize(256, dither=Image.Dither.NONE).save(buffer, "PNG", optimize=True)

    kind = "jpeg" if photo else "png"
    data = base64.b64encode(buffer.getvalue()).decode()
    note = f"<figcaption>{escape(caption)}</figcaption>" if caption else ""

    return f'<figure><img src="data:image/{kind};base64,{data}" alt="{escape(alt)}">{note}</figure>'


def _legend(per_class: Sequence[Mapping[str, Any]], area: np.ndarray, tail: bool) -> str:
    order = [int(k) for k in np.argsort(-area) if area[k]]
    chips = [chip(per_class[k]["color"], per_class[k]["name"]) for k in order[:CHIPS]]
    chips.append(chip(IGNORED, "no label"))
    if len(order) > CHIPS:
        chips.append(f"<span>and {len(order) - CHIPS} smaller classes</span>")

    errors = [chip(WRONG, "error" if not tail else "error, other class")]
    errors += [chip(WRONG_TAIL, "error on a pixel of a tail class")] if tail else []
    rows = (("Classes", chips), ("Error maps", errors))

    return "".join(
        f'<div class="chips"><b>{name}</b>{"".join(items)}</div>' for name, items in rows
    )


def making(report: Any) -> str:
    """How every run was made."""
    columns = [_record(run) for run in report.runs]
    keys = list(dict.fromkeys(key for column in columns for key in column))
    if not keys:
        return ""

    rows = [
        [
            escape(key),
            *(f'<td class="wrap">{escape(column.get(key, "–"))}</td>' for column in columns),
        ]
        for key in keys
    ]
    head = "<tr><th></th>" + "".join(
        f'<th style="text-align:left">{swatch(i)} {escape(name)}</th>'
        for i, name in enumerate(report.names)
    )

    return section("making", "How the runs were made", table(head + "</tr>", rows))


def _record(run: Any) -> dict[str, str]:
    """The facts of run.json, and how far the log goes."""
    record = run.record
    machine = run.record.get("machine")
    facts = {key: record.get(key) for key in ("command", "commit", "seed", "started")}
    if record.get("minutes") is not None:
        facts["training time"] = f"{record['minutes']:.1f} min"

    if run.evaluation and "ms_per_image" in run.evaluation:
        facts["evaluation"] = (
            f"{run.evaluation['images']:,} images, {run.evaluation['ms_per_image']:.0f} ms each"
        )

    steps = [line["step"] for line in run.log if "step" in line]
    facts["steps"] = f"{max(steps):,}" if steps else None

    for title, value in (("machine", machine), ("versions", record.get("versions"))):
        if isinstance(value, Mapping):
            value = ", ".join(
                _fact(key, item) for key, item in value.items() if item is not None
            )
        facts[title] = value

    return {key: str(value) for key, value in facts.items() if value is not None}


def _fact(key: str, value: Any) -> str:
    return (
        str(value)
        if key in ("processor", "gpu")
        else f"{value} {key}"
        if key in _COUNTED
        else f"{key} {value}"
    )


def configs(report: Any) -> str:
    """The settings that differ, and every resolved config, collapsed."""
    flat = [flatten(run.tree) for run in report.runs]
    whole = "".join(
        details(f"{name}/config.yaml", f"<pre>{escape(run.config)}</pre>")
        for name, run in zip(report.names, report.runs, strict=True)
        if run.config
    )
    keys = dict.fromkeys(key for settings in flat for key in settings)
    differing = [key for key in keys if len({settings.get(key, "–") for settings in flat}) > 1]
    rows = [
        [
            f"<code>{escape(key)}</code>",
            *(f'<td class="wrap">{escape(s.get(key, "–"))}</td>' for s in flat),
        ]
        for key in differing
    ]
    body = (
        table(header(["setting", *report.names], "left"), rows)
        if rows and report.compared
        else ""
    )
    hint = (
        "Settings that differ; the whole resolved configs below."
        if body
        else "The whole resolved config."
    )

    return section("configuration", "Configuration", body + whole if whole else "", hint)


def flatten(tree: Any, prefix: str = "") -> dict[str, str]:
    """Dotted keys of a nested mapping; other values as text."""
    if not isinstance(tree, Mapping):
        return {prefix: str(tree)}

    flat: dict[str, str] = {}

    for key, value in tree.items():
        flat |= flatten(value, f"{prefix}.{key}" if prefix else str(key))

    return flat
