"""What the stages share: a base class, the quarter grid, the losses of the student, files of earlier steps."""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.config import Config, ConfigError, ModelConfig, OptimConfig
from common.data import IGNORE
from common.engine.method import Batch, Losses, Method, MethodContext, pixel_loss
from common.files import read_artifact
from common.losses.counts import PseudoUnit
from common.losses.symmetric_cross_entropy import reverse_cross_entropy
from common.models import build_network, load_model
from common.models.deeplabv2_cpsl import DeepLabV2
from common.models.pretrained.containers import load_tensor
from common.models.pretrained.cpsl import has_extra_norm
from common.ops.resize import Size, size_of
from common.ops.resize_chain import feature_matrices, feature_reach, resize_matrices
from uda.config import command

STRIDE = 4  # of the grid on which target losses live
CONFIDENCE_STEPS = 254  # a confidence of 1 in 8-bit maps, where 255 marks ignored pixels


def to_grid(maps: Tensor, size: Size) -> Tensor:
    """Network outputs (B, C, h, w) on another grid, bilinear with aligned corners."""
    return F.interpolate(maps, size, mode="bilinear", align_corners=True)


class Resampling(NamedTuple):
    """How maps (B, D, h, w) come to a grid (H, W): rows · map · columnsᵀ, as in `common.ops.resize_chain`."""

    rows: Tensor  # (B, H, h)
    columns: Tensor  # (B, W, w)
    reach: int  # how far apart two cells can be that become one


def onto_crop(maps: Tensor, target: Batch) -> Resampling:
    """From the whole image to the quarter grid of its weak crop."""
    grid, image, crop = (size_of(m) for m in (maps, target["full"], target["weak"]))
    rows, columns = feature_matrices(target["geometry"], grid, crop, stride=STRIDE)
    return Resampling(rows, columns, feature_reach(grid, image, STRIDE))


def onto_grid(maps: Tensor, size: Size) -> Resampling:
    """What `to_grid` does."""
    return Resampling(*resize_matrices(maps, size), reach=1)


@contextmanager
def running_statistics_kept(model: nn.Module) -> Iterator[None]:
    """Batch norm normalises by the batch as ever in training, but its running statistics stay."""
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    before = [m.momentum for m in norms]

    for m in norms:
        m.momentum = 0.0

    try:
        yield
    finally:
        for m, momentum in zip(norms, before, strict=True):
            m.momentum = momentum


class Stage(Method):
    """What every stage has: the student, its segmentation loss on source and target alike, its parameter groups.

    Class counts of remedies are those of the source labels; with `remedies.counts.refresh: N` every N steps the class
    shares of the target's pseudo-labels of those steps join them, times the number of source pixels, so that both
    domains weigh alike.
    """

    pseudo_labels: PseudoUnit | None = "shares"  # None: the stage makes none

    def __init__(self, cfg: Config, context: MethodContext):
        super().__init__(cfg, context)
        self.model = build_network(cfg.model, DeepLabV2, "deeplabv2", cfg.name)
        self.loss = pixel_loss(
            cfg.remedies,
            cfg,
            context,
            average="valid",
            pseudo_labels=self.pseudo_labels,
            features=self.model.embedding_channels,
        )

    def parameter_groups(self) -> list[dict[str, Any]]:
        groups = groups_of(
            self.model, self.optim, self.options.backbone_lr_mult, self.options.head_lr_mult
        )
        own = list(self.loss.parameters())
        if not own:
            return groups

        rate = self.optim.lr * self.options.head_lr_mult
        return [*groups, {**groups[0], "params": own, "name": "loss", "lr": rate}]

    def look(self, images: Tensor) -> tuple[Tensor, dict[str, Any]]:
        """The student's logits at the size of the images, and what the network gave."""
        out = self.model(images)
        logits = F.interpolate(
            out["logits"],
            size_of(images),
            mode="bilinear",
            align_corners=self.model.align_corners,
        )
        return logits, out

    def upsampled(self, images: Tensor) -> Tensor:
        """The student's logits at the size of the images."""
        return self.look(images)[0]

    def source_terms(self, source: Batch, progress: float) -> Losses:
        out = self.model(source["image"])
        loss = self.loss.enlarged(
            out["logits"],
            source["label"],
            align_corners=self.model.align_corners,
            progress=progress,
            features=out["features"],
        )
        return {"loss": loss, "source_ce": loss}

    def symmetric_loss(
        self,
        logits: Tensor,
        label: Tensor,
        rce: tuple[float, float],
        progress: float,
        out: Mapping[str, Any],
    ) -> Tensor:
        """Symmetric cross-entropy with the factors `rce` of its terms, of logits (B, K, h, w) and label (B, h, w).

        out: what the network gave, on a grid of its own. Both terms see the logits that the remedies have changed;
        class weights and focus act on the first alone.
        """
        alpha, beta = rce
        adjusted = self.loss.adjust(logits, label, progress)
        total = alpha * self.loss.mean_of(adjusted, label, progress, logits=logits)

        if beta:
            reverse = reverse_cross_entropy(adjusted, label)
            if self.loss.average == "all":
                reverse = reverse * (label != IGNORE).float().mean()

            total = total + beta * reverse

        if not self.loss.sets:
            return total
        return total + self.loss.set_terms(out["logits"], label, out["features"], large=logits)

    @torch.no_grad()
    def after_step(self, step: int) -> None:
        self.loss.after_step(step)


