"""The training loop: next batches → method → backward → finite on every rank? → clip → step → log → evaluate → save."""

import contextlib
import signal
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from common import distributed
from common.config import Config
from common.engine import optim, runtime
from common.engine.logging import RunLog
from common.engine.method import Batch, Losses, Method, Parts
from common.engine.restore import Restorable

Streams = Mapping[str, Iterator[Batch]]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class NonFiniteLoss(ValueError):
    """A loss or gradient that is not finite; no rank has updated its weights."""


def fit(
    cfg: Config,
    method: Method,
    open_streams: Callable[[int], Streams],
    evaluate: Callable[[int], dict[str, Any] | None] | None = None,
    *,
    device: torch.device,
    resume: bool = False,
) -> int:
    """Train `method` for `cfg.train.steps` steps and return the last one; 11 steps, a kill, and 9 equal 20 to the bit.

    `open_streams(step)` gives the iterators from that step on, `evaluate(step)` metrics with `cfg.eval.best` among
    them (called on all ranks). Raises NonFiniteLoss; SIGTERM and SIGINT save a checkpoint and end the process.
    """
    runtime.configure(cfg.train, device)
    trainer = Trainer(cfg, method, device)
    step = trainer.resume() if resume else trainer.begin()
    log, streams = RunLog(cfg, step), open_streams(step)
    with runtime.stop_signals() as stopped, contextlib.closing(log):
        while step < cfg.train.steps:
            scalars = trainer.step(step, streams, stopped)
            step += 1
            last = step == cfg.train.steps
            if step % cfg.train.log_every == 0 or last:
                values = torch.stack([v.float() for v in scalars.values()]).tolist()
                log.train(step, dict(zip(scalars, values, strict=True)), optim.rates(trainer.optimizers))
            best = False
            if evaluate is not None and (step % cfg.eval.every == 0 or last):
                best = trainer.judge(evaluate(step), step, log)
            if best or last or stopped or step % cfg.train.save_every == 0:
                trainer.save(step, best)
            if stopped and not last:
                log.message(f"stopped by {signal.Signals(stopped[0]).name} at step {step}; go on with --resume")
                raise SystemExit(128 + stopped[0])
    return step


class Trainer(Restorable):
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
