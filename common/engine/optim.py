"""Parameter groups by name, optimisers by group, and the learning-rate schedule as a function of the step."""

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from common.config import ConfigError, OptimConfig


def parameter_groups(module: nn.Module, cfg: OptimConfig) -> list[dict[str, Any]]:
    """Trainable parameters of `module` in groups: one for each rule of `cfg.groups` and one for the rest.

    The first rule whose regular expression is found in a parameter's name takes it. A rule that takes nothing is
    an error, since a misspelt rule silently trains with the wrong decay.
    """
    chosen: list[list[nn.Parameter]] = [[] for _ in range(len(cfg.groups) + 1)]
    patterns = [re.compile(group.match) for group in cfg.groups]

    frozen = [
        name for name, parameter in module.named_parameters() if not parameter.requires_grad
    ]
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            index = next(
                (i for i, pattern in enumerate(patterns) if pattern.search(name)), len(patterns)
            )
            chosen[index].append(parameter)

    groups = []

    for rule, parameters in zip((*cfg.groups, None), chosen, strict=True):
        if not parameters:
            # a rule for what is frozen, as a locked backbone, has nothing to do
            if rule is not None and not any(re.search(rule.match, name) for name in frozen):
                raise ConfigError(f"optim.groups: no parameter's name matches {rule.match!r}")
            continue

        groups.append(_group(parameters, cfg, rule))

    return groups


def _group(parameters: list[nn.Parameter], cfg: OptimConfig, rule: Any) -> dict[str, Any]:
    decay = cfg.weight_decay if rule is None or rule.weight_decay is None else rule.weight_decay
    group = {
        "params": parameters,
        "name": "rest" if rule is None else rule.match,
        "optimizer": cfg.name,
        "lr": cfg.lr * (1.0 if rule is None else rule.lr_mult),
        "weight_decay": decay,
    }
    if cfg.name == "sgd":
        return group | {"momentum": cfg.momentum, "nesterov": cfg.nesterov}

    return group | {"betas": cfg.betas}


OPTIMIZERS = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW, "adam": torch.optim.Adam}


def build_optimizers(groups: Iterable[dict[str, Any]]) -> dict[str, torch.optim.Optimizer]:
    """One optimiser for each name in the groups' "optimizer"; every group remembers its own initial lr."""
    by_name: dict[str, list[dict[str, Any]]] = {}
    for group in groups:
        group = {**group, "params": list(group["params"])}
        by_name.setdefault(group.pop("optimizer"), []).append(
            group | {"initial_lr": group["lr"]}
        )

    optimizers = {
        name: OPTIMIZERS[name](members, lr=members[0]["lr"], **_implementation(members))
        for name, members in by_name.items()
    }
    for optimizer in optimizers.values():
        _begin_momentum(optimizer)

    return optimizers


def _implementation(groups: list[dict[str, Any]]) -> dict[str, bool]:
    """All tensors in one operator: on CUDA the fused kernel, whose rounding is its own; elsewhere lists of tensors,
    which give the numbers of the loop over them bit for bit."""
    devices = {parameter.device.type for group in groups for parameter in group["params"]}
    return {"fused": True} if devices == {"cuda"} else {"foreach": True}


def _begin_momentum(optimizer: torch.optim.Optimizer) -> None:
    """Momentum 0 for every parameter of a fused SGD that has none yet, which gives the numbers of an SGD that begins.

    Torch's own beginning is memory as it comes, which the kernel leaves so where fp16 overflows in the first step, and
    an error for a parameter whose first gradient comes after those of others.
    """
    for group in optimizer.param_groups:
        if not (group["fused"] and group.get("momentum")):
            continue

        for parameter in group["params"]:
            state = optimizer.state[parameter]
            if state.get("momentum_buffer") is None:
                state["momentum_buffer"] = torch.zeros_like(parameter)


def restore(
    optimizers: dict[str, torch.optim.Optimizer], saved: Mapping[str, Any], where: Path
) -> None:
    """Load the state dicts `saved` by `where`, but keep the rates, decay and momentum of this run's config, and the
    kind of kernel that this device has.

    Raises ValueError where the optimisers or their groups are others.
    """
    theirs = _layout(saved)
    ours = _layout({name: o.state_dict() for name, o in optimizers.items()})
    if theirs != ours:
        raise ValueError(
            f"{where}: its optimisers are {theirs}, this config makes {ours} (group, tensors); resume with the "
            "optim.name and optim.groups of the run, or give this one another `name`"
        )

    for name, optimizer in optimizers.items():
        groups = [
            {**configured, "params": group["params"]}
            for configured, group in zip(
                optimizer.param_groups, saved[name]["param_groups"], strict=True
            )
        ]
        optimizer.load_state_dict({**saved[name], "param_groups": groups})
        _begin_momentum(optimizer)
        _arrange(optimizer)


