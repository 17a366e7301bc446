"""DeepLabV3+ on a long tail: hard pixel mining as in the release, or BLV (CVPR 2023) on its logits."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from torch import Tensor

from common.config import Config, ConfigError, typed
from common.config.bounds import Above, AtMost
from common.data.statistics import Statistics
from common.engine.method import Batch, Losses, Method
from common.losses.hard_pixel import hard_pixel_cross_entropy
from common.losses.refreshed import StudentLogits
from common.losses.upsampled import upsampled_cross_entropy
from common.models import build_network
from common.models.deeplabv3plus_detectron2 import STRIDE, DeepLabV3PlusD2
from ltss_benchmark.criterion import pad_label

STREAM = "labeled"


@dataclass(frozen=True)
class DeepLabV3PlusConfig:
    """The `method:` section."""

    name: str = "deeplabv3plus"
    loss: Literal["hard_pixels", "ce", "blv"] = "hard_pixels"  # ce: the mean over all labelled pixels, as with blv
    fraction: Annotated[float, Above(0), AtMost(1)] = 0.2  # hard_pixels: share of the pixels that are trained
    blv: Mapping[str, Any] | None = None  # BLV's options, where the loss is blv


class DeepLabV3PlusMethod(Method):
    """Batches: `labeled` (image, label)."""

    def __init__(self, cfg: Config, statistics: Statistics | None = None):
        """`statistics`: of the training labels; only BLV needs them."""
        super().__init__(cfg.optim)
        where = f"{cfg.name}: method"
        self.options = typed(DeepLabV3PlusConfig, cfg.method, where)
        if (self.options.loss == "blv") != (self.options.blv is not None):
            raise ConfigError(f"{where}: `loss: blv` and a section `blv` go together")
        self.model = build_network(cfg.model, DeepLabV3PlusD2, "deeplabv3plus_d2", cfg.name)
        self.steps = cfg.train.steps
        counts = None if statistics is None else statistics.pixel_count
        self.class_logits = StudentLogits(self.options.blv, counts, f"{where}: blv", pseudo_labels=None)

    def forward(self, streams: Mapping[str, Batch], step: int) -> Losses:
        batch = streams[STREAM]
        logits = self.model(batch["image"])["logits"]
        loss = self.loss(logits, batch["label"], step / self.steps)
        return {"loss": loss, "loss_sem_seg": loss}

    def loss(self, logits: Tensor, label: Tensor, progress: float) -> Tensor:
        """Of logits (B, K, h, w) and label maps (B, H, W), the upper left part of the logits enlarged 4 times."""
        if self.options.loss == "hard_pixels":
            return hard_pixel_cross_entropy(logits, label, fraction=self.options.fraction, stride=STRIDE)
        label = pad_label(label, logits.shape[-2:])
        loss = upsampled_cross_entropy(
            logits, label, align_corners=False, perturb=lambda z: self.class_logits.perturb(z, progress)
        )
        return self.class_logits.averaged(loss, label)
