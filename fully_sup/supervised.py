"""Supervised segmentation: one loss for each output of the network, cross-entropy or BLV."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal

import torch.nn.functional as F
from torch import Tensor, nn

from common.config import Config, ConfigError, pick, typed
from common.config.bounds import NotNegative
from common.engine.method import Batch, Losses, Method
from common.losses.blv import BLVLoss, blv_options
from common.losses.cross_entropy import Average, pixel_cross_entropy
from common.models import build_model

# A head's logits in the network's output. Those of a cascade (`stages`) are trained one by one.
HEADS = {"decode": lambda out: out.get("stages") or [out["logits"]], "aux": lambda out: out["aux"]}


@dataclass(frozen=True)
class HeadConfig:
    """How the logits of one head are trained; with `loss: blv` BLV's own options stand beside these."""

    loss: Literal["ce", "blv"] = "ce"
    weight: NotNegative = 1.0


@dataclass(frozen=True)
class SupervisedConfig:
    """The `method:` section. A head is {loss: ce | blv, weight: 1.0, <BLV options>}."""

    heads: Mapping[str, Mapping[str, Any]]  # decode (every stage of a cascade of them) and aux
    average: Average = "all"  # MMSegmentation 0.x divides by all pixels, ignored ones included


class PixelCrossEntropy(nn.Module):
    """`pixel_cross_entropy` with BLV's calling convention."""

    def __init__(self, average: Average):
        super().__init__()
        self.average = average

    def forward(self, logits: Tensor, label: Tensor, *, progress: float = 0.0) -> Tensor:
        return pixel_cross_entropy(logits, label, average=self.average)


class Supervised(Method):
    """loss = Σ_heads weight · loss(upsampled logits, label)."""

    def __init__(self, cfg: Config, counts: Sequence[int] | None = None):
        """`counts`: pixels of each class in the training labels; only BLV needs them."""
        super().__init__(cfg.optim)
        where = f"{cfg.name}: method"
        options = typed(SupervisedConfig, cfg.method, where)
        for name in options.heads:
            pick(HEADS, name, f"{where}.heads")

        self.model = build_model(cfg.model)
        self.model.check_heads(options.heads, f"{where}.heads")
        self.steps = cfg.train.steps
        self.losses, self.weights = nn.ModuleDict(), {}
        for name, section in options.heads.items():
            head, rest = split_head(section, f"{where}.heads.{name}")
            self.weights[name] = head.weight
            self.losses[name] = build_loss(head, rest, counts, options.average, f"{where}.heads.{name}")

    def forward(self, streams: Mapping[str, Batch], step: int) -> Losses:
        batch = streams["labeled"]
        out = self.model(batch["image"])
        terms: Losses = {}
        for name, loss in self.losses.items():
            outputs = HEADS[name](out)
            for i, logits in enumerate(outputs):
                key = name if len(outputs) == 1 else f"{name}{i}"
                value = loss(self.upsample(logits, batch["label"]), batch["label"], progress=step / self.steps)
                terms[key] = self.weights[name] * value
        return {"loss": sum(terms.values())} | terms

    def upsample(self, logits: Tensor, label: Tensor) -> Tensor:
        corners = self.model.align_corners
        return F.interpolate(logits, label.shape[-2:], mode="bilinear", align_corners=corners)


def split_head(section: Mapping[str, Any], where: str) -> tuple[HeadConfig, dict[str, Any]]:
    """A head's own keys, typed, and those of its loss. Raises ConfigError."""
    own = {field.name for field in fields(HeadConfig)}
    head = typed(HeadConfig, {key: value for key, value in section.items() if key in own}, where)
    return head, {key: value for key, value in section.items() if key not in own}


def build_loss(
    head: HeadConfig, options: Mapping[str, Any], counts: Sequence[int] | None, average: Average, where: str
) -> nn.Module:
    """The loss of one head, of `options` beside the head's own. Raises ConfigError for an unknown option."""
    if head.loss == "blv":
        return BLVLoss(blv_options(options, where), counts, average)
    if options:
        raise ConfigError(f"{where}.{next(iter(options))}: is an option of BLV, and the loss here is ce")
    return PixelCrossEntropy(average)
