"""MIC (Hoyer et al., CVPR 2023): the student predicts from a third of an image what the teacher sees in all of it.

DAFormer's step, and after it

    masked    CE of the target crop, jittered and blurred, most of its blocks hidden, against DAFormer's ŷ and weight
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from common.config import Config, ConfigError
from common.config.bounds import NotNegative, Share, Side
from common.engine.method import Losses, MethodContext
from common.ops.block_mask import block_mask, block_noise
from common.ops.resize import size_of
from uda.daformer import DAFormer, DAFormerConfig, Pseudo, View, named


@dataclass(frozen=True)
class MICConfig(DAFormerConfig):
    """The `method:` section of MIC: DAFormer's keys and those of the masked image."""

    mask_ratio: Share = 0.7  # of the blocks that are hidden
    mask_block: Side = 32  # pixels; the release has 32 at half of the resolution and 64 at full
    mask_weight: NotNegative = 1.0
    # separate: the first half of both batches, source images with their labels, and no change of colour (to ACDC and
    # Dark Zurich)
    masked: Literal["target", "separate"] = "target"

    def __post_init__(self):
        if not self.adapt:
            raise ValueError("adapt: false leaves MIC nothing to do; set name: daformer")


class MIC(DAFormer):
    """Batches as in `daformer.DAFormer`."""

    Options: type[MICConfig] = MICConfig
    backwards = 3

    def __init__(self, cfg: Config, context: MethodContext):
        super().__init__(cfg, context)
        target = cfg.data.streams.get("target")
        crop = () if target is None else tuple(target.augment.get("crop", ()))
        if crop and self.options.mask_block >= min(crop):
            raise ConfigError(
                f"{cfg.name}: method.mask_block: {self.options.mask_block}: crops of {crop[0]}×{crop[1]} have one row "
                "or column of such blocks; lower it"
            )
        source = cfg.data.streams.get("source")
        at_once = 2 if source is None else source.batch_size // cfg.train.devices
        if self.options.masked == "separate" and at_once < 2:
            raise ConfigError(
                f"{cfg.name}: method.masked: separate takes half of each batch, and a process has {at_once} image; "
                "raise both batch_size, or lower train.devices"
            )

    def target_parts(
        self, source: View, target: Tensor, pseudo: Pseudo, progress: float
    ) -> Iterator[Losses]:
        yield from super().target_parts(source, target, pseudo, progress)
        yield self.masked_terms(source, target, pseudo, progress)

    def masked_terms(
        self, source: View, target: Tensor, pseudo: Pseudo, progress: float
    ) -> Losses:
        image, label, weight = self.to_mask(source, target, pseudo)
        losses, _ = self.student(View(self.hidden(image), label), progress, weight)
        terms = named("masked", losses)
        return {**terms, "loss": self.options.mask_weight * terms["loss"]}

    def to_mask(
        self, source: View, target: Tensor, pseudo: Pseudo
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Image, label and pixel weight of what is to be masked."""
        if self.options.masked == "target":
            return self.distorted(target), pseudo.label, pseudo.weight

        half = len(target) // 2
        image = torch.cat((source.image[:half], target[:half]))
        label = torch.cat((source.label[:half], pseudo.label[:half]))
        weight = torch.cat((torch.ones_like(pseudo.weight[:half]), pseudo.weight[:half]))

        return image, label, weight

    def hidden(self, image: Tensor) -> Tensor:
        """Normalised images with 0, the mean colour, in the hidden blocks."""
        noise = block_noise(image, self.options.mask_block)
        return image * block_mask(noise, size_of(image), self.options.mask_ratio)
