"""Schedules against their closed forms, groups against names, clipping against torch, resuming with other settings."""

from itertools import repeat

import pytest
import torch
from torch import nn

from common.config import Config, ConfigError, GroupConfig, ModelConfig, OptimConfig, TrainConfig
from common.engine import fit, optim
from common.engine.optim import build_optimizers, clip_gradients, learning_rate, parameter_groups
from tests.contexts import BareMethod


def test_poly_has_an_absolute_floor():
    cfg = OptimConfig(schedule="poly", power=0.9, floor=1e-4)
    assert learning_rate(0.01, 0, cfg, 40000) == 0.01
    assert learning_rate(0.01, 20000, cfg, 40000) == pytest.approx((0.01 - 1e-4) * 0.5**0.9 + 1e-4)


@pytest.mark.parametrize("initial, step, expected", [(5e-4, 998, 4.950072e-4), (6e-3, 998, 5.940087e-3)])
def test_poly_gives_the_rates_of_published_logs(initial, step, expected):
    assert learning_rate(initial, step, OptimConfig(), 90000) == pytest.approx(expected, rel=1e-6)


def test_steps_and_warmup():
    cfg = OptimConfig(schedule="step", milestones=(60, 72), warmup=10, warmup_ratio=1e-3)
    got = [learning_rate(1.0, t, cfg, 80) for t in (0, 5, 10, 59, 60, 72)]
    assert got == pytest.approx([1e-3, 0.5005, 1.0, 1.0, 0.1, 0.01])


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.head = nn.Linear(2, 2), nn.LayerNorm(2), nn.Linear(2, 3)


def test_first_matching_rule_takes_a_parameter():
    rules = (GroupConfig("norm", weight_decay=0.0), GroupConfig("norm|head", lr_mult=10.0))
    groups = parameter_groups(Net(), OptimConfig(lr=0.1, weight_decay=0.01, groups=rules))
    assert [(len(g["params"]), g["lr"], g["weight_decay"]) for g in groups] == [
        (2, 0.1, 0.0), (2, 1.0, 0.01), (2, 0.1, 0.01),
    ]  # fmt: skip


def test_rule_without_parameters_is_an_error():
    with pytest.raises(ConfigError, match="no parameter's name matches 'nrom'"):
        parameter_groups(Net(), OptimConfig(groups=(GroupConfig("nrom"),)))


def test_a_rule_for_what_is_frozen_has_nothing_to_do():
    """As that of a backbone that model.options.lock_backbone freezes; one that others leave nothing to is an error."""
    net = Net()
    net.head.requires_grad_(False)
    groups = parameter_groups(net, OptimConfig(groups=(GroupConfig("head", lr_mult=10.0),)))
    assert [group["name"] for group in groups] == ["rest"]
    with pytest.raises(ConfigError, match="no parameter's name matches 'norm'"):
        parameter_groups(Net(), OptimConfig(groups=(GroupConfig("norm"), GroupConfig("norm"))))


def test_groups_name_their_optimizer():
    net = Net()
    groups = parameter_groups(net.conv, OptimConfig()) + [
        {"params": net.head.parameters(), "optimizer": "adam", "lr": 1e-4, "betas": (0.9, 0.99), "name": "adversary"}
    ]
    optimizers = build_optimizers(groups)
    assert isinstance(optimizers["sgd"], torch.optim.SGD) and isinstance(optimizers["adam"], torch.optim.Adam)
    assert optimizers["adam"].param_groups[0]["initial_lr"] == 1e-4


