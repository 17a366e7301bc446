"""DeepLabV3+ on a long tail: hard pixel mining as in the release, or any other loss of the section `remedies`."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from common.config import Config
from common.engine.method import Batch, Losses, Method, MethodContext, pixel_loss
from common.losses.hard_pixel import HardPixels, hard_pixel_cross_entropy
from common.models import build_network
from common.models.deeplabv3plus_detectron2 import STRIDE, DeepLabV3PlusD2
from common.ops.resize import size_of
from ltss_benchmark.criterion import pad_label

STREAM = "labeled"


@dataclass(frozen=True)
class DeepLabV3PlusConfig:
    """The `method:` section has nothing but its name."""


class DeepLabV3PlusMethod(Method):
    """Batches: `labeled` (image, label). The release's loss is the remedy `focus: hard_pixels` of the shipped configs;
    with `focus: null` it is plain cross-entropy over all labelled pixels."""

    Options = DeepLabV3PlusConfig
    options: DeepLabV3PlusConfig

    def __init__(self, cfg: Config, context: MethodContext):
        super().__init__(cfg, context)
        self.model = build_network(cfg.model, DeepLabV3PlusD2, "deeplabv3plus_d2", cfg.name)
        self.pixel_loss = pixel_loss(
            cfg.remedies, cfg, context, features=self.model.embedding_channels
        )

    def forward(self, streams: Mapping[str, Batch], step: int) -> Losses:
        batch = streams[STREAM]
        out = self.model(batch["image"], batch.get("extent"))
        loss = self.loss(out["logits"], batch["label"], step / self.steps, out["embedding"])
        return {"loss": loss, "loss_sem_seg": loss}

    def loss(
        self, logits: Tensor, label: Tensor, progress: float, features: Tensor | None = None
    ) -> Tensor:
        """Of logits (B, K, h, w) and label maps (B, H, W), the upper left part of the logits enlarged 4 times, and the
        features (B, D, h, w) of the logits."""
        chosen = self.pixel_loss
        fraction = chosen.hardest_fraction
        if fraction is not None:
            return hard_pixel_cross_entropy(logits, label, fraction=fraction, stride=STRIDE)

        padded = pad_label(label, size_of(logits))
        if not isinstance(chosen.focus, HardPixels):
            return chosen.upsampled(
                logits, padded, align_corners=False, progress=progress, features=features
            )

        # hard pixels are a share of the label's own, not of those that the network adds
        large = F.interpolate(logits.float(), size_of(padded), mode="bilinear")
        own = large[..., : label.shape[1], : label.shape[2]]
        loss = chosen.mean_of(chosen.adjust(own, label, progress), label, progress, logits=own)
        if not chosen.sets:
            return loss

        return loss + chosen.set_terms(logits, padded, features, large=large)
