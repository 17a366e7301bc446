"""What trackers are given: short tags, no constants, pictures beside their truth; by stand-ins and for real."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from common.config import Config, ConfigError, LogConfig, ModelConfig, typed
from common.engine import trackers
from common.engine.logging import RunLog, short_names, side_by_side

SCORES = {"step": 2, "images": 7, "miou": 0.5, "per_class": [{"name": "bulletin board, sign", "iou": 0.25}]}
COSTS = {"data_seconds": 0.0, "memory_gib": 1.0}


def config(folder: Path, *names: str) -> Config:
    return Config(ModelConfig("none", 4), name="run", output=str(folder), log=LogConfig(names))


def write_panel(folder: Path) -> None:
    folder.mkdir(parents=True)
    for shade, name in enumerate(("image", "truth", "prediction")):
        Image.fromarray(np.full((4, 6, 3), 80 * shade, np.uint8)).save(folder / f"00003_{name}.png")


def log_a_run(cfg: Config, start: int = 0) -> None:
    with RunLog(cfg, start) as log:
        if not (cfg.folder / "panels").exists():
            write_panel(cfg.folder / "panels")
        log.train(start + 1, {"loss": 2.0}, {"sgd/rest": 0.1}, COSTS)
        log.evaluation(start + 2, SCORES)


def test_tensorboard_shows_curves_pictures_and_the_config(tmp_path):
    cfg = config(tmp_path, "tensorboard")
    log_a_run(cfg)
    events = EventAccumulator(str(cfg.folder / "tensorboard"))
    events.Reload()
    curves = {"train/loss", "lr", "cost/data_seconds", "cost/memory_gib", "val/miou", "val_iou/bulletin board, sign"}
    assert set(events.Tags()["scalars"]) == curves, "no settings of the evaluation, which are constants"

    picture = events.Images("prediction/00003")[0]
    assert (picture.height, picture.width) == (4, 18)
    text = events.Tensors("config/text_summary")[0].tensor_proto.string_val[0].decode()
    assert "    name: run" in text.splitlines()


def test_a_panel_is_image_truth_and_prediction(tmp_path):
    write_panel(tmp_path / "panels")
    assert side_by_side(tmp_path / "panels", "00003")[0, ::6, 0].tolist() == [0, 80, 160]


@pytest.mark.parametrize(
    ("rates", "tags"),
    [
        (["sgd/rest"], ["lr"]),
        (["sgd/backbone", "sgd/rest"], ["lr/backbone", "lr/rest"]),
        (["sgd/rest", "adamw/rest"], ["lr/sgd/rest", "lr/adamw/rest"]),
    ],
)
def test_tags_of_learning_rates_are_short(rates, tags):
    assert list(short_names(dict.fromkeys(rates, 0.1))) == tags


def test_a_package_that_is_missing_is_said_before_the_run(tmp_path, monkeypatch):
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"^log\.trackers: wandb is not installed; pip install wandb, or take it out"):
        trackers.require(config(tmp_path, "wandb"))


def test_other_names_are_refused():
    with pytest.raises(ConfigError, match="trackers"):
        typed(LogConfig, {"trackers": ["comet"]}, "log")
    with pytest.raises(ConfigError, match="name each once"):
        typed(LogConfig, {"trackers": ["wandb", "wandb"]}, "log")


class StandIn:
    """As much of wandb as is used; remembers what it was given."""

    def __init__(self):
        self.calls: list = []

    def init(self, **options):
        self.calls.append(options)
        log = lambda values, step: self.calls.append((step, values))  # noqa: E731
        finish = lambda: self.calls.append("finish")  # noqa: E731
        return SimpleNamespace(id=options["id"] or "made", log=log, finish=finish)

    def Image(self, picture):
        return picture.shape


def test_wandb_goes_on_with_the_run_that_it_knows(tmp_path, monkeypatch):
    wandb = StandIn()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    cfg = config(tmp_path, "wandb")
    log_a_run(cfg)
    log_a_run(cfg, start=2)
    log_a_run(cfg)  # begins again
    begun = [call for call in wandb.calls if isinstance(call, dict)]
    assert [call["id"] for call in begun] == [None, "made", None]
    assert begun[0]["config"]["name"] == "run" and begun[0]["dir"] == str(cfg.folder)
    assert (1, {"train/loss": 2.0, "lr": 0.1, "cost/data_seconds": 0.0, "cost/memory_gib": 1.0}) in wandb.calls
    assert (2, {"prediction/00003": (4, 18, 3)}) in wandb.calls and wandb.calls[-1] == "finish"


def test_wandb_without_a_server(tmp_path, monkeypatch):
    pytest.importorskip("wandb", reason="wandb is not installed")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    cfg = config(tmp_path, "wandb")
    log_a_run(cfg)
    assert list(cfg.folder.glob("wandb/offline-run-*/*.wandb"))
    assert json.loads((cfg.folder / trackers.IDENTITIES).read_text())["wandb"]


@pytest.mark.filterwarnings("ignore")
def test_mlflow_without_a_server(tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow", reason="mlflow is not installed")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"file:{tmp_path}/mlruns")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    cfg = config(tmp_path, "mlflow")
    log_a_run(cfg)
    log_a_run(cfg, start=2)

    client = mlflow.MlflowClient()
    (run,) = client.search_runs([client.get_experiment_by_name("long-tail-seg").experiment_id])
    assert run.info.run_name == "run" and run.info.status == "FINISHED"
    assert [point.step for point in client.get_metric_history(run.info.run_id, "train/loss")] == [1, 3]
    assert run.data.metrics["val_iou/bulletin board_ sign"] == 0.25
    assert {file.path for file in client.list_artifacts(run.info.run_id)} == {"config.yaml", "images"}
