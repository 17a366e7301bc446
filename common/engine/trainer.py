"""The trainer: what one optimiser step does, and how a run begins, saves and resumes."""

import contextlib
import json
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from common import distributed
from common.config import Config, to_tree
from common.engine import checkpoint, optim, runtime
from common.engine.counters import BatchCounters
from common.engine.logging import RunLog
from common.engine.method import Batch, Losses, Method, Parts
from common.files import link

Streams = Mapping[str, Iterator[Batch]]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class NonFiniteLoss(ValueError):
    """A loss or gradient that is not finite; no rank has updated its weights."""


OVERFLOWS = 64  # steps in a row; a scale of 2^16 has become one of 2^-48 then, at which nothing overflows


class Trainer:
    """The method with its optimisers: what one step does, and what a checkpoint holds besides weights."""

    def __init__(self, cfg: Config, method: Method, device: torch.device):
        self.cfg = cfg
        self.method = method.train()  # where frozen norms are frozen
        self.device = device
        self.optimizers = optim.build_optimizers(method.parameter_groups())
        self.parameters = [
            p for o in self.optimizers.values() for g in o.param_groups for p in g["params"]
        ]
        self.counters = BatchCounters(method)
        self.source = Parts(method)
        self.parts: nn.Module = self.source
        if distributed.world_size() > 1:
            self.parts = distributed.data_parallel(self.source)

        self.scaler = torch.amp.GradScaler(device.type, enabled=cfg.train.precision == "fp16")
        self.accumulate = runtime.accumulation(cfg)
        self.costs = runtime.Costs(device)
        self.scores: checkpoint.Scores = {}
        # steps in a row that fp16 has skipped
        self.overflows = torch.zeros((), device=device)
        self.stop = 0  # the signal that a rank was sent, once all ranks know of it

    def step(self, step: int, streams: Streams, received: list[int]) -> dict[str, torch.Tensor]:
        """One optimiser step (0-based number `step`); returns device scalars, the loss and the gradient norm.

        received: the signals that this rank was sent.
        """
        if self.cfg.train.compile == runtime.RECORDED:
            torch.compiler.cudagraph_mark_step_begin()

        optim.set_learning_rates(self.optimizers, step, self.cfg.optim, self.cfg.train.steps)
        with self.counters.held():
            total = self._gradients(step, streams)

        for optimizer in self.optimizers.values():
            self.scaler.unscale_(optimizer)

        scaled = self.scaler.is_enabled()
        total["grad_norm"] = optim.clip_gradients(self.parameters, self.cfg.optim, scaled)
        self._check(total, step, received)

        for optimizer in self.optimizers.values():
            self.scaler.step(optimizer)
            optimizer.zero_grad(set_to_none=True)

        self.scaler.update()
        distributed.average_batchnorm(self.method)
        self.method.after_step(step)
        if self.cfg.train.ema is not None:
            self.method.update_average(self.cfg.train.ema, step)
        self.costs.step()

        return total

    def _gradients(self, step: int, streams: Streams) -> Losses:
        """Back-propagate all micro-batches of the step; returns the means of their scalars."""
        total: Losses = {}

        with self._casts_kept():
            for micro in range(self.accumulate):
                batch = self.costs.load(streams)
                slot = distributed.rank() + distributed.world_size() * micro
                runtime.seed_step(self.cfg.seed, slot, step)
                found = self._backward(batch, step, micro == self.accumulate - 1)
                _add(total, {name: self._share(value) for name, value in found.items()})

        return total

    def _casts_kept(self) -> torch.autocast:
        """A context in which autocast casts a weight once, whatever the number of passes: it forgets its casts where
        the outermost context ends, which would be that of each part. It must end before the weights change. Backward
        passes and the loading of batches are not under autocast, so it is switched off but in the parts."""
        return torch.autocast(self.device.type, enabled=False)

    def _share(self, value: torch.Tensor) -> torch.Tensor:
        """What a micro-batch has in the step's mean."""
        return value if self.accumulate == 1 else value / self.accumulate

    def _backward(self, batch: Mapping[str, Batch], step: int, last_micro: bool) -> Losses:
        """Back-propagate every part of one micro-batch; returns its detached scalars, the losses summed."""
        merged: Losses = {}
        dtype = DTYPES[self.cfg.train.precision]
        precision = torch.autocast(self.device.type, dtype, enabled=dtype != torch.float32)

        for part in range(self.method.backwards):
            last = last_micro and part == self.method.backwards - 1
            with self._synchronised(last):
                with precision:
                    losses = self.parts(batch if part == 0 else None, step)
                self._back_propagate(self.scaler.scale(self._share(losses["loss"])))

            _add(merged, {name: value.detach() for name, value in losses.items()})

        self.source.finish()

        return merged

    def _back_propagate(self, loss: torch.Tensor) -> None:
        """Add the gradients of one part to those of the parts before. DDP adds them itself, as it averages the sum."""
        if isinstance(self.parts, DistributedDataParallel):
            loss.backward()
            return

        before = optim.take_gradients(self.parameters)
        loss.backward()
        optim.add_gradients(self.parameters, before)

    def _synchronised(self, last: bool) -> contextlib.AbstractContextManager[None]:
        """Where a backward pass averages gradients over the ranks: in the last one of a step alone."""
        if last or not isinstance(self.parts, DistributedDataParallel):
            return contextlib.nullcontext()
        return self.parts.no_sync()

    def _check(self, total: Losses, step: int, received: list[int]) -> None:
        """The step's one host sync: is everything finite on every rank, and was any rank asked to stop?"""
        if self.scaler.is_enabled():
            # fp16 overflows now and then; the scaler skips those steps itself, and lowers the scale of the loss
            skipped = ~torch.isfinite(total["grad_norm"])
            self.overflows = (self.overflows + 1) * skipped
            finite = torch.isfinite(total["loss"]) & (self.overflows < OVERFLOWS)
        else:
            finite = torch.isfinite(torch.stack([total["loss"], total["grad_norm"]])).all()

        asked = torch.full_like(total["loss"], max(received, default=0))
        flags = torch.stack([(~finite).float(), asked.float()])
        broken, stop = distributed.all_max(flags).tolist()
        self.stop = int(stop)
        if broken:
            terms = [name for name, value in total.items() if not torch.isfinite(value)]
            where = ", ".join(terms) if terms else "another rank"
            advice = "weights not updated (lower optim.lr or set optim.clip)"
            raise NonFiniteLoss(f"step {step + 1}: not finite: {where}; {advice}")

    def due(self, step: int) -> bool:
        """Whether the run is evaluated after `step` steps."""
        return step % self.cfg.eval.every == 0 or step == self.cfg.train.steps

    def record(self, result: Mapping[str, Any] | None, step: int, log: RunLog) -> None:
        """Log an evaluation of the checkpoint of `step` and record its score; `best` points at the highest one's."""
        if result is None:
            return

        log.evaluation(step, result)
        score = result[self.cfg.eval.best]
        self.scores[step] = score if checkpoint.is_score(score) else None

        if distributed.rank() == 0:
            checkpoint.write_scores(self.folder, self.scores, self.cfg.eval.best)
            checkpoint.link_best(self.folder, self.scores)
            self._prune(step)

    @property
    def exhausted(self) -> bool:
        """Whether as many evaluations as `train.patience` says have passed without a new best score."""
        patience = self.cfg.train.patience
        return (
            patience is not None and checkpoint.evaluations_since_best(self.scores) >= patience
        )

    @property
    def standstill(self) -> str:
        """What ends a run that is exhausted, in words."""
        score, patience = self.cfg.eval.best, self.cfg.train.patience
        return f"no better eval.best ({score}) in {patience} evaluations"

    def agree(self, received: list[int]) -> None:
        """Learn whether any rank was asked to stop while no step was done, as in an evaluation."""
        number = torch.tensor(float(max(received, default=0)), device=self.device)
        self.stop = int(distributed.all_max(number).item())

    # Checkpoints ----------------------------------------------------------------------------------------------------

    @property
    def folder(self) -> Path:
        return self.cfg.folder / "checkpoints"

    def saved(self, step: int) -> bool:
        """Whether this run has a checkpoint of `step`."""
        return checkpoint.path_of(self.folder, step).is_dir()

    def save(self, step: int) -> None:
        """Write the checkpoint of `step`, on rank 0."""
        if distributed.rank() == 0:
            state = {
                "optimizers": {name: o.state_dict() for name, o in self.optimizers.items()},
                "scaler": self.scaler.state_dict(),
                "threads": torch.get_num_threads(),
            }
            metadata = {
                "predict_prefix": self.method.predict_prefix,
                "config": json.dumps(to_tree(self.cfg)),
                "class_pixels": json.dumps(self.method.class_pixels),
            }
            checkpoint.save(self.folder, step, self.method, state, metadata)
            self._prune(step)

        distributed.barrier()

    def _prune(self, step: int) -> None:
        best = checkpoint.best_step(self.scores)
        checkpoint.prune(self.folder, self.cfg.train.keep, best, step)

    def begin(self) -> int:
        """The first step of a new run: 0, or that of `train.branch`. ValueError where its folder holds one already."""
        checkpoint.refuse_earlier(self.cfg.folder)
        return self._branch()

    def _branch(self) -> int:
        """Go on from another run's checkpoint as if it had been this run's own; its step, 0 where none is named."""
        if self.cfg.train.branch is None:
            return 0

        step = self._restore(Path(self.cfg.train.branch))
        if step >= self.cfg.train.steps:
            raise ValueError(
                f"train.branch: {self.cfg.train.branch} is of step {step}, so nothing is left of "
                f"{self.cfg.train.steps} steps; raise train.steps"
            )

        return step

    def _restore(self, path: Path) -> int:
        """Weights, optimisers and loss scale of a checkpoint; its step."""
        state = checkpoint.restore(path, self.method)
        optim.restore(self.optimizers, state["optimizers"], path)
        self._restore_scaler(state["scaler"], path)

        return state["step"]

    def resume(self) -> int:
        """Restore the newest whole checkpoint of the run and return its step; `begin`'s where the run has none yet.

        Rates, decay and momentum are those of this run's config: they may differ from the checkpoint's. Raises
        ValueError where all checkpoints are damaged, or are of another method, model or optimiser.
        """
        path = checkpoint.newest(self.folder)
        if path is None:
            return self._branch()

        step = self._restore(path)
        self.scores = checkpoint.read_scores(self.folder, step, self.cfg.eval.best)
        # a kill may have come between a checkpoint and the links to it
        if distributed.rank() == 0:
            link(self.folder / "last", path)
            checkpoint.link_best(self.folder, self.scores)

        return step

    def _restore_scaler(self, state: Mapping[str, Any], path: Path) -> None:
        """The loss scale of fp16; other precisions have none, and may be changed from or to."""
        if bool(state) == self.scaler.is_enabled():
            self.scaler.load_state_dict(dict(state))
        elif distributed.rank() == 0:
            what = (
                "has no loss scale, fp16 starts with a fresh one"
                if not state
                else "its loss scale is left out"
            )
            warnings.warn(f"{path}: saved with another train.precision: {what}", stacklevel=2)


def _add(total: Losses, more: Losses) -> None:
    """Add scalars to those of the same name."""
    for name, value in more.items():
        total[name] = total[name] + value if name in total else value
