"""Supervised segmentation: one loss for each output of the network, cross-entropy or BLV."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from common.config import Config, ConfigError, typed
from common.engine.method import Batch, Losses, Method
from common.losses.blv import BLVLoss, blv_options
from common.losses.cross_entropy import Average, pixel_cross_entropy
from common.models import build_model


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
        options = typed(SupervisedConfig, cfg.method, f"{cfg.name}: method")
        self.model = build_model(cfg.model)
        self.steps = cfg.train.steps
        self.losses, self.weights = nn.ModuleDict(), {}
        for name, head in options.heads.items():
            if name not in ("decode", "aux"):
                raise ConfigError(f"{cfg.name}: method: heads: unknown head {name!r}; known heads: decode, aux")
            self.weights[name] = float(head.get("weight", 1.0))
            self.losses[name] = build_loss(head, counts, options.average, f"{cfg.name}: method: heads: {name}")

    def forward(self, streams: Mapping[str, Batch], step: int) -> Losses:
        batch = streams["labeled"]
        out = self.model(batch["image"])
        outputs = {"decode": out.get("stages") or [out["logits"]], "aux": out["aux"]}
        terms: Losses = {}
        for name, loss in self.losses.items():
            for i, logits in enumerate(outputs[name]):
                key = name if len(outputs[name]) == 1 else f"{name}{i}"
                value = loss(self.upsample(logits, batch["label"]), batch["label"], progress=step / self.steps)
                terms[key] = self.weights[name] * value
        return {"loss": sum(terms.values())} | terms

    def upsample(self, logits: Tensor, label: Tensor) -> Tensor:
        corners = self.model.align_corners
        return F.interpolate(logits, label.shape[-2:], mode="bilinear", align_corners=corners)


def build_loss(head: Mapping[str, Any], counts: Sequence[int] | None, average: Average, where: str) -> nn.Module:
    """The loss of one head's section. Raises ConfigError for an unknown loss or option."""
    options = {key: value for key, value in head.items() if key not in ("loss", "weight")}
    kind = head.get("loss", "ce")
    if kind == "blv":
        return BLVLoss(blv_options(options, where), counts, average)
    if kind != "ce":
        raise ConfigError(f"{where}: loss: {kind!r} is not one of ce, blv")
    if options:
        raise ConfigError(f"{where}: {next(iter(options))!r} is an option of BLV, and the loss here is ce")
    return PixelCrossEntropy(average)
