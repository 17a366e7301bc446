"""TRACKERS: where a run's curves and pictures are shown, by name (`log.trackers`).

    log: {trackers: [tensorboard, wandb, mlflow]}

A tracker that is a package of its own is imported when a run begins, and missed before that in one line. Where its
server is, and whether it is asked at all, is said as each package has it: WANDB_MODE=offline, MLFLOW_TRACKING_URI.
"""

import importlib.util
import os
import re
from collections.abc import Mapping
from typing import Protocol

import numpy as np

from common.config import Config, ConfigError, to_tree
from common.files import read_json, write_json

IDENTITIES = "trackers.json"  # in a run's folder: by what name each service knows it, so that a resumed run goes on

REFUSED = re.compile(r"[^\w\-. :/]")  # in a name of mlflow


class Tracker(Protocol):
    """Shows one run. Made with its config and the step that it begins or goes on at."""

    def __init__(self, cfg: Config, start_step: int): ...

    def scalars(self, values: Mapping[str, float], step: int) -> None: ...

    def picture(self, tag: str, picture: np.ndarray, step: int) -> None:
        """picture: (H, W, 3) uint8."""

    def close(self) -> None: ...


class TensorBoard:
    """Files below the run's folder: `tensorboard --logdir runs`."""

    def __init__(self, cfg: Config, start_step: int):
        # here, since it takes a second to import
        from torch.utils.tensorboard import SummaryWriter

        self.board = SummaryWriter(str(cfg.folder / "tensorboard"), purge_step=start_step)
        text = (cfg.folder / "config.yaml").read_text(encoding="utf-8")
        indented = "\n".join(f"    {line}" for line in text.splitlines())  # code in Markdown
        self.board.add_text("config", indented, start_step)

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        for tag, value in values.items():
            self.board.add_scalar(tag, value, step)

    def picture(self, tag: str, picture: np.ndarray, step: int) -> None:
        self.board.add_image(tag, picture, step, dataformats="HWC")

    def close(self) -> None:
        self.board.close()


class WeightsAndBiases:
    """wandb: project `long-tail-seg` unless WANDB_PROJECT says otherwise."""

    def __init__(self, cfg: Config, start_step: int):
        import wandb

        known = _identity(cfg, "wandb", start_step)
        self.wandb = wandb
        self.run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "long-tail-seg"),
            name=cfg.name,
            id=known,
            resume="allow",
            dir=str(cfg.folder),
            config=to_tree(cfg),
        )
        _remember(cfg, "wandb", self.run.id)

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        self.run.log(dict(values), step=step)

    def picture(self, tag: str, picture: np.ndarray, step: int) -> None:
        self.run.log({tag: self.wandb.Image(picture)}, step=step)

    def close(self) -> None:
        self.run.finish()


class MLflow:
    """mlflow: experiment `long-tail-seg` unless MLFLOW_EXPERIMENT_NAME says otherwise."""

    def __init__(self, cfg: Config, start_step: int):
        from mlflow import MlflowClient

        self.client = MlflowClient()
        known = _identity(cfg, "mlflow", start_step)
        if known is None:
            name = os.environ.get("MLFLOW_EXPERIMENT_NAME", "long-tail-seg")
            found = self.client.get_experiment_by_name(name)
            experiment = found.experiment_id if found else self.client.create_experiment(name)
            known = self.client.create_run(experiment, run_name=cfg.name).info.run_id
            _remember(cfg, "mlflow", known)

        self.run = known
        self.client.log_artifact(self.run, str(cfg.folder / "config.yaml"))

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        for tag, value in values.items():
            self.client.log_metric(self.run, REFUSED.sub("_", tag), value, step=step)

    def picture(self, tag: str, picture: np.ndarray, step: int) -> None:
        self.client.log_image(self.run, picture, key=REFUSED.sub("_", tag), step=step)

    def close(self) -> None:
        self.client.set_terminated(self.run)


TRACKERS: Mapping[str, type[Tracker]] = {
    "tensorboard": TensorBoard,
    "wandb": WeightsAndBiases,
    "mlflow": MLflow,
}


def require(cfg: Config) -> None:
    """Raise ConfigError where a tracker's package is not installed."""
    for name in cfg.log.trackers:
        if importlib.util.find_spec(name) is None:
            raise ConfigError(
                f"log.trackers: {name} is not installed; pip install {name}, or take it out of the list"
            )


def open_trackers(cfg: Config, start_step: int) -> list[Tracker]:
    return [TRACKERS[name](cfg, start_step) for name in cfg.log.trackers]


def _identity(cfg: Config, service: str, start_step: int) -> str | None:
    """By what name the service knows the run; None for one that begins."""
    path = cfg.folder / IDENTITIES
    if start_step == 0 or not path.is_file():
        return None

    return read_json(path).get(service)


def _remember(cfg: Config, service: str, identity: str) -> None:
    path = cfg.folder / IDENTITIES
    known = read_json(path) if path.is_file() else {}
    write_json(path, {**known, service: identity})
