"""The loop and its checkpoints on a tiny method: resume, accumulation, parts, non-finite losses, signals."""

import json
import os
import re
import shutil
import signal
import time
from copy import deepcopy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from common import distributed
from common.config import Config, DataConfig, EvalConfig, ModelConfig, OptimConfig, StreamConfig, TrainConfig
from common.engine import checkpoint, fit
from common.engine.method import move_average
from common.engine.trainer import NonFiniteLoss
from common.files import DRAFT, follow, write_json
from tests.contexts import BareMethod

CPU = torch.device("cpu")


class Tiny(BareMethod):
    """Dropout, BN, a moving-average teacher and a counter: all that a checkpoint has to hold."""

    def __init__(self, cfg, parts=1, poison=None, norm=nn.BatchNorm1d, dropout=0.5):
        super().__init__(cfg)
        self.backwards, self.poison = parts, poison
        self.model = nn.Sequential(nn.Linear(4, 8), norm(8), nn.Dropout(dropout), nn.Linear(8, 1))
        self.teacher = deepcopy(self.model)
        self.teacher.requires_grad_(False)
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))

    def forward(self, streams, step):
        x = streams["labeled"]["x"]
        if self.backwards == 1:
            return self.term(x, step)
        return (self.term(x, step) for _ in range(self.backwards))

    def term(self, x, step):
        loss = F.mse_loss(self.model(x), x.sum(1, keepdim=True)) / self.backwards
        return {"loss": loss * (float("nan") if step == self.poison else 1), "mse": loss}

    def after_step(self, step):
        move_average(self.teacher, self.model, 0.9)
        self.count += 1


@pytest.mark.parametrize("statistics", ["averaged", "copied"])
def test_a_teachers_buffers(statistics):
    """Closed form of ten steps: floating-point ones are averaged like the weights, or copied; counts are copied."""
    torch.manual_seed(0)
    student = nn.BatchNorm1d(3)
    teacher = deepcopy(student)
    expected = {"running_mean": torch.zeros(3), "running_var": torch.ones(3), "weight": torch.ones(3)}
    for _ in range(10):
        student(torch.randn(6, 3) * 4 + 2)
        nn.init.uniform_(student.weight)
        move_average(teacher, student, 0.8, statistics)
        now = student.state_dict()
        expected = {name: 0.8 * value + 0.2 * now[name] for name, value in expected.items()}
    if statistics == "copied":
        expected |= {name: now[name] for name in ("running_mean", "running_var")}
    for name, value in expected.items():
        torch.testing.assert_close(teacher.state_dict()[name], value)
    assert teacher.num_batches_tracked == 10


def config(tmp_path, steps=20, **train):
    return Config(
        name="tiny",
        output=str(tmp_path),
        model=ModelConfig(name="none", num_classes=1),
        data=DataConfig(streams={"labeled": StreamConfig(batch_size=8)}),
        optim=OptimConfig(lr=0.05),
        train=TrainConfig(steps=steps, **{"save_every": 5, "log_every": 1} | train),
        eval=EvalConfig(every=10),
    )


def streams(cfg, micro=1):
    def open_at(step):
        def batches():
            for t in range(step, 10**6):
                for m in range(micro):
                    generator = torch.Generator().manual_seed(t * micro + m)
                    yield {"x": torch.randn(8 // micro, 4, generator=generator)}

        return {"labeled": batches()}

    return open_at


def train(cfg, method=None, resume=False, **kwargs):
    torch.manual_seed(0)
    method = method or Tiny(cfg)
    fit(cfg, method, streams(cfg), device=CPU, resume=resume, **kwargs)
    return method.state_dict()


def assert_equal(a, b):
    assert a.keys() == b.keys()
    assert all(torch.equal(a[key], b[key]) for key in a)


def stop_at(number):
    """An `evaluate` that sends this process SIGTERM at the given step."""

    def evaluate(step):
        if step == number:
            os.kill(os.getpid(), signal.SIGTERM)
        return {"miou": 0.0}

    return evaluate


def test_a_stopped_run_resumes_bit_for_bit(tmp_path):
    whole = train(config(tmp_path / "a"))
    cfg = config(tmp_path / "b", save_every=100)
    cfg = Config(**{**cfg.__dict__, "eval": EvalConfig(every=11)})
    with pytest.raises(SystemExit) as stop:
        train(cfg, evaluate=stop_at(11))
    assert stop.value.code == 128 + signal.SIGTERM
    assert_equal(whole, train(cfg, resume=True))
    log = [json.loads(line) for line in (cfg.folder / "log.jsonl").read_text().splitlines()]
    assert [r["step"] for r in log if r["kind"] == "train"] == list(range(1, 21))


def test_saving_and_evaluating_change_nothing(tmp_path):
    often = train(config(tmp_path / "a", save_every=1), evaluate=lambda step: {"miou": torch.rand(()).item()})
    assert_equal(often, train(config(tmp_path / "b", save_every=100)))


def test_a_new_run_does_not_touch_an_earlier_one(tmp_path):
    cfg = config(tmp_path)
    train(cfg)
    with pytest.raises(ValueError, match="holds an earlier run, up to step_00000020; add --resume"):
        train(cfg)


def test_a_torn_newest_checkpoint_is_skipped(tmp_path):
    cfg = config(tmp_path)
    whole = train(cfg)
    folder = cfg.folder / "checkpoints"
    weights = folder / "step_00000020" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-7])
    with pytest.warns(UserWarning, match="torn"):
        assert checkpoint.newest(folder).name == "step_00000015"
    with pytest.warns(UserWarning, match="torn"):
        assert_equal(whole, train(cfg, resume=True))


