"""What surrounds a step: threads and determinism, seeds, moving batches, accumulation, and signals."""

import contextlib
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Final, TypeVar

import torch
from torch import nn

from common import distributed
from common.config import Config, ConfigError, ModelConfig, TrainConfig
from common.data.statistics import placeholder
from common.data.streams import check_division
from common.engine import checkpoint, optim, trackers
from common.engine.checkpoint import AVERAGE
from common.engine.method import Batch, Method, MethodContext
from common.models import SegmentationModel
from common.models.pretrained.containers import find_weights

RECORDED: Final = "reduce-overhead"  # of `train.compile`: CUDA graphs of what is compiled
Module = TypeVar("Module", bound=nn.Module)


def configure(cfg: TrainConfig, device: torch.device) -> None:
    """Set CPU threads and deterministic algorithms: on the CPU always, on CUDA where `deterministic` asks for it."""
    if cfg.threads is not None:
        torch.set_num_threads(cfg.threads)

    exact = device.type == "cpu" or cfg.deterministic
    torch.use_deterministic_algorithms(exact, warn_only=device.type != "cpu")
    # It costs a pass over every empty tensor. (A property of the module's class, which no checker sees.)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.backends.cudnn.benchmark = not exact
    use_tf32(cfg, device)


def use_tf32(cfg: TrainConfig, device: torch.device) -> None:
    """Let products of float32 on CUDA keep as many digits as `train.tf32` says. For training, and for every program
    that opens a trained network, which then says what it said in training. Without a GPU nothing is set: torch's one
    switch is for products on the CPU, too."""
    if device.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = cfg.tf32
        torch.backends.cudnn.allow_tf32 = cfg.tf32


def seed_step(seed: int, slot: int, step: int) -> None:
    """Seed torch's generators from (seed, slot, step): what is random inside a step needs no state to be saved."""
    mixed = (seed * 1_000_003 + slot) * 1_000_000_007 + step
    torch.manual_seed(mixed % (1 << 63))


