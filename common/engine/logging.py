"""What a run leaves behind: console lines, `log.jsonl`, what trackers show, and `run.json`."""

import json
import os
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from common import console, distributed
from common.config import Config, save_config
from common.engine.trackers import open_trackers
from common.files import replacing, write_json

# shown by trackers
CLASS_SCORES = (
    "iou",
    "precision",
    "recall",
    "tolerant_iou",
    "boundary_f",
    "ece",
    "mass",
)
# of an evaluation's numbers those that are no curve
SETTINGS = ("step", "images", "logit_adjustment")


def describe_machine() -> dict[str, Any]:
    """Processor, accelerator and versions, as results have to name them."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": gpu,
        "tf32": torch.backends.cuda.matmul.allow_tf32 if gpu else None,
        "ranks": distributed.world_size(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass

    return platform.processor() or platform.machine()


def commit() -> str | None:
    """The repository's commit, marked when files differ from it; None outside a repository."""
    here = Path(__file__).parent
    try:
        head = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, check=True
        )
        changed = subprocess.run(
            ["git", "status", "--porcelain", "-uno"], cwd=here, capture_output=True, text=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None

    return head.stdout.strip()[:12] + ("+changes" if changed.stdout.strip() else "")


class RunLog:
    """The log of one run; on ranks other than 0 every call does nothing."""

    def __init__(self, cfg: Config, start_step: int):
        self.cfg = cfg
        self.active = distributed.rank() == 0
        self.record: dict[str, Any] = {}  # what run.json holds
        self.started = time.monotonic()
        self.start_step = start_step
        self.images = sum(stream.batch_size for stream in cfg.data.streams.values())
        if not self.active:
            return

        self.folder = cfg.folder
        self.folder.mkdir(parents=True, exist_ok=True)
        save_config(cfg, self.folder / "config.yaml")
        earlier = _truncate(self.folder / "log.jsonl", start_step)
        self.earlier_minutes = earlier if start_step else 0.0
        self.file = (self.folder / "log.jsonl").open("a", buffering=1)
        self.trackers = open_trackers(cfg, start_step)
        self._describe()

    def _describe(self, minutes: float | None = None) -> None:
        record = {
            "name": self.cfg.name,
            "command": shlex.join(["python", *sys.argv]) if sys.argv[0] else None,
            "commit": commit() if minutes is None else self.record["commit"],
            "seed": self.cfg.seed,
            "counts_of": self.cfg.remedies.get("counts", {}).get("of", "dataset"),
            "started": time.strftime("%Y-%m-%d %H:%M")
            if minutes is None
            else self.record["started"],
            "minutes": minutes,
            "machine": describe_machine(),
        }
        self.record = record
        write_json(self.folder / "run.json", record)

    def train(
        self,
        step: int,
        scalars: Mapping[str, float],
        rates: Mapping[str, float],
        costs: Mapping[str, float],
    ) -> None:
        """Record the step that was just done (1-based count `step`) and print one progress line.

        costs: `data_seconds` and `memory_gib`, as `runtime.Costs.read` gives them.
        """
        if not self.active:
            return

        seconds = time.monotonic() - self.started
        pace = seconds / max(step - self.start_step, 1)
        rate = next(iter(rates.values()))
        self._write(
            {
                "kind": "train",
                "step": step,
                **scalars,
                "lr": rate,
                **costs,
                "minutes": self.minutes,
            }
        )

        curves = {f"train/{name}": value for name, value in scalars.items()}
        curves |= short_names(rates)
        curves |= {f"cost/{name}": value for name, value in costs.items()}
        self._show(curves, step)

        left = time.strftime("%H:%M:%S", time.gmtime(pace * (self.cfg.train.steps - step)))
        cost = f"data {costs['data_seconds']:.3f} s/step  {costs['memory_gib']:.1f} GiB"
        self.message(
            f"{step}/{self.cfg.train.steps}  loss {scalars['loss']:.4f}  lr {rate:.2e}  "
            f"{self.images / pace:.1f} images/s  {cost}  ETA {left}"
        )

    def evaluation(self, step: int, result: Mapping[str, Any]) -> None:
        """Record validation metrics; per-class values and pictures go to the trackers."""
        if not self.active:
            return

        scalars = {k: v for k, v in result.items() if isinstance(v, int | float)}
        self._write(
            {"kind": "eval", "step": step, "convention": result.get("convention"), **scalars}
        )

        curves = {f"val/{key}": value for key, value in scalars.items() if key not in SETTINGS}
        for item in result.get("per_class", ()):
            known = {key: item[key] for key in CLASS_SCORES if item.get(key) is not None}
            curves |= {f"val_{key}/{item['name']}": value for key, value in known.items()}

        self._show(curves, step)
        for path in sorted((self.folder / "panels").glob("*_prediction.png")):
            stem = path.stem.partition("_")[0]
            for tracker in self.trackers:
                tracker.picture(f"prediction/{stem}", side_by_side(path.parent, stem), step)

        shown = {"mIoU": result.get("miou"), "mIoU(tail)": result.get("miou_tail")}
        text = "  ".join(
            f"{name} {100 * value:.2f}" for name, value in shown.items() if value is not None
        )
        self.message(f"step {step}  {text}")

    def _show(self, curves: Mapping[str, float], step: int) -> None:
        for tracker in self.trackers:
            tracker.scalars(curves, step)

    def message(self, text: str) -> None:
        """A line on the console."""
        if self.active:
            console.say(f"[{self.cfg.name}] {text}")

    @property
    def minutes(self) -> float:
        return round(self.earlier_minutes + (time.monotonic() - self.started) / 60, 3)

    def _write(self, record: Mapping[str, Any]) -> None:
        if not self.folder.is_dir():
            raise OSError(
                f"{self.folder}: the run's folder is gone; it was removed while the run was writing to it"
            )
        self.file.write(json.dumps(record) + "\n")

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        """Close; what goes wrong in that does not hide the error that ended the run."""
        if error is not None and self.active and not self.folder.is_dir():
            return  # removed during the run: TensorBoard's thread would print a traceback
        try:
            self.close()
        except OSError:
            if error is None:
                raise

    def close(self) -> None:
        if self.active:
            self._describe(self.minutes)
            self.file.close()
            for tracker in self.trackers:
                tracker.close()


def short_names(rates: Mapping[str, float]) -> dict[str, float]:
    """Tags of learning rates, which are named OPTIMISER/GROUP: of each the part in which they differ."""
    if len(rates) == 1:
        return {"lr": next(iter(rates.values()))}

    optimisers = {name.partition("/")[0] for name in rates}
    if len(optimisers) > 1:
        return {f"lr/{name}": rate for name, rate in rates.items()}

    return {f"lr/{name.partition('/')[2]}": rate for name, rate in rates.items()}


def side_by_side(folder: Path, stem: str) -> np.ndarray:
    """The image, the truth and the prediction of a panel, beside each other (H, 3·W, 3)."""
    names = ("image", "truth", "prediction")
    parts = [Image.open(folder / f"{stem}_{name}.png").convert("RGB") for name in names]
    size = parts[-1].size  # the network's input may be of another size than labels are
    return np.hstack([np.asarray(part.resize(size)) for part in parts])


def _record(line: str) -> dict[str, Any] | None:
    """A line of the log; None for what is none, such as the last line of a killed run."""
    try:
        record = json.loads(line)
    except ValueError:
        return None

    return record if isinstance(record, dict) and isinstance(record.get("step"), int) else None


def _truncate(path: Path, step: int) -> float:
    """Drop records after `step`, which a resumed run writes again; returns the minutes spent until there."""
    if not path.exists():
        return 0.0

    kept = []
    minutes = 0.0

    for line in path.read_text(errors="replace").splitlines():
        record = _record(line)
        if record is not None and record["step"] <= step and step > 0:
            kept.append(line)
            minutes = record.get("minutes", minutes)

    with replacing(path) as draft:
        draft.write_text("".join(line + "\n" for line in kept))

    return minutes
