"""The folder of a test, `<run>/test/<checkpoint>[_<network>][_tta]-<hash>/`: one for each checkpoint and setting.

It has the form of a run's folder (config.yaml, run.json, evaluation.json, panels/), so that reports and tables take it
as they take a run, and no test overwrites another's result.
"""

import hashlib
import json
import shlex
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from common import distributed
from common.config import Config, save_config
from common.engine.logging import commit, describe_machine
from common.evaluation.identity import identity
from common.evaluation.per_image import FILE as PER_IMAGE
from common.evaluation.samples import chosen_images
from common.files import write_json
from common.models.pretrained.containers import WEIGHTS, weight_file

FOLDER = "test"  # of all tests, in the run's
KIND = "test"  # in the run.json of one


def folder_of_test(
    cfg: Config, dataset: Any, checkpoint: str | Path, network: str = ""
) -> Path:
    """Where the test of `checkpoint` (a run, folder or file) on `dataset` by `cfg.eval` belongs; nothing is written.

    The same weights, images and settings give the same folder. network: which of the checkpoint's networks is tested,
    where it is not the one that predicts.
    """
    evaluated = identity(dataset, chosen_images(dataset, cfg.eval), cfg.eval)
    file = weight_file(checkpoint).resolve()
    told_apart = json.dumps([_content(file), network, evaluated])
    digest = hashlib.sha256(told_apart.encode()).hexdigest()[:8]

    words = [_name(file)]
    words += [network] if network else []
    words += ["tta"] if cfg.eval.flip or tuple(cfg.eval.scales) != (1.0,) else []

    return cfg.folder / FOLDER / f"{'_'.join(words)}-{digest}"


def kept_in(folder: Path, scores: str | None = None) -> dict[str, Path]:
    """Arguments of `evaluate`: where a test keeps its panels and, if the config asks for them, its images' matrices.

    scores: as in `write_test`; then nothing is kept but them.
    """
    if scores is not None:
        return {}
    return {"panels": folder / "panels", "per_image": folder / PER_IMAGE}


def _name(file: Path) -> str:
    """What a checkpoint is called: step_00004000, or the name of an official file."""
    return file.parent.name if file.name == WEIGHTS else file.stem


def _content(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def write_test(
    folder: Path, cfg: Config, result: Mapping[str, Any], scores: str | None = None
) -> None:
    """Leave the result of a test in its folder (rank 0), with the config and how it was made.

    scores: a file that takes the result in place of the folder, `--json` of the command line.
    """
    if distributed.rank() != 0:
        return
    if scores is not None:
        Path(scores).parent.mkdir(parents=True, exist_ok=True)
        write_json(Path(scores), result)
        print(f"scores written to {scores}")
        return

    folder.mkdir(parents=True, exist_ok=True)
    save_config(cfg, folder / "config.yaml")
    write_json(folder / "evaluation.json", result)
    write_json(folder / "run.json", made(cfg, KIND))
    print(f"scores written to {folder / 'evaluation.json'}")


def made(
    cfg: Config, kind: str, started: float | None = None, finished: float | None = None
) -> dict[str, Any]:
    """How a folder of this kind was made, for its run.json. started, finished: seconds since the epoch."""
    spent = None if started is None or finished is None else (finished - started) / 60
    return {
        "kind": kind,
        "name": cfg.name,
        "command": shlex.join(["python", *sys.argv]),
        "commit": commit(),
        "seed": cfg.seed,
        "started": time.strftime("%Y-%m-%d %H:%M", time.localtime(started)),
        "minutes": None if spent is None else round(spent, 3),
        "machine": describe_machine(),
    }


def run_of(folder: Path, record: Mapping[str, Any]) -> Path | None:
    """The run that the test in `folder` belongs to; None where its `record` (run.json) is not a test's."""
    return folder.parent.parent if record.get("kind") == KIND else None
