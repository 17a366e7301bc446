"""The loop and its checkpoints on a tiny method: resume, accumulation, parts, non-finite losses, signals."""

import json
import re
import shutil
import signal
import time
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from common.config import Config, EvalConfig
from common.engine import checkpoint, fit
from common.engine.counters import BatchCounters
from common.engine.method import move_average
from common.engine.trainer import OVERFLOWS, NonFiniteLoss, Trainer
from common.losses.counts import RefreshedCounts
from tests.unit.remedy_examples import COUNTS
from tests.unit.tiny_method import CPU, Tiny, assert_equal, config, stop_at, streams, train


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


def test_a_branch_with_the_same_settings_is_the_run_itself(tmp_path):
    whole = train(config(tmp_path / "a"))
    fork = checkpoint.path_of(tmp_path / "a" / "tiny" / "checkpoints", 15)
    branch = train(config(tmp_path / "b", branch=str(fork)))
    assert_equal(whole, branch)


def test_a_branch_is_a_run_of_its_own(tmp_path):
    """It resumes from its own checkpoints, and its scores are its own."""
    train(config(tmp_path / "a"), evaluate=lambda step: {"miou": 0.9})
    fork = checkpoint.path_of(tmp_path / "a" / "tiny" / "checkpoints", 10)
    cfg = replace(config(tmp_path / "b", branch=str(fork)), eval=EvalConfig(every=5))
    with pytest.raises(SystemExit):
        train(cfg, evaluate=stop_at(15), resume=True)
    assert checkpoint.newest(cfg.folder / "checkpoints").name == "step_00000015"
    assert min(checkpoint.read_scores(cfg.folder / "checkpoints", 20, "miou")) > 10

    whole = train(config(tmp_path / "c", branch=str(fork)))
    assert_equal(whole, train(cfg, resume=True))


def test_a_branch_without_a_step_left_is_refused(tmp_path):
    train(config(tmp_path / "a"))
    last = tmp_path / "a" / "tiny" / "checkpoints" / "last"
    with pytest.raises(ValueError, match="is of step 20, so nothing is left of 20 steps; raise train.steps"):
        train(config(tmp_path / "b", branch=str(last)))


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


class Looking(Tiny):
    """Each part first looks at its batch without a graph, as where a network labels images for itself."""

    def __init__(self, cfg, parts):
        super().__init__(cfg, parts, norm=nn.Identity, dropout=0.0)

    def term(self, x, step):
        with torch.no_grad():
            self.model(x)
        return super().term(x, step)


class Casts(TorchDispatchMode):
    """Counts how often each of some weights is cast."""

    def __init__(self, weights):
        super().__init__()
        self.of = {id(weight): 0 for weight in weights}

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        if operator is torch.ops.aten._to_copy.default and id(args[0]) in self.of:
            self.of[id(args[0])] += 1
        return operator(*args, **(kwargs or {}))


@pytest.mark.parametrize("parts, micro", [(1, 1), (3, 1), (2, 2)])
def test_weights_are_cast_once_a_step(tmp_path, parts, micro):
    """By all parts and micro-batches; gradients are, bit for bit, those of an autocast for each."""
    cfg = config(tmp_path, precision="bf16", devices=micro)
    trainer = Trainer(cfg, Looking(cfg, parts), CPU)
    method = trainer.method
    batches = [torch.randn(4, 4) for _ in range(micro)]
    expected = [torch.zeros_like(weight) for weight in trainer.parameters]
    for x in batches:
        for _ in range(parts):
            with torch.autocast("cpu", torch.bfloat16):
                loss = method.term(x, 0)["loss"] / micro
            found = torch.autograd.grad(loss, trainer.parameters)
            expected = [sum_ + gradient for sum_, gradient in zip(expected, found, strict=True)]

    for _ in range(2):
        with Casts(trainer.parameters) as casts:
            trainer._gradients(0, {"labeled": iter([{"x": x} for x in batches])})
        assert set(casts.of.values()) == {1}
        assert all(torch.equal(p.grad, sum_) for p, sum_ in zip(trainer.parameters, expected, strict=True))
        for weight in trainer.parameters:
            weight.grad = None


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


class Kept(nn.BatchNorm1d):
    """Without momentum: its statistics are the mean of all, which needs the number of passes."""

    def __init__(self, channels):
        super().__init__(channels, momentum=None)


@pytest.mark.parametrize("norm, counted", [(nn.BatchNorm1d, 3), (Kept, 9)])
def test_batch_norm_counts_steps(tmp_path, norm, counted):
    """Not the three passes of each, except where the counter is of use; the teacher has the student's."""
    cfg = config(tmp_path, steps=3)
    state = train(cfg, Tiny(cfg, parts=3, norm=norm))
    counters = {int(state[f"{net}.1.num_batches_tracked"]) for net in ("model", "teacher")}
    assert counters == {counted}
    passes = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8))
    passes[1].num_batches_tracked.fill_(7)
    with BatchCounters(passes).held():
        for _ in range(3):
            passes(torch.randn(4, 4))
    assert int(passes[1].num_batches_tracked) == 8 and "1.num_batches_tracked" in passes.state_dict()


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


class NoSlope(Tiny):
    """Its loss is finite, and the gradient never is: that of √x at 0."""

    def term(self, x, step):
        return {"loss": (0 * self.model(x)).sum().sqrt()}


def test_a_gradient_that_is_never_finite_ends_a_run_in_half_precision(tmp_path):
    """Not at its first steps, which fp16 may skip, but before a scale has been lowered for ever."""
    cfg = config(tmp_path, steps=200, precision="fp16")
    with pytest.raises(NonFiniteLoss, match=f"step {OVERFLOWS}: not finite: grad_norm"):
        train(cfg, NoSlope(cfg))


@pytest.mark.parametrize(("before", "after"), [(0, 2), (2, 0)])
def test_a_branch_into_remedies_and_out_of_them(tmp_path, before, after):
    """Counts of pseudo-labels, which only one of the two has, begin at 0 or are left out; nothing else may differ."""
    methods = []
    for every in (before, after):
        method = Tiny(config(tmp_path))
        method.loss = nn.Module()
        method.loss.counts = RefreshedCounts(COUNTS, every)
        methods.append(method)

    first, second = methods
    for buffer in first.loss.counts.buffers():
        buffer += 7
    path = checkpoint.save(tmp_path, 1, first, {}, {})
    checkpoint.restore(path, second)
    assert torch.equal(second.model[0].weight, first.model[0].weight)
    if after:
        assert not second.loss.counts.running.any() and not second.loss.counts.pseudo.any()
    second.register_buffer("further", torch.zeros(1))
    with pytest.raises(ValueError, match="1 tensors differ: further"):
        checkpoint.restore(path, second)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_trains_and_resumes(tmp_path, precision):
    cfg = config(tmp_path / "a", precision=precision, save_every=10)
    whole = train(cfg)
    shutil.rmtree(cfg.folder / "checkpoints" / "step_00000020")
    assert_equal(whole, train(cfg, resume=True))