def groups_of(
    model: nn.Module, optim: OptimConfig, backbone_mult: float, head_mult: float
) -> list[dict[str, Any]]:
    """Backbone and head (with the extra norm) at multiples of `optim.lr`. ConfigError for rules in `optim.groups`.

    The release's optimiser visits most backbone tensors three times a step, so its nominal rate acts threefold; the
    multiplier says so openly.
    """
    if optim.groups:
        raise ConfigError(
            f"optim.groups: {optim.groups[0].match!r}: the groups of domain adaptation are fixed; set "
            "method.backbone_lr_mult and method.head_lr_mult instead"
        )

    head = re.compile(r"^(layer5|bn_pretrain)\.")
    rest: list[nn.Parameter] = []
    chosen: list[nn.Parameter] = []

    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            (chosen if head.search(name) else rest).append(parameter)

    common: dict[str, Any] = {"optimizer": optim.name, "weight_decay": optim.weight_decay}
    if optim.name == "sgd":
        common |= {"momentum": optim.momentum, "nesterov": optim.nesterov}
    else:
        common |= {"betas": optim.betas}

    parts = (("backbone", rest, backbone_mult), ("head", chosen, head_mult))

    return [
        {"params": p, "name": name, "lr": optim.lr * mult, **common}
        for name, p, mult in parts
        if p
    ]


def network_of(config: ModelConfig, path: str | Path, prefix: str | None = None) -> nn.Module:
    """The network that `config` describes with the weights of a checkpoint, ours or the release's.

    It has the extra norm where the checkpoint has it, whatever the config says: stage 1's network has none, those of
    stages 2 and 3 do. prefix: the network inside a checkpoint of ours; None: the one that the method predicts with.
    """
    options = {key: value for key, value in config.options.items() if key != "extra_norm"}
    options |= {"extra_norm": True} if has_extra_norm(path, prefix) else {}
    return load_model(replace(config, options=options), path, prefix)


def read_prototypes(path: str, classes: int) -> Tensor:
    """Prototypes float32 (C, D) of calc_prototype.py: torch-saved tensor, or .npy. ValueError names the fix."""
    if not Path(path).is_file():
        raise ValueError(
            f"{path}: no prototypes there; {command('calc_prototype.py', path)} makes them"
        )

    def parse(file: Path) -> Tensor:
        value = load_tensor(file)
        if value.ndim != 2 or len(value) != classes:
            raise ValueError(f"prototypes of shape {tuple(value.shape)} for {classes} classes")
        return value.float()

    return read_artifact(path, parse, "run calc_prototype.py again")


class Prototypes(NamedTuple):
    """The prototypes that there are."""

    known: Tensor  # classes that have one, int64 (K,), ascending
    rows: Tensor  # theirs, float32 (K, D)


def known_prototypes(path: str, classes: int) -> Prototypes:
    """The rows of `read_prototypes` that are not 0, which stands for "never seen". ValueError if there is none."""
    start = read_prototypes(path, classes)
    known = start.any(1).nonzero().flatten()
    if not len(known):
        raise ValueError(
            f"{path}: no class has a prototype, all of them are 0; {command('calc_prototype.py', path)}"
        )

    return Prototypes(known, start[known])


def rectified(warm: Tensor, evidence: Tensor, known: Tensor) -> Tensor:
    """Soft labels P_ST (B, C, h, w) weighed by softmax(evidence) of the K classes in `known`: (B, C, h, w).

    With a prototype for every class that is the product of the two, as in the paper. A class without one gives no
    evidence for or against itself, so it keeps its probability, and the others share theirs in the proportion of
    the product. (The release has a zero vector there, which is far from every feature: such a class can never win.)
    """
    if len(known) == warm.shape[1]:
        return evidence.softmax(1).mul_(warm)

    ours = warm.index_select(1, known)
    shares = (evidence + ours.clamp(min=torch.finfo(ours.dtype).tiny).log()).softmax(1)
    return warm.index_copy(1, known, shares * ours.sum(1, keepdim=True))


def read_distribution(path: str, classes: int) -> Tensor:
    """Class shares float32 (C,) of generate_class_distribution.py. ValueError names the fix."""
    if not Path(path).is_file():
        program = command("generate_class_distribution.py", path)
        raise ValueError(f"{path}: no class distribution there; {program} makes it")

    def parse(file: Path) -> Tensor:
        value = load_tensor(file).double()
        if value.shape != (classes,):
            raise ValueError(f"{value.numel()} class shares for {classes} classes")
        if value.min() < 0 or abs(value.sum() - 1) > 1e-3:
            raise ValueError(
                f"class shares must be at least 0 and sum to 1, the sum is {value.sum():.4f}"
            )

        return (value / value.sum()).float()

    return read_artifact(path, parse, "run generate_class_distribution.py again")
