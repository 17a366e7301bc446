"""What surrounds a step: threads and determinism, seeds, moving batches, accumulation, and signals."""

import contextlib
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch

from common import distributed
from common.config import Config, ConfigError, ModelConfig, TrainConfig
from common.data.statistics import placeholder
from common.data.streams import check_division
from common.engine import checkpoint, optim, trackers
from common.engine.method import Batch, Method, MethodContext
from common.models import SegmentationModel
from common.models.pretrained.containers import find_weights


def configure(cfg: TrainConfig, device: torch.device) -> None:
    """Set CPU threads and deterministic algorithms: on the CPU always, on CUDA where `deterministic` asks for it."""
    if cfg.threads is not None:
        torch.set_num_threads(cfg.threads)

    exact = device.type == "cpu" or cfg.deterministic
    torch.use_deterministic_algorithms(exact, warn_only=device.type != "cpu")
    # It costs a pass over every empty tensor. (A property of the module's class, which no checker sees.)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.backends.cudnn.benchmark = not exact


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

    def load(self, streams: Mapping[str, Iterator[Batch]]) -> dict[str, Batch]:
        """The next batch of every stream, on the device."""
        start = time.perf_counter()
        batches = {name: next(stream) for name, stream in streams.items()}
        self._waited += time.perf_counter() - start
        return {name: to_device(batch, self.device) for name, batch in batches.items()}

    def step(self) -> None:
        """A step was done."""
        self._steps += 1

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
    _require_branch(cfg.train.branch)
    trackers.require(cfg)
    check_division(cfg.data, cfg.train.devices, distributed.world_size())

    with warnings.catch_warnings(), torch.device("meta"):
        warnings.simplefilter("ignore")  # they come when the method is built in earnest
        method = _built(cfg, build, MethodContext(placeholder(cfg.model.num_classes)))
        optim.build_optimizers(method.parameter_groups())

    if cfg.train.compile and not method.compiles:
        name = type(method).__name__
        raise ConfigError(
            f"{cfg.name}: train.compile: {name} runs the network in parts, set it to false"
        )


def _require_weights(cfg: ModelConfig) -> None:
    if cfg.checkpoint is not None and not Path(cfg.checkpoint).exists():
        raise ValueError(f"model.checkpoint: {cfg.checkpoint}: no such weight file")
    if isinstance(cfg.pretrained, str):
        try:
            find_weights(cfg.pretrained)
        except FileNotFoundError as error:
            raise ValueError(f"model.pretrained: {error}") from error


def _require_branch(path: str | None) -> None:
    if path is not None and not (Path(path) / checkpoint.WEIGHTS).is_file():
        raise ValueError(f"train.branch: {path}: no checkpoint; give a folder such as RUN/checkpoints/step_00001000")


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
    if cfg.train.channels_last:
        method = method.to(memory_format=torch.channels_last)

    if cfg.train.compile:
        for network in trained_networks(method):
            network.compile()

    return method


def _built(
    cfg: Config, build: Callable[[Config, MethodContext], Method], context: MethodContext
) -> Method:
    """The method, with an average of its weights where `train.ema` asks for one."""
    method = build(cfg, context)
    if cfg.train.ema is not None:
        method.keep_average(cfg.name)

    return method


def trained_networks(method: Method) -> list[SegmentationModel]:
    """The method's networks that learn: not its teachers, though one of them may be what predicts."""
    networks = [part for part in method.children() if isinstance(part, SegmentationModel)]
    return [
        network for network in networks if any(p.requires_grad for p in network.parameters())
    ]
