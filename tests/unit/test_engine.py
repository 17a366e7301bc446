"""The loop and its checkpoints on a tiny method: resume, accumulation, parts, non-finite losses, signals."""

import json
import os
import shutil
import signal
from copy import deepcopy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from common import distributed
from common.config import Config, DataConfig, EvalConfig, ModelConfig, OptimConfig, StreamConfig, TrainConfig
from common.engine import Method, checkpoint, fit
from common.engine.method import move_average
from common.engine.trainer import NonFiniteLoss

CPU = torch.device("cpu")


class Tiny(Method):
    """Dropout, BN, a moving-average teacher and a counter: all that a checkpoint has to hold."""

    def __init__(self, cfg, parts=1, poison=None, norm=nn.BatchNorm1d, dropout=0.5):
        super().__init__(cfg.optim)
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


def test_a_stopped_run_resumes_to_the_bit(tmp_path):
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


def test_unwritable_folder_leaves_nothing_half_written(tmp_path, monkeypatch):
    cfg = config(tmp_path)
    method = Tiny(cfg)

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(OSError, match="cannot write the checkpoint.*No space left"):
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