def accumulation(cfg: Config) -> int:
    """Micro-batches a step: the batch is stated for `train.devices` processes, and fewer take turns."""
    world = distributed.world_size()
    devices = cfg.train.devices
    if devices % world and world % devices:
        raise ValueError(
            f"train.devices: {devices} is not a multiple of the {world} processes started"
        )

    return max(devices // world, 1)


def to_device(batch: Batch, device: torch.device) -> Batch:
    return {
        k: v.to(device, non_blocking=True) if isinstance(v, torch.Tensor) else v
        for k, v in batch.items()
    }


class Costs:
    """What steps cost: the time that they wait for data, and memory."""

    def __init__(self, device: torch.device):
        self.device = device
        self._waited = 0.0
        self._steps = 0
        self._began: float | None = None
        self.first: float | None = None  # seconds of the first step

    def load(self, streams: Mapping[str, Iterator[Batch]]) -> dict[str, Batch]:
        """The next batch of every stream, on the device."""
        start = time.perf_counter()
        self._began = self._began or start
        batches = {name: next(stream) for name, stream in streams.items()}
        self._waited += time.perf_counter() - start
        return {name: to_device(batch, self.device) for name, batch in batches.items()}

    def step(self) -> None:
        """A step was done, and its loss was waited for."""
        self._steps += 1
        if self.first is None and self._began is not None:
            self.first = time.perf_counter() - self._began

    def read(self) -> dict[str, float]:
        """`data_seconds` that a step waited for its batches, the mean since the last call, and `memory_gib`, the peak
        of the run so far: what torch allocated on this rank's GPU or, on the CPU, what this process held."""
        seconds = self._waited / max(self._steps, 1)
        self._waited = 0.0
        self._steps = 0
        return {
            "data_seconds": round(seconds, 5),
            "memory_gib": round(_peak_memory(self.device) / 2**30, 3),
        }


def _peak_memory(device: torch.device) -> int:
    """Bytes."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)

    import resource  # here, since Windows has none

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


@contextlib.contextmanager
def stop_signals() -> Iterator[list[int]]:
    """Collect SIGTERM and SIGINT in a list in place of dying in the middle of a step."""
    received: list[int] = []
    kinds = (signal.SIGTERM, signal.SIGINT)
    before = [
        signal.signal(kind, lambda number, frame: received.append(number)) for kind in kinds
    ]

    try:
        yield received
    finally:
        for kind, handler in zip(kinds, before, strict=True):
            signal.signal(kind, handler)


def rehearse(cfg: Config, build: Callable[[Config, MethodContext], Method]) -> None:
    """Refuse what cannot be trained before anything is read, counted or started: weights that are not there, batches
    that cannot be divided, and whatever the building of the method refuses (on the meta device, in a second).

    Raises ValueError.
    """
    _require_weights(cfg.model)
    _require_branch(cfg)
    trackers.require(cfg)
    check_division(cfg.data, cfg.train.devices, distributed.world_size())

    with warnings.catch_warnings(), torch.device("meta"):
        warnings.simplefilter("ignore")  # they come when the method is built in earnest
        method = _built(cfg, build, MethodContext(placeholder(cfg.model.num_classes)))
        optim.build_optimizers(method.parameter_groups())

    _require_compilation(cfg, method)


def _require_compilation(cfg: Config, method: Method) -> None:
    """ConfigError where `train.compile` would do nothing for this method, or could not do what it says."""
    where = f"{cfg.name}: train.compile"
    name = type(method).__name__
    if cfg.train.compile and method.uncompiled:
        raise ConfigError(f"{where}: {name} {method.uncompiled}, set it to false")
    if cfg.train.compile != RECORDED:
        return

    if not method.records:
        raise ConfigError(
            f"{where}: {RECORDED} has not been checked with {name}; set it to true"
        )
    if not torch.cuda.is_available():
        raise ConfigError(
            f"{where}: {RECORDED} records CUDA graphs, without a GPU set it to true"
        )


def _require_weights(cfg: ModelConfig) -> None:
    if cfg.checkpoint is not None and not Path(cfg.checkpoint).exists():
        raise ValueError(f"model.checkpoint: {cfg.checkpoint}: no such weight file")
    if isinstance(cfg.pretrained, str):
        try:
            find_weights(cfg.pretrained)
        except FileNotFoundError as error:
            raise ValueError(f"model.pretrained: {error}") from error


def _require_branch(cfg: Config) -> None:
    """ValueError where `train.branch` names no checkpoint. A run that has one of its own goes on without it."""
    path = cfg.train.branch
    if path is None or checkpoint.steps(cfg.folder / "checkpoints"):
        return
    if not (Path(path) / checkpoint.WEIGHTS).is_file():
        raise ValueError(
            f"train.branch: {path}: no checkpoint; give a folder such as RUN/checkpoints/step_00001000"
        )


def prepare(
    cfg: Config,
    build: Callable[[Config, MethodContext], Method],
    context: MethodContext,
    device: torch.device,
) -> Method:
    """The method on its device: weights seeded, BN synchronised over GPUs, memory format and compilation as asked for.

    Every rank builds the same weights. `compile` needs a C compiler on the CPU and Triton on CUDA.
    """
    torch.manual_seed(cfg.seed)
    method = _built(cfg, build, context)
    method = distributed.synchronise_batchnorm(method, cfg.model.norm, device).to(device)
    method = arranged(method, cfg.train.channels_last, device)
    mode = {"mode": RECORDED} if cfg.train.compile == RECORDED else {}

    if cfg.train.compile:
        for network in called_networks(method):
            network.compile(**mode)

    return method


def arranged(module: Module, channels_last: bool | None, device: torch.device) -> Module:
    """The module with its weights in the memory format that `train.channels_last` says; None: channels last on CUDA
    where convolutions hold most of the weights."""
    if channels_last is None:
        channels_last = device.type == "cuda" and is_convolutional(module)

    return module.to(memory_format=torch.channels_last) if channels_last else module


def is_convolutional(module: nn.Module) -> bool:
    """Whether convolutions hold most of the weights."""
    kernels = [part.weight for part in module.modules() if isinstance(part, nn.Conv2d)]
    weights = sum(parameter.numel() for parameter in module.parameters())
    return 2 * sum(kernel.numel() for kernel in kernels) > weights


def _built(
    cfg: Config, build: Callable[[Config, MethodContext], Method], context: MethodContext
) -> Method:
    """The method, with an average of its weights where `train.ema` asks for one."""
    method = build(cfg, context)
    if cfg.train.ema is not None:
        method.keep_average(cfg.name)

    return method


def called_networks(method: Method) -> list[SegmentationModel]:
    """The networks that a training step calls: students and teachers, not the average of `train.ema`, which predicts
    alone."""
    return [
        part
        for name, part in method.named_children()
        if isinstance(part, SegmentationModel) and name != AVERAGE.rstrip(".")
    ]
