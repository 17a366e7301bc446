"""The trainer: what one optimiser step does, and how a run begins, saves and resumes."""

import contextlib
import json
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from common import distributed
from common.config import Config, to_tree
from common.engine import checkpoint, optim, runtime
from common.engine.logging import RunLog
from common.engine.method import Batch, Losses, Method, Parts

Streams = Mapping[str, Iterator[Batch]]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class NonFiniteLoss(ValueError):
    """A loss or gradient that is not finite; no rank has updated its weights."""


class Trainer:
    """The method with its optimisers: what one step does, and what a checkpoint holds besides weights."""

    def __init__(self, cfg: Config, method: Method, device: torch.device):
        self.cfg, self.method, self.device = cfg, method.train(), device  # `train` is where frozen norms are frozen
        self.optimizers = optim.build_optimizers(method.parameter_groups())
        self.parameters = [p for o in self.optimizers.values() for g in o.param_groups for p in g["params"]]
        self.parts: nn.Module = Parts(method)
        if distributed.world_size() > 1:
            self.parts = nn.parallel.DistributedDataParallel(self.parts, broadcast_buffers=False)
        self.scaler = torch.amp.GradScaler(device.type, enabled=cfg.train.precision == "fp16")
        self.accumulate = runtime.accumulation(cfg)
        self.best: float | None = None

    def step(self, step: int, streams: Streams, stopped: list[int]) -> dict[str, torch.Tensor]:
        """One optimiser step (0-based number `step`); returns device scalars, the loss and the gradient norm."""
        optim.set_learning_rates(self.optimizers, step, self.cfg.optim, self.cfg.train.steps)
        total: dict[str, torch.Tensor] = {}
        for micro in range(self.accumulate):
            batch = {name: runtime.to_device(next(stream), self.device) for name, stream in streams.items()}
            runtime.seed_step(self.cfg.seed, distributed.rank() + distributed.world_size() * micro, step)
            for name, value in self._backward(batch, step, micro == self.accumulate - 1).items():
                total[name] = total.get(name, 0) + value / self.accumulate
        for optimizer in self.optimizers.values():
            self.scaler.unscale_(optimizer)
        total["grad_norm"] = optim.clip_gradients(self.parameters, self.cfg.optim)
        self._check(total, step, stopped)
        for optimizer in self.optimizers.values():
            self.scaler.step(optimizer)
            optimizer.zero_grad(set_to_none=True)
        self.scaler.update()
        distributed.average_batchnorm(self.method)
        self.method.after_step(step)
        return total

    def _backward(self, batch: Mapping[str, Batch], step: int, last_micro: bool) -> Losses:
        """Back-propagate every part of one micro-batch; returns its detached scalars, the losses summed."""
        merged: Losses = {}
        dtype = DTYPES[self.cfg.train.precision]
        precision = torch.autocast(self.device.type, dtype, enabled=dtype != torch.float32)
        for part in range(self.method.backwards):
            last = last_micro and part == self.method.backwards - 1
            quiet = contextlib.nullcontext() if last or not hasattr(self.parts, "no_sync") else self.parts.no_sync()
            with quiet:
                with precision:
                    losses = self.parts(batch if part == 0 else None, step)
                self.scaler.scale(losses["loss"] / self.accumulate).backward()
            for name, value in losses.items():
                merged[name] = merged.get(name, 0) + value.detach()
        return merged

    def _check(self, total: Losses, step: int, stopped: list[int]) -> None:
        """The step's one host sync: is everything finite on every rank, and was any rank asked to stop?"""
        finite = torch.isfinite(total["loss"])
        if not self.scaler.is_enabled():  # fp16 overflows now and then; the scaler skips those steps itself
            finite = finite & torch.isfinite(total["grad_norm"])
        flags = torch.stack([(~finite).float(), torch.full_like(total["loss"], max(stopped, default=0)).float()])
        broken, stop = distributed.all_max(flags).tolist()
        if stop and not stopped:
            stopped.append(int(stop))
        if broken:
            terms = [name for name, value in total.items() if not torch.isfinite(value)]
            where = ", ".join(terms) if terms else "another rank"
            advice = "weights not updated (lower optim.lr or set optim.clip)"
            raise NonFiniteLoss(f"step {step + 1}: not finite: {where}; {advice}")

    def judge(self, result: dict[str, Any] | None, step: int, log: RunLog) -> bool:
        """Log an evaluation; whether it is the best so far."""
        if result is None:
            return False
        log.evaluation(step, result)
        score = result[self.cfg.eval.best]
        better = score is not None and (self.best is None or score > self.best)
        self.best = score if better else self.best
        return better

    def save(self, step: int, best: bool) -> None:
        if distributed.rank() == 0:
            folder = self.cfg.folder / "checkpoints"
            state = {
                "optimizers": {name: o.state_dict() for name, o in self.optimizers.items()},
                "scaler": self.scaler.state_dict(),
                "best": self.best,
                "threads": torch.get_num_threads(),
            }
            metadata = {"predict_prefix": self.method.predict_prefix, "config": json.dumps(to_tree(self.cfg))}
            path = checkpoint.save(folder, step, self.method, state, metadata)
            if best:
                checkpoint.link(folder, "best", path)
            checkpoint.prune(folder, self.cfg.train.keep)
        distributed.barrier()

    def begin(self) -> int:
        """Step 0 of a new run. ValueError where the folder holds an earlier one: nothing of it is overwritten."""
        earlier = checkpoint.steps(self.cfg.folder / "checkpoints")
        if earlier:
            raise ValueError(
                f"{self.cfg.folder}: holds an earlier run, up to {earlier[-1].name}; add --resume to go on with it, "
                "give this run another `name`, or remove the folder"
            )
        return 0

    def resume(self) -> int:
        """Restore the newest whole checkpoint of the run; 0 where there is none.

        Rates, decay and momentum are those of this run's config: they may differ from the checkpoint's. A ValueError
        says where its optimisers or their groups are others.
        """
        path = checkpoint.newest(self.cfg.folder / "checkpoints")
        if path is None:
            return 0
        state = checkpoint.restore(path, self.method)
        saved = state["optimizers"]
        theirs, ours = _layout(saved), _layout({name: o.state_dict() for name, o in self.optimizers.items()})
        if theirs != ours:
            raise ValueError(
                f"{path}: its optimisers are {theirs}, this config makes {ours} (group, tensors); resume with the "
                "optim.name and optim.groups of the run, or give this one another `name`"
            )
        for name, optimizer in self.optimizers.items():
            settings = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
            optimizer.load_state_dict(saved[name])
            for group, configured in zip(optimizer.param_groups, settings, strict=True):
                group.update(configured)
        self.scaler.load_state_dict(state["scaler"])
        self.best = state["best"]
        return state["step"]


def _layout(optimizers: Mapping[str, Mapping[str, Any]]) -> dict[str, list[tuple[str, int]]]:
    """Name and number of tensors of each group, in order, of each optimiser's state dict."""
    return {
        name: [(group["name"], len(group["params"])) for group in state["param_groups"]]
        for name, state in optimizers.items()
    }
