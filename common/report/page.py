"""One self-contained HTML file about a run, or about several compared with a baseline.

A run's folder holds `config.yaml`, `run.json` (command, commit, machine, seed, started, minutes), `log.jsonl` (lines of
kind `train` and `eval`), `evaluation.json` (what `evaluate` returns), `panels/<image>_{image,truth,prediction}.png`
and, if it likes, `statistics.json` (class_pixels, class_images, num_images of the training set). What is missing is
left out of the report and named at its top.
"""

import json
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from html import escape
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import yaml

from common.evaluation import summarise
from common.report.html import page
from common.report.panels import configs, making, panels
from common.report.sections import classes, confusion, curves, headline, notes, run_bar, summary

SECTIONS = {
    "Scores": summary,
    "Training": curves,
    "Classes": classes,
    "Confusion": confusion,
    "Images": panels,
    "Making": making,
    "Configuration": configs,
}
PARTS = ("config.yaml", "run.json", "log.jsonl", "evaluation.json")


@dataclass(frozen=True)
class RunFolder:
    """What a run left behind; absent files are None or empty."""

    path: Path
    name: str
    config: str | None  # the text of config.yaml
    record: dict[str, Any]
    log: list[dict[str, Any]]
    evaluation: dict[str, Any] | None
    statistics: dict[str, Any] | None
    panels: dict[str, dict[str, Path]]  # image -> part (image, truth, prediction) -> file
    missing: tuple[str, ...]

    @classmethod
    def load(cls, path: str | Path) -> "RunFolder":
        """Read a run's folder. ValueError where it is none, or a file in it is damaged."""
        path = Path(path)
        if not path.is_dir():
            raise ValueError(f"{path}: no such run folder")
        missing = [name for name in PARTS if not (path / name).is_file()]
        if len(missing) == len(PARTS):
            raise ValueError(f"{path}: not a run folder, it has none of {', '.join(PARTS)}")
        panels: dict[str, dict[str, Path]] = {}
        for file in sorted((path / "panels").glob("*_*.png")):
            image, _, part = file.stem.rpartition("_")
            panels.setdefault(image, {})[part] = file
        config = path / "config.yaml"
        return cls(
            path=path,
            name=path.resolve().name,
            config=config.read_text() if config.is_file() else None,
            record=_read_json(path / "run.json") or {},
            log=_read_log(path / "log.jsonl"),
            evaluation=_read_json(path / "evaluation.json"),
            statistics=_read_json(path / "statistics.json"),
            panels=panels,
            missing=(*missing, *(() if panels else ("panels",))),
        )

    @cached_property
    def tree(self) -> dict[str, Any]:
        """The resolved config."""
        try:
            return yaml.safe_load(self.config or "") or {}
        except yaml.YAMLError as error:
            raise ValueError(f"{self.path / 'config.yaml'}: not valid YAML ({' '.join(str(error).split())})") from error

    def last(self, key: str) -> float | None:
        """The newest logged validation value."""
        values = [line[key] for line in self.log if line.get("kind") == "eval" and line.get(key) is not None]
        return values[-1] if values else None


def _read_json(path: Path) -> Any:
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON ({error}); delete it or write it again") from error


def _read_log(path: Path) -> list[dict[str, Any]]:
    """The lines of a log; the last one of a killed run may be cut off."""
    lines = path.read_text().splitlines() if path.is_file() else []
    result = []
    for i, line in enumerate(lines):
        try:
            result.append(json.loads(line))
        except ValueError as error:
            if i < len(lines) - 1:
                raise ValueError(f"{path}: line {i + 1} is not valid JSON") from error
    return result