def test_total_clipping_equals_torch():
    nets = [Net(), Net()]
    nets[1].load_state_dict(nets[0].state_dict())
    for net in nets:
        (net.head(net.norm(net.conv(torch.tensor([[3.0, -2.0]])))).square().sum() * 50).backward()
    norm = clip_gradients(list(nets[0].parameters()), OptimConfig(clip=0.5))
    expected = nn.utils.clip_grad_norm_(nets[1].parameters(), 0.5)
    torch.testing.assert_close(norm, expected)
    for a, b in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_an_overflow_does_not_reach_the_gradients_of_another_optimiser(bad):
    """Its own optimiser skips the step; the other's gradients are clipped as if they were alone."""
    broken, other = (nn.Parameter(torch.zeros(9)) for _ in range(2))
    broken.grad, other.grad = torch.full((9,), bad), torch.ones(9)
    assert not clip_gradients([broken, other], OptimConfig(clip=1.0), scaled=True).isfinite()
    torch.testing.assert_close(other.grad, torch.ones(9) / 3, rtol=1e-5, atol=0)
    assert not broken.grad.isfinite().any()

    broken.grad = torch.ones(9)
    other.grad = torch.ones(9)
    assert clip_gradients([broken, other], OptimConfig(clip=1.0), scaled=True) == pytest.approx(18**0.5)
    torch.testing.assert_close(other.grad, torch.ones(9) / 18**0.5, rtol=1e-5, atol=0)


def test_each_gradient_can_be_clipped_alone():
    net = Net()
    (net.conv(torch.ones(1, 2)).sum() * 100).backward()
    clip_gradients(list(net.conv.parameters()), OptimConfig(clip_each=0.01))
    assert all(p.grad.norm() <= 0.01 + 1e-6 for p in net.conv.parameters())


def test_the_total_is_clipped_after_each_gradient():
    """Norms 3 and 4, each clipped to 1, have a total of √2; clipped to 1 they are 1/√2. The norm told is of before."""
    weights = [nn.Parameter(torch.zeros(n)) for n in (9, 16)]
    for weight in weights:
        weight.grad = torch.ones_like(weight)

    norm = clip_gradients(weights, OptimConfig(clip_each=1.0, clip=1.0))
    assert norm.item() == pytest.approx(5.0)
    assert [w.grad.norm().item() for w in weights] == pytest.approx([0.5**0.5, 0.5**0.5], rel=1e-5)


class Line(BareMethod):
    """Two weights, in groups of their own."""

    def __init__(self, cfg):
        super().__init__(cfg)
        self.slow, self.fast = (nn.Parameter(torch.ones(3)) for _ in range(2))

    def forward(self, streams, step):
        return {"loss": (self.slow + 2 * self.fast).sum()}


def run(folder, steps, resume=False, decay=0.1, mult=10.0, head="fast", **optim):
    rule = GroupConfig(head, lr_mult=mult, weight_decay=decay)
    cfg = Config(
        name="line", output=str(folder), model=ModelConfig("none", 1), train=TrainConfig(steps=steps),
        optim=OptimConfig(**{"schedule": "constant", "groups": (rule,), "weight_decay": decay} | optim),
    )  # fmt: skip
    method = Line(cfg)
    fit(cfg, method, lambda step: {"x": repeat({})}, device=torch.device("cpu"), resume=resume)
    return method


def by_torch(stages):
    """The two weights after (steps, rate, multiplier, decay, momentum) of each stage, by one torch optimiser."""
    slow, fast = (torch.ones(3, requires_grad=True) for _ in range(2))
    optimizer = torch.optim.SGD([{"params": [fast]}, {"params": [slow]}], lr=1.0)
    for steps, rate, mult, decay, momentum in stages:
        for group, lr in zip(optimizer.param_groups, (mult * rate, rate), strict=True):
            group.update(lr=lr, weight_decay=decay, momentum=momentum)
        for _ in range(steps):
            slow.grad, fast.grad = torch.full((3,), 1.0), torch.full((3,), 2.0)
            optimizer.step()
    return slow, fast


