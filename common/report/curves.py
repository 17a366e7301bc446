"""The curves of a report: losses, learning rates and validation scores over the steps."""

import math
from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

import numpy as np

from common.report.charts import Run, Series, line_chart
from common.report.html import details, section


def curves(report: Any) -> str:
    """Loss, learning rate and validation over the training steps."""
    conventions = {
        line.get("convention")
        for run in report.runs
        for line in run.log
        if line.get("kind") == "eval"
    }
    named = ", ".join(sorted(c for c in conventions if c)) or report.convention
    charts = [
        ("Training loss", _chart(report, "train", "loss", "loss", log=True)),
        (
            "Validation mIoU",
            _chart(report, "eval", "miou", f"mIoU in percent ({named})", scale=100),
        ),
        (
            "Validation mIoU(tail)",
            _chart(report, "eval", "miou_tail", f"mIoU(tail) in percent ({named})", scale=100),
        ),
        ("Learning rate", _chart(report, "train", "lr", "learning rate")),
    ]
    known = {"kind", "step", "loss", "lr", "data_seconds", "memory_gib", "minutes"}
    keys = dict.fromkeys(
        k
        for run in report.runs
        for line in run.log
        if line.get("kind") == "train"
        for k in line
    )
    others = [
        (key, _chart(report, "train", key, key, log=True)) for key in keys if key not in known
    ]

    return section(
        "training",
        "Training",
        _grid(charts) + details("Other logged values", _grid(others)),
        "Thin: logged values. Thick: their running mean. Of several seeds their mean, as far as all have come."
        if _grid(charts)
        else "",
    )


def _grid(charts: Iterable[tuple[str, str]]) -> str:
    cells = "".join(
        f"<div><h3>{escape(title)}</h3>{chart}</div>" for title, chart in charts if chart
    )
    return f'<div class="charts">{cells}</div>' if cells else ""


def _chart(
    report: Any, kind: str, key: str, y_label: str, log: bool = False, scale: float = 1.0
) -> str:
    series = []
    for i, (run, run_name) in enumerate(zip(report.runs, report.names, strict=True)):
        if kind == "eval" and i in report.differing:
            continue

        lines = [
            line
            for line in run.log
            if line.get("kind") == kind and isinstance(line.get(key), int | float)
        ]
        values = [
            (line["step"], float(line[key])) for line in lines if math.isfinite(line[key])
        ]
        noisy = kind == "train" and key != "lr" and len(values) > 30
        smooth = running_mean(values, max(len(values) // 25, 3)) if noisy else values
        most = max(80, 1200 // len(report.runs))
        raw = _thinned(values, most) if noisy else ()
        series.append(Series(Run(i, run_name), _thinned(smooth, min(most, 400)), raw))

    return line_chart(
        f"{key} over training steps", series, y_label=y_label, log=log, scale=scale
    )


def running_mean(
    values: Sequence[tuple[float, float]], window: int
) -> list[tuple[float, float]]:
    """The mean over the `window` values around every step (over fewer at the ends)."""
    total = np.concatenate([[0.0], np.cumsum([y for _, y in values])])
    middle = np.arange(len(values))
    starts = np.maximum(middle - window // 2, 0)
    ends = np.minimum(middle + window // 2 + 1, len(values))
    means = (total[ends] - total[starts]) / (ends - starts)

    return [(x, float(y)) for (x, _), y in zip(values, means, strict=True)]


def _thinned(values: Sequence[tuple[float, float]], most: int) -> list[tuple[float, float]]:
    step = -(-len(values) // most) or 1
    return [*values[::step], *(values[-1:] if (len(values) - 1) % step else [])]