def test_keeps_the_newest_and_the_best(tmp_path):
    cfg = config(tmp_path)
    scores = {10: 0.9, 20: 0.1}
    train(cfg, evaluate=lambda step: {"miou": scores[step]})
    folder = cfg.folder / "checkpoints"
    assert [p.name for p in checkpoint.steps(folder)] == ["step_00000010", "step_00000015", "step_00000020"]
    assert (folder / "best").resolve().name == "step_00000010"
    assert (folder / "last").resolve().name == "step_00000020"


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
    "before its score is recorded": (checkpoint, "write_scores", lambda folder, scores: 8 in scores),
    "before best points at it": (checkpoint, "link", lambda path, target: path.name == "best"),
    "before older ones are pruned": (checkpoint, "prune", lambda folder, keep, best: best == 8),
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
        checkpoint.read_scores(tmp_path, 10)


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


@pytest.mark.parametrize(("before", "after"), [("fp32", "fp16"), ("fp16", "fp32"), ("bf16", "fp16")])
def test_a_run_resumes_in_another_precision(tmp_path, before, after):
    cfg = config(tmp_path, steps=10, precision=before)
    train(cfg)
    cfg = config(tmp_path, steps=12, precision=after)
    with pytest.warns(UserWarning, match=r"another train\.precision"):
        train(cfg, resume=True)
    assert (cfg.folder / "checkpoints" / "step_00000012").is_dir()


def test_unwritable_folder_leaves_nothing_half_written(tmp_path, monkeypatch):
    cfg = config(tmp_path)
    method = Tiny(cfg)

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(OSError, match="step_00000001: cannot be written: No space left"):
        checkpoint.save(tmp_path / "checkpoints", 1, method, {}, {})
    assert list((tmp_path / "checkpoints").iterdir()) == []


def test_parts_equal_one_backward(tmp_path):
    """Two halves of the loss, one after the other, give the gradient of their sum (without dropout and BN)."""
    results = []
    for parts in (1, 2):
        cfg = config(tmp_path / str(parts), steps=1)
        torch.manual_seed(0)
        method = Tiny(cfg, parts, norm=nn.Identity, dropout=0.0)
        fit(cfg, method, streams(cfg), device=CPU)
        results.append(method.model[0].weight.detach())
    torch.testing.assert_close(*results)


class Miscounted(Tiny):
    """Says another number of parts than it gives."""

    def __init__(self, cfg, given, said):
        super().__init__(cfg)
        self.given, self.backwards = given, said

    def forward(self, streams, step):
        parts = [self.term(streams["labeled"]["x"], step) for _ in range(self.given)]
        return parts[0] if self.given == 1 else iter(parts)


@pytest.mark.parametrize(
    ("given", "said", "how"), [(3, 2, "more"), (2, 1, "more"), (1, 2, "fewer"), (2, 3, "fewer"), (0, 1, "fewer")]
)
def test_parts_are_counted(tmp_path, given, said, how):
    cfg = config(tmp_path, steps=1)
    words = f"method Miscounted: forward gave {how} parts than its backwards = {said}"
    with pytest.raises(RuntimeError, match=words):
        train(cfg, Miscounted(cfg, given, said))


def test_a_method_comes_to_its_end_after_the_last_part(tmp_path):
    ended = []

    class Ends(Tiny):
        def forward(self, streams, step):
            yield self.term(streams["labeled"]["x"], step)
            ended.append(self.model[0].weight.grad is not None)

    cfg = config(tmp_path, steps=2)
    train(cfg, Ends(cfg))
    assert ended == [True, True]


def test_every_line_of_the_log_says_what_steps_cost(tmp_path, capsys):
    cfg = config(tmp_path, steps=6, log_every=2)
    inner = streams(cfg)

    def slow(step):
        for batch in inner(step)["labeled"]:
            time.sleep(0.02)
            yield batch

    fit(cfg, Tiny(cfg), lambda step: {"labeled": slow(step)}, device=CPU)
    lines = [json.loads(line) for line in (cfg.folder / "log.jsonl").read_text().splitlines()]
    assert len(lines) == 3 and all(line["data_seconds"] >= 0.02 for line in lines)
    resident = int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) / 2**20
    assert lines[-1]["memory_gib"] == pytest.approx(resident, rel=0.1)
    console = capsys.readouterr().out.splitlines()
    assert len(console) == 3 and all(re.search(r"data 0\.0\d\d s/step  \d+\.\d GiB", line) for line in console)