@pytest.mark.parametrize(
    "changes, second",
    [
        ({}, (3, 0.01, 10.0, 0.1, 0.9)),
        ({"lr": 0.002}, (3, 0.002, 10.0, 0.1, 0.9)),
        ({"mult": 5.0, "decay": 0.0}, (3, 0.01, 5.0, 0.0, 0.9)),
        ({"momentum": 0.5}, (3, 0.01, 10.0, 0.1, 0.5)),
    ],
)
def test_a_resumed_run_takes_its_settings_from_the_config(tmp_path, changes, second):
    """The momentum buffers are the checkpoint's; rates, multipliers, decay and momentum are not."""
    run(tmp_path, 2, lr=0.01)
    method = run(tmp_path, 5, resume=True, **{"lr": 0.01} | changes)
    slow, fast = by_torch([(2, 0.01, 10.0, 0.1, 0.9), second])
    torch.testing.assert_close(method.slow, slow)
    torch.testing.assert_close(method.fast, fast)


@pytest.mark.parametrize("changes, words", [({"name": "adamw"}, "'adamw'"), ({"head": "slow"}, "'slow', 1")])
def test_other_optimisers_or_groups_cannot_be_resumed(tmp_path, changes, words):
    run(tmp_path, 1, lr=0.01)
    with pytest.raises(ValueError, match=words) as error:
        run(tmp_path, 2, resume=True, lr=0.01, **changes)
    assert "\n" not in str(error.value)


# All tensors together -------------------------------------------------------------------------------------------------


def updates(make, name: str, steps: int = 4) -> list[torch.Tensor]:
    """Weights after some updates with random gradients, by the optimisers that `make` gives for parameter groups."""
    generator = torch.Generator().manual_seed(1)
    weights = [nn.Parameter(torch.randn(size, generator=generator)) for size in ((7, 3), (5,), (2, 3, 3))]
    common = {"optimizer": name, "lr": 0.02}
    common |= {"momentum": 0.9} if name == "sgd" else {"betas": (0.9, 0.99)}
    groups = [
        {"params": weights[:1], "weight_decay": 0.1, "name": "a", **common},
        {"params": weights[1:], "weight_decay": 0.0, "name": "b", **common},
    ]
    optimizer = make(groups)[name]
    for _ in range(steps):
        for weight in weights:
            weight.grad = torch.randn(weight.shape, generator=generator)
        optimizer.step()

    return weights


def by_loops(groups) -> dict[str, torch.optim.Optimizer]:
    """Torch's own, one tensor after the other."""
    name = groups[0]["optimizer"]
    plain = [{key: value for key, value in group.items() if key != "optimizer"} for group in groups]
    return {name: optim.OPTIMIZERS[name](plain, lr=1.0, foreach=False)}


@pytest.mark.parametrize("name", ["sgd", "adam", "adamw"])
def test_updates_of_all_tensors_together_are_those_of_each(name):
    """Bit for bit on the CPU."""
    pairs = zip(updates(build_optimizers, name), updates(by_loops, name), strict=True)
    assert all(torch.equal(ours, theirs) for ours, theirs in pairs)


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_a_run_goes_on_with_the_kernels_of_its_device(tmp_path, monkeypatch, name):
    """Saved where lists are updated, resumed where one fused kernel is."""
    whole = run(tmp_path / "whole", 4, lr=0.01, name=name)
    run(tmp_path / "parts", 2, lr=0.01, name=name)
    monkeypatch.setattr(optim, "_implementation", lambda groups: {"fused": True})
    seen = []
    original = optim.restore
    monkeypatch.setattr(optim, "restore", lambda *args: seen.append(args[0]) or original(*args))
    method = run(tmp_path / "parts", 4, resume=True, lr=0.01, name=name)
    torch.testing.assert_close(method.fast, whole.fast)
    assert all(group["fused"] and not group["foreach"] for group in seen[0][name].param_groups)


def test_state_of_another_memory_format_is_arranged_anew(tmp_path):
    """A run that began before convolutions were channels last: fused kernels take tensors of one format alone."""

    def make(form):
        weight = nn.Parameter(torch.arange(48.0).view(2, 3, 2, 4).contiguous(memory_format=form))
        group = {"params": [weight], "optimizer": "sgd", "lr": 0.1, "momentum": 0.9, "name": "all"}
        return weight, build_optimizers([group])

    weight, before = make(torch.contiguous_format)
    weight.grad = weight.detach().clone()
    before["sgd"].step()
    other, after = make(torch.channels_last)
    optim.restore(after, {"sgd": before["sgd"].state_dict()}, tmp_path)
    [buffer] = (state["momentum_buffer"] for state in after["sgd"].state.values())
    assert buffer.stride() == other.stride() and torch.equal(buffer, weight.grad)


