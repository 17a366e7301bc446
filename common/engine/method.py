"""The contract between a paper's method and the engine."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, Literal, cast

import numpy as np
import torch
from torch import Tensor, nn

from common.config import Config, ConfigError, pick, typed
from common.data import DatasetRow, Statistics
from common.engine.checkpoint import AVERAGE, MODEL
from common.engine.optim import parameter_groups
from common.losses.build import LossContext, Taken, build_loss
from common.losses.counts import Counts
from common.losses.pixel_loss import PixelLoss
from common.models import SegmentationModel
from common.models.cosine import cosine_scale

Batch = Mapping[str, Any]  # collated samples of one stream
Losses = dict[str, Tensor]  # "loss" is back-propagated, every other scalar is logged


@dataclass(frozen=True)
class MethodContext:
    """What a method may ask of its training data: class statistics of the labels that say what is rare; their row; the
    share of the draws that the sampler gives each of their images, float64 (N,), None where all are alike."""

    statistics: Statistics
    row: DatasetRow | None = None
    shares: np.ndarray | None = None

    @property
    def counts(self) -> Counts:
        """Of each class in the data set."""
        return Counts.from_statistics(self.statistics)

    @property
    def sampled(self) -> Counts:
        """The same as the sampler shows the images."""
        return Counts.from_statistics(self.statistics, self.shares)


IN_PARTS = "runs the network in parts"  # so that a compiled call of it would never be used


class Method(nn.Module, ABC):
    """One paper: it owns its networks, and its `state_dict()` is all that a resume restores.

    `forward(streams, step)` returns a dict with "loss" and scalars to log, or is a generator of `backwards` such
    dicts: the engine back-propagates each before it asks for the next, so the graph of one is freed before that of
    the next is built. Only the last one synchronises ranks, so it must reach every trained parameter.
    Randomness comes from torch's global generators, which the engine seeds by (seed, rank, step).
    """

    Options: type[Any]  # the dataclass of the section `method`, without its `name`
    options: Any  # an instance of it
    backwards = 1
    # why `train.compile`, which compiles the call of the network, is refused
    uncompiled: str | None = None
    # True: checked that `train.compile: reduce-overhead` may record the network's calls, each of which overwrites what
    # the one before gave
    records = False
    # of images without labels, if not from confident answers of a network
    labels_from: str | None = None
    predict_prefix = MODEL  # where the network that `predict` uses stands in the state dict

    def __init__(self, cfg: Config, context: MethodContext):
        super().__init__()
        self.options = self.options_of(cfg)
        self.optim = cfg.optim
        self.steps = cfg.train.steps
        # of the training labels; checkpoints tell them
        self.class_pixels = context.statistics.pixel_count.tolist()

    @classmethod
    def options_of(cls, cfg: Config) -> Any:
        """The section `method` as an instance of `Options`. ConfigError for what does not fit."""
        section = {key: value for key, value in cfg.method.items() if key != "name"}
        return typed(cls.Options, section, f"{cfg.name}: method")

    @classmethod
    def takes(cls, cfg: Config) -> Taken:
        """What it takes of the section `remedies`, with the other sections as they are."""
        return Taken()

    @abstractmethod
    def forward(self, streams: Mapping[str, Batch], step: int) -> Losses | Iterator[Losses]:
        """The losses of one micro-batch of every stream at 0-based `step`."""

    def after_step(self, step: int) -> None:
        """What follows the optimiser's step: a teacher's moving average, queues, counts."""

    def keep_average(self, where: str) -> None:
        """From now on a moving average of the network's weights is what predicts (`train.ema`).

        Raises ConfigError, which begins with `where`, for a method that has a teacher to predict.
        """
        if self.predict_prefix != MODEL:
            name = type(self).__name__
            raise ConfigError(
                f"{where}: train.ema: {name} predicts with its teacher, an average of weights already; set it to null"
            )

        self.average = deepcopy(self.network).requires_grad_(False)
        self.predict_prefix = AVERAGE

    def update_average(self, momentum: float, step: int) -> None:
        """Move the average after 0-based `step`. Its momentum grows as (1 + t) / (10 + t) up to `momentum`, so that the
        weights at the start are forgotten in a short run, too."""
        network = self.get_submodule(MODEL.rstrip("."))
        move_average(self.average, network, min((1 + step) / (10 + step), momentum))

    @property
    def network(self) -> SegmentationModel:
        """The network that `predict` uses."""
        return cast(SegmentationModel, self.get_submodule(self.predict_prefix.rstrip(".")))

    def predict(self, images: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        """Class scores (B, K, H, W) of images (B, 3, h, w) in 0–255, at `size` or the input's."""
        return self.network.predict(images, size)

    def labels(
        self, images: Tensor, size: tuple[int, int] | None = None, offsets: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Predicted class and confidence, both (B, H, W), without a K-channel map at full size. offsets: (K,), of
        post-hoc logit adjustment."""
        return self.network.labels(images, size, offsets)

    def bands(
        self, images: Tensor, size: tuple[int, int] | None = None, offsets: Tensor | None = None
    ) -> Iterator[tuple[tuple[int, int], Tensor]]:
        """Rows [a, b) after rows with the class scores that `labels` decides by."""
        return self.network.bands(images, size, offsets)

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Groups for the engine; each names its optimiser, so an adversary is one more group."""
        return parameter_groups(self, self.optim)


def pixel_loss(
    section: Mapping[str, Any], cfg: Config, context: MethodContext, **facts: Any
) -> PixelLoss:
    """The loss of class logits that `section`, the config's `remedies`, describes.

    facts: what the method says of itself, further fields of `LossContext`.
    """
    facts = {"cosine": cosine_scale(cfg.model), "sampled": context.sampled, **facts}
    return build_loss(section, LossContext(context.counts, **facts), f"{cfg.name}: remedies")


def make_method(
    methods: Mapping[str, type[Method]],
    cfg: Config,
    context: MethodContext,
    default: str | None = None,
) -> Method:
    """The method of a sub-project's table that `method.name` names. ConfigError where it names none."""
    return method_class(methods, cfg, default)(cfg, context)


def method_class(
    methods: Mapping[str, type[Method]], cfg: Config, default: str | None = None
) -> type[Method]:
    """The class that `method.name` names in a sub-project's table. ConfigError where it names none."""
    return pick(methods, cfg.method.get("name", default), f"{cfg.name}: method.name")


class Parts(nn.Module):
    """A method as something DDP can wrap: the first call of a micro-batch starts it, each call gives the next dict.

    RuntimeError, naming the method, for one that does not yield as many dicts as its `backwards` says.
    """

    def __init__(self, method: Method):
        super().__init__()
        self.method = method
        self._parts: Iterator[Losses] = iter(())

    def forward(self, streams: Mapping[str, Batch] | None, step: int) -> Losses:
        if streams is not None:
            out = self.method(streams, step)
            self._parts = iter((out,)) if isinstance(out, dict) else out

        part = next(self._parts, None)
        if part is None:
            raise self._miscounted("fewer")

        return part

    def finish(self) -> None:
        """Called after the last part was back-propagated: lets the method come to its end, and go of its graph."""
        if next(self._parts, None) is not None:
            raise self._miscounted("more")

    def _miscounted(self, how: str) -> RuntimeError:
        name = type(self.method).__name__
        count = self.method.backwards
        return RuntimeError(
            f"method {name}: forward gave {how} parts than its backwards = {count}; make them equal"
        )


@torch.no_grad()
def move_average(
    teacher: nn.Module,
    student: nn.Module,
    momentum: float,
    statistics: Literal["averaged", "copied", "own"] = "averaged",
) -> None:
    """teacher ← momentum · teacher + (1 − momentum) · student, for parameters and floating-point buffers.

    Batch norm's running statistics describe the features of the weights they were gathered with: a teacher whose
    weights lag needs statistics that lag alike, or in evaluation mode it normalises by another network's. Integer
    buffers (counts of batches) are copied.

    statistics: "copied" takes floating-point buffers as they are, for a teacher that normalises by its own batch; "own"
    leaves all buffers alone, for one that gathers them in training passes of its own.
    """
    ours: list[Tensor] = list(teacher.parameters())
    theirs: list[Tensor] = list(student.parameters())

    # one list a type: CUDA takes a mixed one tensor by tensor
    copies: dict[torch.dtype, tuple[list[Tensor], list[Tensor]]] = {}

    pairs = zip(teacher.buffers(), student.buffers(), strict=True)
    for mine, other in pairs if statistics != "own" else ():
        if statistics == "averaged" and mine.is_floating_point():
            ours.append(mine)
            theirs.append(other)
        else:
            to, of = copies.setdefault(mine.dtype, ([], []))
            to.append(mine)
            of.append(other)

    torch._foreach_lerp_(ours, theirs, 1.0 - momentum)
    for to, of in copies.values():
        torch._foreach_copy_(to, of)