class Report:
    """The runs of one report, the baseline first, all scored by the baseline's convention."""

    def __init__(self, runs: Sequence[RunFolder], baseline: int):
        order = [baseline, *(i for i in range(len(runs)) if i != baseline)]
        self.runs = [runs[i] for i in order]
        names = [run.name for run in self.runs]
        self.names = [n if names.count(n) == 1 else str(run.path) for n, run in zip(names, self.runs, strict=True)]
        scored = [run.evaluation for run in self.runs if run.evaluation]
        self.convention: str = scored[0]["convention"] if scored else self._logged_convention()
        self.notes: list[str] = []
        self.results = [self._result(run, name) for run, name in zip(self.runs, self.names, strict=True)]
        self._check_classes()
        self.shares, self.share_label = self._shares()

    @property
    def compared(self) -> bool:
        return len(self.runs) > 1

    @property
    def scored(self) -> list[int]:
        """The runs that have an evaluation."""
        return [i for i, result in enumerate(self.results) if result]

    def _logged_convention(self) -> str:
        named = [line["convention"] for run in self.runs for line in run.log if line.get("convention")]
        configured = [run.tree.get("eval", {}).get("convention") for run in self.runs]
        return next((c for c in (*named, *configured) if c), "not recorded")

    def _result(self, run: RunFolder, name: str) -> dict[str, Any] | None:
        """The run's evaluation under the report's convention."""
        if run.missing:
            self.notes.append(f"{name} has no {', '.join(run.missing)}.")
        result = run.evaluation
        if result is None or result["convention"] == self.convention:
            return result
        if not result.get("confusion"):
            self.notes.append(f"{name} was scored by {result['convention']} and left no confusion matrix to rescore.")
            return None
        self.notes.append(f"{name} was scored by {result['convention']}; shown here is {self.convention}.")
        return rescore(result, self.convention)

    def _check_classes(self) -> None:
        """Leave out runs on other classes: nothing of them can be compared."""
        first = next((result for result in self.results if result), None)
        for i, result in enumerate(self.results):
            if result and class_names(result) != class_names(first):
                self.notes.append(f"{self.names[i]} was evaluated on other classes; its scores are left out.")
                self.results[i] = None

    def _shares(self) -> tuple[list[float | None], str]:
        """Every class's share of the labelled training pixels; of the evaluated ones where no run says."""
        if not self.scored:
            return [], ""
        per_class = self.results[self.scored[0]]["per_class"]
        for run in self.runs:
            counts = (run.statistics or {}).get("class_pixels")
            if counts and len(counts) == len(per_class):
                return _normalised(counts), "share of training pixels (log scale)"
        published = [item.get("train_pixels") for item in per_class]
        if None not in published:
            return _normalised(published), "share of training pixels (log scale)"
        self.notes.append("No run has statistics.json: frequencies are those of the evaluated images.")
        return _normalised([item["pixels"] for item in per_class]), "share of evaluated pixels (log scale)"

    def tail(self) -> tuple[list[int], str]:
        """The classes to look at, rarest last, and how they are called."""
        per_class = self.results[self.scored[0]]["per_class"]
        ids = [item["id"] for item in per_class if item["tail"]]
        called = "tail classes"
        if not ids:
            seen = [item["id"] for item in per_class if item["pixels"]]
            ids = sorted(seen, key=lambda k: self.shares[k] or 0)[: max(1, min(12, math.ceil(len(per_class) / 5)))]
            called = "rarest classes"
        ids = sorted(ids, key=lambda k: self.shares[k] or 0)
        if len(ids) > 12:
            ids, called = ids[:12], f"twelve rarest {called}"
        return ids[::-1], called


def _normalised(counts: Sequence[float]) -> list[float | None]:
    total = sum(counts)
    return [count / total if total else None for count in counts]


def class_names(result: dict[str, Any]) -> list[str]:
    return [item["name"] for item in result["per_class"]]


def rescore(result: dict[str, Any], convention: str) -> dict[str, Any]:
    """The scores of an evaluation's confusion matrix under another convention."""
    per_class = result["per_class"]
    row = SimpleNamespace(
        name=result.get("dataset", ""),
        classes=class_names(result),
        palette=[item["color"] for item in per_class],
        tail=[item["id"] for item in per_class if item["tail"]],
        counts=None,
    )
    levels = per_class[0].get("groups", {}) if per_class else {}
    groups = {level: [item["groups"][level] for item in per_class] for level in levels}
    again = summarise(np.array(result["confusion"]), row, convention, groups)
    pairs = zip(per_class, again["per_class"], strict=True)
    kept = [{**old, "iou": new["iou"], "acc": new["acc"]} for old, new in pairs]
    return {**result, **again, "per_class": kept}


def write_report(
    out_html: str | Path, runs: Sequence[RunFolder], baseline: int = 0, *, command: str | None = None
) -> Path:
    """Write the report on `runs` and return its path; changes are against `runs[baseline]`.

    command: how the report was made, for its last line. Raises ValueError without runs.
    """
    if not runs:
        raise ValueError("a report needs at least one run folder")
    if not 0 <= baseline < len(runs):
        raise ValueError(f"baseline {baseline} is none of the {len(runs)} runs")
    report = Report(runs, baseline)
    sections = {title: make(report) for title, make in SECTIONS.items()}
    links = "".join(f'<a href="#{title.lower()}">{title}</a>' for title, body in sections.items() if body)
    made = f"Report made {time.strftime('%Y-%m-%d %H:%M')}" + (f" by <code>{escape(command)}</code>" if command else "")
    body = (
        headline(report)
        + f"<nav>{links}</nav>"
        + notes(report)
        + run_bar(report)
        + "".join(sections.values())
        + f"<footer>{made}. All scores: convention <b>{escape(report.convention)}</b>, in percent.</footer>"
    )
    title = f"Long-tail segmentation: {', '.join(report.names)}"
    out = Path(out_html)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(page(title, body, len(runs)), encoding="utf-8")
    return out
