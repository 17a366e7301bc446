"""The average of weights that predicts (`train.ema`), and the end of a run whose score no longer rises."""

from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from common.config import Config, ConfigError, EvalConfig, ModelConfig, config_of
from common.engine import checkpoint, fit, prepare
from common.engine.method import move_average
from common.models import build_model, load_model
from fully_sup.supervised import build_method
from tests.contexts import BareMethod, context
from tests.unit.tiny_method import CPU, assert_equal, config, stop_at, streams


class Averaged(BareMethod):
    """A network with batch norm; it keeps its state after every step to be compared with."""

    def __init__(self, cfg, _=None):
        super().__init__(cfg)
        self.model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 1))
        self.states = []

    def forward(self, streams, step):
        x = streams["labeled"]["x"]
        return {"loss": (self.model(x) - x.sum(1, keepdim=True)).square().mean()}

    def after_step(self, step):
        self.states.append(deepcopy(self.model.state_dict()))


def train(cfg, resume=False, **kwargs):
    method = prepare(cfg, Averaged, context(1), CPU)
    fit(cfg, method, streams(cfg), device=CPU, resume=resume, **kwargs)
    return method


def test_closed_form_of_the_average(tmp_path):
    """A recurrence over the states of all steps, in double precision; counts of batches are copied."""
    cfg = config(tmp_path, ema=0.8)
    torch.manual_seed(cfg.seed)
    expected = {name: value.double() for name, value in Averaged(cfg).model.state_dict().items()}
    method = train(cfg)

    for step, state in enumerate(method.states):
        momentum = min((1 + step) / (10 + step), 0.8)
        expected = {name: momentum * expected[name] + (1 - momentum) * state[name] for name in state}

    found = method.average.state_dict()
    assert found.pop("1.num_batches_tracked") == 20
    for name, value in found.items():
        torch.testing.assert_close(value.double(), expected[name], rtol=1e-5, atol=1e-6)
    assert not torch.allclose(found["1.running_var"], method.model[1].running_var)


def test_training_itself_is_the_same(tmp_path):
    plain = train(config(tmp_path / "a")).state_dict()
    state = train(config(tmp_path / "b", ema=0.9)).state_dict()
    assert_equal(plain, {name: value for name, value in state.items() if not name.startswith("average.")})


def test_a_stopped_run_resumes_bit_for_bit(tmp_path):
    whole = train(config(tmp_path / "a", ema=0.9)).state_dict()
    cfg = replace(config(tmp_path / "b", ema=0.9, save_every=100), eval=EvalConfig(every=11))
    with pytest.raises(SystemExit):
        train(cfg, evaluate=stop_at(11))
    assert_equal(whole, train(cfg, resume=True).state_dict())


def test_an_average_begins_at_the_weights_of_a_run_without_one(tmp_path):
    plain = train(config(tmp_path / "a", keep=10))
    fork = checkpoint.path_of(tmp_path / "a/tiny/checkpoints", 10)
    method = train(config(tmp_path / "b", steps=11, branch=str(fork), ema=0.5))
    for name in ("0.weight", "1.running_mean"):
        expected = (plain.states[9][name] + method.states[0][name]) / 2
        torch.testing.assert_close(method.average.state_dict()[name], expected)


def test_a_method_with_a_teacher_has_an_average_already(tmp_path):
    class Taught(Averaged):
        predict_prefix = "teacher."

    with pytest.raises(ConfigError, match="tiny: train.ema: Taught predicts with its teacher, an average of weights"):
        prepare(config(tmp_path, ema=0.9), Taught, context(1), CPU)


