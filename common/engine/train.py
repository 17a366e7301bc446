"""The training loop: next batches → method → backward → finite on every rank? → clip → step → log → evaluate → save."""

import signal
from collections.abc import Callable
from typing import Any, NoReturn

import torch

from common import distributed
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
    """Train `method` for `cfg.train.steps` steps and return the last one; 11 steps, a kill, and 9 equal 20 bit for bit.

    It ends early where `cfg.train.patience` evaluations brought no better score.
    `open_streams(step)` gives the iterators from that step on, `evaluate(step)` metrics with `cfg.eval.best` among
    them (called on all ranks). Raises NonFiniteLoss; SIGTERM and SIGINT save a checkpoint and end the process.
    """
    runtime.configure(cfg.train, device)
    trainer = Trainer(cfg, method, device)
    begun = step = trainer.resume() if resume else trainer.begin()
    streams = open_streams(step)

    with runtime.stop_signals() as received, RunLog(cfg, step) as log:

        def validate() -> None:
            trainer.record(None if evaluate is None else evaluate(step), step, log)
            trainer.agree(received)

        if (
            evaluate is not None
            and trainer.saved(step)
            and trainer.due(step)
            and step not in trainer.scores
        ):
            validate()  # the run ended between this step's checkpoint and its evaluation

        while step < cfg.train.steps and not trainer.exhausted:
            scalars = trainer.step(step, streams, received)
            if cfg.train.compile and step == begun:
                log.message(f"first step: {trainer.costs.first:.1f} s, compilation included")
            step += 1
            last = step == cfg.train.steps
            due = evaluate is not None and trainer.due(step)

            if step % cfg.train.log_every == 0 or last:
                means = distributed.mean_scalars(scalars)
                log.train(step, means, optim.rates(trainer.optimizers), trainer.costs.read())

            if due or last or trainer.stop or step % cfg.train.save_every == 0:
                trainer.save(step)  # before the evaluation, whose failure then costs nothing

            if due:
                validate()

            if trainer.stop and not last:
                _stop(trainer.stop, step, log)

        if trainer.exhausted:
            log.message(f"ended at step {step}: {trainer.standstill}")

    return step


def _stop(number: int, step: int, log: RunLog) -> NoReturn:
    """End the process as the signal asks."""
    name = signal.Signals(number).name
    log.message(f"stopped by {name} at step {step}; continue with --resume")
    raise SystemExit(128 + number)