def test_quiet_training_prints_nothing(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("LTS_QUIET", "1")
    cfg = config(tmp_path, steps=2)
    train(cfg)
    assert capsys.readouterr().out == "" and (cfg.folder / "log.jsonl").read_text().count("\n") == 2


def test_micro_batches_equal_the_whole_batch(tmp_path):
    weights = []
    for devices in (1, 4):
        cfg = config(tmp_path / str(devices), steps=1, devices=devices)
        torch.manual_seed(0)
        method = Tiny(cfg, norm=nn.Identity, dropout=0.0)
        whole = torch.randn(8, 4, generator=torch.Generator().manual_seed(5))
        chunks = iter(whole.chunk(devices))
        fit(cfg, method, lambda step, c=chunks: {"labeled": ({"x": x} for x in c)}, device=CPU)
        weights.append(method.model[0].weight.detach())
    torch.testing.assert_close(*weights)


def test_norms_frozen_by_train_stay_as_they_are(tmp_path):
    class Frozen(nn.BatchNorm1d):
        def train(self, mode=True):
            return super().train(False)

    def run(norm):
        cfg = config(tmp_path / norm.__name__, steps=2)
        return train(cfg, Tiny(cfg, norm=norm))

    assert run(nn.BatchNorm1d)["model.1.num_batches_tracked"] == 2
    assert run(Frozen)["model.1.num_batches_tracked"] == 0


def test_non_finite_loss_updates_nothing_and_names_the_step(tmp_path):
    cfg = config(tmp_path, save_every=1)
    torch.manual_seed(0)
    method = Tiny(cfg, poison=3)
    with pytest.raises(NonFiniteLoss, match="step 4: not finite: loss"):
        fit(cfg, method, streams(cfg), device=CPU)
    cfg3 = config(tmp_path / "three", steps=20)
    torch.manual_seed(0)
    clean = Tiny(cfg3)
    with pytest.raises(SystemExit):
        fit(Config(**{**cfg3.__dict__, "eval": EvalConfig(every=3)}), clean, streams(cfg3), stop_at(3), device=CPU)
    names = [n for n, _ in clean.named_parameters()]
    assert all(torch.equal(method.get_parameter(n), clean.get_parameter(n)) for n in names)


def test_checkpoint_of_another_model_is_refused(tmp_path):
    cfg = config(tmp_path)
    train(cfg)
    method = Tiny(cfg)
    method.model[3] = nn.Linear(8, 2)
    with pytest.raises(ValueError, match="model.3"):
        fit(cfg, method, streams(cfg), device=CPU, resume=True)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_trains_and_resumes(tmp_path, precision):
    cfg = config(tmp_path / "a", precision=precision, save_every=10)
    whole = train(cfg)
    shutil.rmtree(cfg.folder / "checkpoints" / "step_00000020")
    assert_equal(whole, train(cfg, resume=True))


@pytest.fixture
def gpus(monkeypatch):
    """A machine that says it has four GPUs; returns the list of those that are made current."""
    taken = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    monkeypatch.setattr(distributed.dist, "init_process_group", lambda backend: None)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    return taken


@pytest.mark.parametrize(("asked", "index"), [(None, 0), ("cuda", 0), ("cuda:3", 3)])
def test_device_of_one_process(gpus, asked, index):
    assert distributed.start(asked) == torch.device("cuda", index) and gpus == [torch.device("cuda", index)]
    assert distributed.start("cpu") == CPU


def test_each_rank_takes_its_own_gpu(gpus, monkeypatch):
    for name, value in (("RANK", "6"), ("WORLD_SIZE", "8"), ("LOCAL_RANK", "2")):
        monkeypatch.setenv(name, value)
    for asked in (None, "cuda"):
        assert distributed.start(asked) == torch.device("cuda", 2)
    with pytest.raises(ValueError, match="--device cuda:0: 8 processes would share this GPU; give --device cuda,"):
        distributed.start("cuda:0")
    monkeypatch.setenv("LOCAL_RANK", "4")
    with pytest.raises(ValueError, match="--device cuda: GPU 4 is asked for, and torch finds 4"):
        distributed.start("cuda")


@pytest.mark.parametrize("asked", ["gpu", "cuda:first", "cuda0"])
def test_device_that_is_none(gpus, asked):
    with pytest.raises(ValueError, match=f"--device {asked}: give cpu, cuda or cuda:N"):
        distributed.start(asked)
    assert not gpus