def test_it_predicts_and_a_checkpoint_opens_as_it(tmp_path):
    options = {"channels": 8, "auxiliary": False}
    model = ModelConfig("upernet", 3, "resnet18", norm="bn", options=options)
    cfg = replace(config(tmp_path, ema=0.5), model=model)
    method = prepare(cfg, build_method, context(3), CPU)
    for weight in method.average.parameters():
        weight.mul_(0.9)

    assert not any(p.requires_grad for p in method.average.parameters())
    images = torch.randint(0, 256, (1, 3, 32, 32), dtype=torch.uint8)
    method.eval()
    with torch.no_grad():
        assert torch.equal(method.predict(images), method.average.predict(images))
        path = checkpoint.save(tmp_path, 1, method, {}, {"predict_prefix": method.predict_prefix})
        assert_equal(load_model(model, path).state_dict(), method.average.state_dict())
    assert build_model(model).state_dict().keys() == method.average.state_dict().keys()


# The end of a run -----------------------------------------------------------------------------------------------------


def run(tmp_path, scores, patience, resume=False):
    """The steps that are evaluated in a run of 20 with these scores, every second step; and the run's config."""
    cfg = replace(config(tmp_path, save_every=100, patience=patience), eval=EvalConfig(every=2))
    seen = []

    def evaluate(step):
        seen.append(step)
        return {"miou": scores[step // 2 - 1]}

    train(cfg, resume=resume, evaluate=evaluate)
    return seen, cfg


@pytest.mark.parametrize("scores, patience, last", [
    ([0.1, 0.3, 0.2, 0.3, 0.2, 0.9, 0.0, 0.0, 0.0, 0.0], 3, 10),  # an equal score is no better one
    ([0.1, 0.3, 0.2, 0.4, 0.2, 0.2, 0.5, 0.0, 0.0, 0.9], 3, 20),
    ([None, None, 0.2, 0.1, None, 0.0, 0.0, 0.0, 0.0, 0.0], 3, 12),
    ([None] * 10, 4, 8),
    ([0.5] + [0.0] * 9, None, 20),
])  # fmt: skip
def test_a_run_ends_when_its_score_no_longer_rises(tmp_path, capsys, scores, patience, last):
    seen, cfg = run(tmp_path, scores, patience)
    assert seen[-1] == last
    assert (cfg.folder / "checkpoints/last").resolve().name == f"step_{last:08d}"
    said = f"ended at step {last}: no better eval.best (miou) in {patience} evaluations"
    assert (said in capsys.readouterr().out) == (last < 20)

    assert run(tmp_path, scores, patience, resume=True)[0] == []  # it has ended
    if last < 20:
        assert run(tmp_path, scores, None, resume=True)[0] == list(range(last + 2, 21, 2))


@pytest.mark.parametrize("override, words", [
    ({"ema": 1.0}, "train.ema: 1.0 is not below 1"),
    ({"ema": 0}, "train.ema: 0.0 is not above 0"),
    ({"patience": 0}, "train.patience: 0 is less than 1"),
])  # fmt: skip
def test_bounds(override, words):
    tree = {"model": {"name": "upernet", "num_classes": 2}, "train": override}
    with pytest.raises(ConfigError, match=words):
        config_of(tree, (), "run")
    assert isinstance(config_of({**tree, "train": {}}, (), "run"), Config)


class Copies(TorchDispatchMode):
    """The types in each list of tensors that is copied."""

    def __init__(self):
        super().__init__()
        self.types = []

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        if operator is torch.ops.aten._foreach_copy_.default:
            self.types.append({tensor.dtype for tensor in args[0]})
        return operator(*args, **(kwargs or {}))


@pytest.mark.parametrize("statistics, lists", [("averaged", 1), ("copied", 2), ("own", 0)])
def test_lists_of_buffers_are_of_one_type(statistics, lists):
    """CUDA would take a mixed one tensor by tensor."""
    student = nn.Sequential(nn.BatchNorm1d(3), nn.BatchNorm1d(4))
    with Copies() as copies:
        move_average(deepcopy(student), student, 0.8, statistics)
    assert len(copies.types) == lists and all(len(types) == 1 for types in copies.types)
