"""What a run, or a test of a checkpoint, left in its folder.

A run's folder holds `config.yaml`, `run.json` (command, commit, machine, seed, started, minutes), `log.jsonl` (lines of
kind `train` and `eval`), `evaluation.json` (what `evaluate` returns), `panels/<image>_{image,truth,prediction}.png`
and, if it likes, `statistics.json` (class_pixels, class_images, num_images of the training set). A test's folder,
`<run>/test/<name>/`, has no log and takes the statistics of its run.
"""

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from common.evaluation.folder import run_of
from common.files import load_json, read_artifact

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

        record = _read_json(path / "run.json") or {}
        run = run_of(path, record)
        if run is not None:
            missing.remove("log.jsonl")

        config = path / "config.yaml"
        panels = _panels(path / "panels")

        return cls(
            path=path,
            name=path.resolve().name if run is None else f"{run.resolve().name} {path.name}",
            config=config.read_text() if config.is_file() else None,
            record=record,
            log=_read_log(path / "log.jsonl"),
            evaluation=_read_json(path / "evaluation.json"),
            statistics=_read_json((run or path) / "statistics.json"),
            panels=panels,
            missing=(*missing, *(() if panels else ("panels",))),
        )

    @cached_property
    def tree(self) -> dict[str, Any]:
        """The resolved config."""
        try:
            return yaml.safe_load(self.config or "") or {}
        except yaml.YAMLError as error:
            raise ValueError(
                f"{self.path / 'config.yaml'}: not valid YAML ({' '.join(str(error).split())})"
            ) from error

    def last(self, key: str) -> float | None:
        """The newest logged validation value."""
        values = [
            line[key]
            for line in self.log
            if line.get("kind") == "eval" and line.get(key) is not None
        ]
        return values[-1] if values else None


def _panels(folder: Path) -> dict[str, dict[str, Path]]:
    """Image → part (image, truth, prediction) → file."""
    found: dict[str, dict[str, Path]] = {}
    for file in sorted(folder.glob("*_*.png")):
        image, _, part = file.stem.rpartition("_")
        found.setdefault(image, {})[part] = file

    return found


def _read_json(path: Path) -> dict[str, Any] | None:
    def parse(path: Path) -> dict[str, Any]:
        value = load_json(path)
        if not isinstance(value, dict):
            raise ValueError(f"holds a {type(value).__name__} in place of an object")
        return value

    return read_artifact(path, parse, "delete it or write it again") if path.is_file() else None


def _read_log(path: Path) -> list[dict[str, Any]]:
    """The lines of a log; the last one of a killed run may be cut off."""
    lines = path.read_text(errors="replace").splitlines() if path.is_file() else []
    result = []

    for i, line in enumerate(lines):
        try:
            result.append(dict(json.loads(line)))
        except (ValueError, TypeError) as error:
            if i < len(lines) - 1:
                raise ValueError(f"{path}: line {i + 1} is not valid JSON") from error

    return result
