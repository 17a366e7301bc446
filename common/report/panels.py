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
NARROW, MANY_RUNS = 300, 3  # the width beside more runs than so many
BUDGET = 1_300_000  # characters that all images may take in the page
_COUNTED = ("cores", "threads")
NAMING = ("name", "output")  # settings that only say where a run lies
NAMED = 6  # settings of a run that are told before the rest is counted
CHIPS = 24  # classes named below the images


class _Panel:
    """One evaluated image at the size it is shown, with every run's prediction."""

    def __init__(self, key: str, files: Sequence[Mapping[str, Path]], width: int):
        parts = [part for part in files if {"image", "truth"} <= part.keys()]
        self.key = key

        with Image.open(parts[0]["image"]) as opened:
            image = opened.convert("RGB")

        self.size = (
            min(width, image.width),
            max(1, round(image.height * min(width, image.width) / image.width)),
        )
        # a gap of 2 first averages whole pixels: half the time, no difference to be seen
        self.image = np.asarray(
            image.resize(self.size, Image.Resampling.LANCZOS, reducing_gap=2.0)
        )
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
    width = WIDTH if len(shown) <= MANY_RUNS else NARROW
    area = np.zeros(len(palette), np.int64)
    parts: list[str] = []

    for key in complete[:MOST]:
        panel = _Panel(key, [report.runs[i].panels.get(key, {}) for i in shown], width)
        made = _panel(report, shown, panel, palette, tail)
        if parts and sum(map(len, parts)) + len(made) > BUDGET:
            break

        parts.append(made)
        labels = [panel.truth, *(p for p in panel.predictions if p is not None)]
        area += sum(np.bincount(label[label >= 0], minlength=len(palette)) for label in labels)

    hint = "A click enlarges an image. Under each error map: the share of its labelled pixels that are right."
    if any(len(group.runs) > 1 for group in report.groups):
        hint += " Of several seeds the first is shown."
    if len(parts) < min(len(complete), MOST):
        hint += f" {len(parts)} of {len(complete)} images, to keep this file small."

    return section(
        "images", "Images", "".join(parts) + _legend(per_class, area, bool(tail)), hint
    )


def _panel(
    report: Any,
    shown: Sequence[int],
    panel: _Panel,
    palette: Sequence[Sequence[int]],
    tail: Sequence[int],
) -> str:
    """One image: itself with the truth, and a pair of prediction and errors for each run."""
    truth = colourise(panel.truth, palette)
    pairs = [
        _pair(
            "",
            "image and truth" if report.compared else "",
            _figure(panel.image, f"image {panel.key}", "image", photo=True),
            _figure(truth, f"truth of image {panel.key}", "truth"),
        )
    ]

    for i, pred, right in zip(shown, panel.predictions, panel.right, strict=True):
        title = f"{swatch(i)} {escape(report.names[i])}" if report.compared else ""
        if pred is None:
            pairs.append(_pair(f"r{i}", title, "<p>no prediction</p>"))
            continue

        of_run = f", {report.names[i]}" if report.compared else ""
        said = "errors" if right is None else f"errors; {100 * right:.1f} % right"
        errors = error_map(panel.image, panel.truth, pred, tail)
        coloured = colourise(pred, palette)
        pairs.append(
            _pair(
                f"r{i}",
                title,
                _figure(coloured, f"prediction for image {panel.key}{of_run}", "prediction"),
                _figure(errors, f"errors in image {panel.key}{of_run}", said, photo=True),
            )
        )

    heading = f'<h3 style="margin-top:14px">image {escape(panel.key)}</h3>'
    return f'{heading}<div class="panels">{"".join(pairs)}</div>'


def _pair(css: str, title: str, *figures: str) -> str:
    heading = f"<h4>{title}</h4>" if title else ""
    return f'<div class="pair {css}">{heading}{"".join(figures)}</div>'


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

    shown = f'<img src="data:image/{kind};base64,{data}" alt="{escape(alt)}">'
    return f'<figure><button type="button">{shown}</button>{note}</figure>'


def _legend(per_class: Sequence[Mapping[str, Any]], area: np.ndarray, tail: bool) -> str:
    shown = [int(k) for k in np.argsort(-area) if area[k]]
    chips = []
    for k in shown[:CHIPS]:
        item = per_class[k]
        chips.append(chip(item["color"], item["name"]))

    chips.append(chip(IGNORED, "no label"))
    smaller = len(shown) - CHIPS
    if smaller > 0:
        chips.append(f"<span>and {smaller} smaller classes</span>")

    if tail:
        errors = [
            chip(WRONG, "error, other class"),
            chip(WRONG_TAIL, "error on a pixel of a tail class"),
        ]
    else:
        errors = [chip(WRONG, "error")]

    return _row_of("Classes", chips) + _row_of("Error maps", errors)


def _row_of(name: str, chips: Sequence[str]) -> str:
    items = "".join(chips)
    return f'<div class="chips"><b>{name}</b>{items}</div>'


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
    if not whole:
        return ""
    if not report.compared:
        return section("configuration", "Configuration", whole, "The whole resolved config.")

    keys = dict.fromkeys(key for settings in flat for key in settings)
    differing = [key for key in keys if len({settings.get(key, "–") for settings in flat}) > 1]
    rows = [
        [
            f"<code>{escape(key)}</code>",
            *(f'<td class="wrap">{escape(s.get(key, "–"))}</td>' for s in flat),
        ]
        for key in differing
    ]
    body = _changed(report.names, flat)
    body += details(
        "Table: every setting that differs",
        table(header(["setting", *report.names], "left"), rows),
    )

    return section("configuration", "Configuration", body + whole)


def _setting(key: str, settings: Mapping[str, str], base: Mapping[str, str]) -> str:
    """A setting of a run beside that of the baseline."""
    value = escape(settings.get(key, "–"))
    other = escape(base.get(key, "–"))
    return f"<code>{escape(key)}</code> {value} (not {other})"


def _changed(names: Sequence[str], flat: Sequence[Mapping[str, str]]) -> str:
    """In a line for each run, what it sets otherwise than the baseline."""
    base, *others = flat
    items = []

    for i, settings in enumerate(others, start=1):
        name = escape(names[i])
        text = _differing(settings, base)
        items.append(f'<li class="r{i}">{swatch(i)} <b>{name}</b>: {text}</li>')

    first = escape(names[0])
    listed = "".join(items)
    return f'<p>Against {first}:</p><ul class="words">{listed}</ul>'


def _differing(settings: Mapping[str, str], base: Mapping[str, str]) -> str:
    """The first settings that are not the baseline's, and how many more there are."""
    keys = [
        key
        for key in {**base, **settings}
        if key not in NAMING and base.get(key) != settings.get(key)
    ]
    if not keys:
        return "no other setting"

    said = ", ".join(_setting(key, settings, base) for key in keys[:NAMED])
    more = len(keys) - NAMED
    return f"{said} and {more} more" if more > 0 else said


def flatten(tree: Any, prefix: str = "") -> dict[str, str]:
    """Dotted keys of a nested mapping; other values as text."""
    if not isinstance(tree, Mapping):
        return {prefix: str(tree)}

    flat: dict[str, str] = {}

    for key, value in tree.items():
        flat |= flatten(value, f"{prefix}.{key}" if prefix else str(key))

    return flat
