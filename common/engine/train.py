"""The training loop: next batches → method → backward → finite on every rank? → clip → step → log → evaluate → save."""

import contextlib
import signal
from collections.abc import Callable
from typing import Any

import torch

from common.config import Config
from common.engine import optim, runtime
from common.engine.logging import RunLog
from common.engine.method import Method
from common.engine.trainer import Streams, Trainer


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
