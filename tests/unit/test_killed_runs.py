"""Runs that end at a bad moment, or whose folder is not what it was: nothing is lost or half written."""

import json
import os
import shutil
from dataclasses import replace

import pytest

from common.config import Config, EvalConfig, TrainConfig
from common.engine import checkpoint
from common.files import DRAFT, follow, write_json
from tests.unit.tiny_method import config, stop_at, train


class Killed(BaseException):
    """The process ends here and now."""


def kill_in(monkeypatch, module, name, when):
    """The call of `module.name` for which `when(arguments)` holds does not come about: the process is gone."""
    real = getattr(module, name)

    def wrapped(*args, **kwargs):
        if when(*args, **kwargs):
            raise Killed
        return real(*args, **kwargs)

    monkeypatch.setattr(module, name, wrapped)


def links(cfg):
    folder = cfg.folder / "checkpoints"
    return {name: follow(folder / name).resolve().name for name in ("best", "last")}


SCORES = {8: 0.9, 16: 0.5, 24: 0.6, 32: 0.7}
MOMENTS = {  # between which writes of step 8 the kill falls
    "before its folder has a name": (checkpoint, "seal", lambda draft, facts: facts["step"] == 8),
    "before last points at it": (checkpoint, "link", lambda path, target: target.name == "step_00000008"),
    "before its score is recorded": (checkpoint, "write_scores", lambda folder, scores, metric: 8 in scores),
    "before best points at it": (checkpoint, "link", lambda path, target: path.name == "best"),
    "before older ones are pruned": (checkpoint, "prune", lambda folder, keep, best, until: best == 8),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_the_best_outlives_a_kill_at_any_moment(tmp_path, monkeypatch, moment):
    cfg = config(tmp_path, steps=32, save_every=4)
    cfg = Config(**{**cfg.__dict__, "eval": EvalConfig(every=8)})
    evaluate = lambda step: {"miou": SCORES[step]}  # noqa: E731
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_in(patch, *MOMENTS[moment])
        train(cfg, evaluate=evaluate)

    train(cfg, evaluate=evaluate, resume=True)
    assert links(cfg) == {"best": "step_00000008", "last": "step_00000032"}
    assert [path.name for path in checkpoint.steps(cfg.folder / "checkpoints")] == [
        "step_00000008", "step_00000028", "step_00000032",
    ]  # fmt: skip


def test_a_kill_after_the_last_step_leaves_the_evaluation_to_the_resume(tmp_path):
    cfg = config(tmp_path)
    evaluated = []

    def evaluate(step, fails=True):
        evaluated.append(step)
        if step == 20 and fails:
            raise ValueError("val/0007.png: damaged")
        return {"miou": step / 100}

    with pytest.raises(ValueError, match="0007.png"):
        train(cfg, evaluate=evaluate)
    assert links(cfg) == {"best": "step_00000010", "last": "step_00000020"}  # nothing was lost

    train(cfg, evaluate=lambda step: evaluate(step, fails=False), resume=True)
    assert evaluated == [10, 20, 20] and links(cfg)["best"] == "step_00000020"
    train(cfg, evaluate=evaluate, resume=True)
    assert evaluated == [10, 20, 20]  # a whole run is not evaluated again


def test_undefined_scores_are_never_the_best(tmp_path):
    cfg = config(tmp_path)
    scores = {10: None, 20: float("nan")}
    train(cfg, evaluate=lambda step: {"miou": scores[step]})
    assert not (cfg.folder / "checkpoints" / "best").exists()
    assert checkpoint.best_step({1: None, 3: 0.5, 2: 0.5, 4: 0.1}) == 2
    assert checkpoint.best_step({1: None}) is None


@pytest.mark.parametrize("content", ["{", '{"8": "high"}', '{"8": 1e999}', '{"x": 1}', "[1]"])
def test_damaged_scores_are_named(tmp_path, content):
    (tmp_path / checkpoint.SCORES).write_text(content)
    with pytest.raises(ValueError, match="scores.json: .*; remove it"):
        checkpoint.read_scores(tmp_path, 10, "miou")


def test_a_damaged_checkpoint_takes_no_place(tmp_path):
    """The run goes on from an older one: what it saves then is not pruned in favour of the damaged, later step."""
    cfg = config(tmp_path, steps=20, save_every=10, keep=2)
    train(cfg, evaluate=lambda step: {"miou": step / 100})
    folder = cfg.folder / "checkpoints"
    (folder / "step_00000020" / checkpoint.WEIGHTS).write_bytes(b"torn")

    cfg = replace(cfg, train=replace(cfg.train, keep=1))
    torn = "step_00000020: torn or damaged, skipped"
    with pytest.raises(SystemExit), pytest.warns(UserWarning, match=torn):
        train(replace(cfg, eval=EvalConfig(every=12)), evaluate=stop_at(12), resume=True)
    assert checkpoint.damage(folder / "step_00000012", checkpoint.FILES) is None
    assert links(cfg)["last"] == "step_00000012" and links(cfg)["best"] != "step_00000020"
    with pytest.warns(UserWarning, match=torn):
        train(cfg, evaluate=lambda step: {"miou": 0.5}, resume=True)
    assert links(cfg) == {"best": "step_00000020", "last": "step_00000020"}
    assert [path.name for path in checkpoint.steps(folder)] == ["step_00000020"]


def test_another_metric_chooses_the_best_anew(tmp_path):
    """From the log, which has every metric, and not by mixing two of them."""
    tails = {5: 0.1, 10: 0.12, 15: 0.2, 20: 0.3}
    cfg = config(tmp_path, steps=10, save_every=5, keep=9)
    evaluate = lambda step: {"miou": 0.6 + step / 1000, "miou_tail": tails[step]}  # noqa: E731
    train(replace(cfg, eval=EvalConfig(every=5)), evaluate=evaluate)
    assert links(cfg)["best"] == "step_00000010"
    cfg = replace(cfg, train=replace(cfg.train, steps=20), eval=EvalConfig(every=5, best="miou_tail"))
    train(cfg, evaluate=evaluate, resume=True)
    assert links(cfg)["best"] == "step_00000020"
    record = json.loads((cfg.folder / "checkpoints" / checkpoint.SCORES).read_text())
    assert record == {"metric": "miou_tail", "scores": {str(step): tail for step, tail in tails.items()}}


def test_scores_of_earlier_versions_are_read(tmp_path):
    (tmp_path / checkpoint.SCORES).write_text('{"8": 0.5, "16": null, "24": 0.7}')
    assert checkpoint.read_scores(tmp_path, 20, "miou") == {8: 0.5, 16: None}


def test_a_run_whose_checkpoints_are_all_damaged_is_not_begun_anew(tmp_path):
    cfg = config(tmp_path)
    train(cfg)
    found = checkpoint.steps(cfg.folder / "checkpoints")
    for path in found:
        (path / "state.pt").unlink()
    before = {path: path.read_bytes() for path in cfg.folder.rglob("*") if path.is_file()}

    with pytest.warns(UserWarning, match="torn"), pytest.raises(ValueError, match="all are damaged: .*start anew") as e:
        train(cfg, resume=True)
    assert all(path.name in str(e.value) for path in found)
    assert {path: path.read_bytes() for path in cfg.folder.rglob("*") if path.is_file()} == before


def test_without_symbolic_links_a_run_saves_resumes_and_keeps_its_best(tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise OSError(1, "Operation not permitted")

    monkeypatch.setattr(os, "symlink", refuse)
    scores = {10: 0.9, 20: 0.1}
    cfg = config(tmp_path / "a", steps=12)
    train(cfg, evaluate=lambda step: {"miou": scores.get(step)})
    cfg = Config(**{**cfg.__dict__, "train": TrainConfig(steps=20, save_every=5, log_every=1)})
    train(cfg, evaluate=lambda step: {"miou": scores[step]}, resume=True)
    assert links(cfg) == {"best": "step_00000010", "last": "step_00000020"}
    assert not (cfg.folder / "checkpoints" / "last").is_symlink()


def test_drafts_of_killed_runs_go(tmp_path):
    cfg = config(tmp_path)
    folder = cfg.folder / "checkpoints"
    folder.mkdir(parents=True)
    (folder / f"{DRAFT}12345678-step_00000003").mkdir()
    (folder / f"{DRAFT}12345678-last").write_text("")
    train(cfg)
    assert not list(folder.glob(".*"))


def test_a_run_whose_folder_is_removed_says_so(tmp_path):
    cfg = config(tmp_path)

    def evaluate(step):
        shutil.rmtree(cfg.folder)
        write_json(cfg.folder / "evaluation.json", {})

    with pytest.raises(OSError, match="evaluation.json: cannot be written: the folder .*tiny is not there"):
        train(cfg, evaluate=evaluate)  # and not the error of closing the log

    with pytest.raises(OSError, match="tiny: the run's folder is gone"):
        train(cfg, evaluate=lambda step: shutil.rmtree(cfg.folder))
    assert not cfg.folder.exists()