def _arrange(optimizer: torch.optim.Optimizer) -> None:
    """Give the state the memory format of the weights, which the fused kernels need: it may be another run's."""
    for parameter, values in optimizer.state.items():
        for key, value in values.items():
            if value.shape == parameter.shape and value.stride() != parameter.stride():
                values[key] = torch.empty_like(parameter).copy_(value)


def _layout(states: Mapping[str, Mapping[str, Any]]) -> dict[str, list[tuple[str, int]]]:
    """Name and number of tensors of each group, in order, of each optimiser's state dict."""
    return {
        name: [(group["name"], len(group["params"])) for group in state["param_groups"]]
        for name, state in states.items()
    }


def learning_rate(initial: float, step: int, cfg: OptimConfig, steps: int) -> float:
    """The rate of 0-based `step`: poly (lr0 − floor)(1 − t/T)^power + floor, or steps; then linear warm-up."""
    if cfg.schedule == "poly":
        rate = (initial - cfg.floor) * (1 - step / steps) ** cfg.power + cfg.floor
    else:
        passed = (
            sum(step >= milestone for milestone in cfg.milestones)
            if cfg.schedule == "step"
            else 0
        )
        rate = initial * cfg.gamma**passed

    if step < cfg.warmup:
        rate *= 1 - (1 - step / cfg.warmup) * (1 - cfg.warmup_ratio)

    return rate


def set_learning_rates(
    optimizers: dict[str, torch.optim.Optimizer], step: int, cfg: OptimConfig, steps: int
) -> None:
    """Give every group the rate of `step`."""
    for optimizer in optimizers.values():
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(group["initial_lr"], step, cfg, steps)


def rates(optimizers: dict[str, torch.optim.Optimizer]) -> dict[str, float]:
    """Current rates by optimiser and group name, for the log."""
    return {
        f"{key}/{group['name']}": group["lr"]
        for key, opt in optimizers.items()
        for group in opt.param_groups
    }


def take_gradients(parameters: list[nn.Parameter]) -> list[torch.Tensor | None]:
    """The gradients, which the parameters then have no more: a backward pass that finds none leaves its own in their
    place, where it would else add to each of them in an operator of its own."""
    taken = [parameter.grad for parameter in parameters]
    for parameter in parameters:
        parameter.grad = None

    return taken


def add_gradients(
    parameters: list[nn.Parameter], before: Sequence[torch.Tensor | None]
) -> None:
    """Add `before`, of earlier backward passes, to the parameters' gradients, all together."""
    new: list[torch.Tensor] = []
    old: list[torch.Tensor] = []

    for parameter, gradient in zip(parameters, before, strict=True):
        if parameter.grad is None:
            parameter.grad = gradient
        elif gradient is not None:
            new.append(parameter.grad)
            old.append(gradient)

    if new:
        torch._foreach_add_(new, old)


def clip_gradients(
    parameters: list[nn.Parameter], cfg: OptimConfig, scaled: bool = False
) -> torch.Tensor:
    """Clip in place as `cfg` says and return the total L2 norm before clipping (a device scalar, no host sync).

    With both limits each gradient is clipped alone first, and the total norm is that of what remains. scaled: the loss
    had a scale, so gradients may have overflowed. The optimiser of such a gradient skips its step; those of the others
    do not, so what is clipped is the norm of the finite ones alone.
    """
    gradients = [p.grad for p in parameters if p.grad is not None]
    before = torch.nn.utils.get_total_norm(gradients)
    remaining = before

    if cfg.clip_each is not None:
        norms = torch.stack(torch._foreach_norm(gradients))
        scales = (cfg.clip_each / (norms + 1e-6)).clamp(max=1.0)
        torch._foreach_mul_(gradients, list(scales.unbind()))
        if cfg.clip is not None:
            remaining = torch.nn.utils.get_total_norm(gradients)

    if cfg.clip is not None and scaled:
        norms = torch.stack(torch._foreach_norm(gradients))
        remaining = torch.linalg.vector_norm(norms.where(norms.isfinite(), 0.0))

    if cfg.clip is not None:
        scale = (cfg.clip / (remaining + 1e-6)).clamp(max=1.0)
        torch._foreach_mul_(gradients, scale)

    return before