def weighed(monkeypatch, kind, count=2) -> tuple[list[nn.Parameter], torch.optim.Optimizer]:
    """Weights of 1 and an SGD with momentum, by one fused kernel or by lists."""
    monkeypatch.setattr(optim, "_implementation", lambda groups: {kind: True})
    weights = [nn.Parameter(torch.ones(64)) for _ in range(count)]
    group = {"params": weights, "optimizer": "sgd", "lr": 0.125, "momentum": 0.9, "name": "all"}
    return weights, build_optimizers([group])["sgd"]


@pytest.fixture
def garbage(monkeypatch):
    """Memory that nobody has written is NaN."""
    exact = torch.are_deterministic_algorithms_enabled()
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(exact)


def update(weights, optimizer, scaler, values) -> None:
    """One step of fp16 with gradients of these values at the loss's own scale; None: the weight has none."""
    for weight, value in zip(weights, values, strict=True):
        weight.grad = None if value is None else torch.full_like(weight, value) * scaler.get_scale()
    scaler.unscale_(optimizer)
    scaler.step(optimizer)
    scaler.update()


@pytest.mark.parametrize("first", [(float("inf"), 1.0), (1.0, None), (float("inf"), None)])
def test_a_fused_sgd_begins_as_any_other(monkeypatch, garbage, first):
    """Bit for bit: where fp16 skips the first step, and where the first gradient of a weight comes later."""
    results = []
    for kind in ("fused", "foreach"):
        weights, optimizer = weighed(monkeypatch, kind)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        scaler.scale(torch.ones(()))  # makes its scale
        for values in (first, (0.5, -2.0), (0.25, 3.0)):
            update(weights, optimizer, scaler, values)
        results.append([*weights, *(optimizer.state[weight]["momentum_buffer"] for weight in weights)])

    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*results, strict=True))


def test_a_fused_sgd_takes_a_checkpoint_without_all_momenta(monkeypatch, garbage, tmp_path):
    """As those of lists of tensors are, where a weight had no gradient yet."""
    results = []
    for kind in ("fused", "foreach"):
        weights, before = weighed(monkeypatch, "foreach")
        weights[0].grad = torch.ones(64)
        before.step()
        saved = before.state_dict()
        assert len(saved["state"]) == 1

        others, after = weighed(monkeypatch, kind)
        optim.restore({"sgd": after}, {"sgd": saved}, tmp_path)
        for weight in others:
            weight.grad = torch.ones(64)
        after.step()
        results.append(others)

    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*results, strict=True))


def test_a_run_of_fused_kernels_resumes_bit_for_bit(tmp_path, monkeypatch):
    monkeypatch.setattr(optim, "_implementation", lambda groups: {"fused": True})
    whole = run(tmp_path / "whole", 5, lr=0.01)
    run(tmp_path / "parts", 2, lr=0.01)
    method = run(tmp_path / "parts", 5, resume=True, lr=0.01)
    assert torch.equal(method.slow, whole.slow) and torch.equal(method.fast, whole.fast)


def test_gradients_of_parts_are_added_as_torch_adds_them():
    weights = [nn.Parameter(torch.randn(3)) for _ in range(3)]
    plain = [nn.Parameter(weight.detach().clone()) for weight in weights]

    def parts(of):
        yield (of[0] * 3.3).sum() + of[1].square().sum()
        yield of[0].square().sum()

    for loss in parts(plain):
        loss.backward()
    for loss in parts(weights):
        before = optim.take_gradients(weights)
        assert all(weight.grad is None for weight in weights)
        loss.backward()
        optim.add_gradients(weights, before)

    assert weights[2].grad is None
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(weights[:2], plain, strict=False))
