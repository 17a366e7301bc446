"""DINOv2 with a DPT head: UniMatch V2's network (Yang et al., 2024)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from common.config import ConfigError, ModelConfig, pick, typed
from common.config.bounds import Width
from common.models.backbones import build_backbone, pixel_statistics
from common.models.backbones.dinov2 import PATCH, DINOv2
from common.models.heads.dpt import DPTHead
from common.models.segmentor import EncoderDecoder, Extents, Segmentor

WIDTHS = {  # of the head's four levels, and of its decoder
    "dinov2_small": ((48, 96, 192, 384), 64),
    "dinov2_base": ((96, 192, 384, 768), 128),
    "dinov2_large": ((256, 512, 1024, 1024), 256),
}


@dataclass(frozen=True)
class DPTOptions:
    """Options of DINOv2 with DPT; the defaults are UniMatch V2's for each backbone."""

    # channels of the head's four levels
    widths: tuple[Width, Width, Width, Width] | None = None
    channels: Width | None = None  # of the head's decoder
    lock_backbone: bool = False  # the backbone is not trained
    backbone: Mapping[str, Any] = field(default_factory=dict)  # options of the backbone


class DPT(Segmentor, EncoderDecoder):
    """Images are resized to whole patches (sides to the nearest multiple of 14), not padded; scores are resized back.

    `segment` gives `logits` (B, K, 8h, 8w) of h×w patches.
    """

    def segment(self, x: Tensor, *, auxiliary: bool = True) -> dict[str, Any]:
        maps = self.encode(x)
        embedding = self.embed(maps)
        logits = self.classify(embedding)
        return {"logits": logits, "embedding": embedding, "aux": [], "features": list(maps)}

    def encode(self, x: Tensor) -> tuple[Tensor, ...]:
        """Normalised images (B, 3, H, W), sides multiples of 14, to the four maps (B, D, H/14, W/14) of the head."""
        return tuple(self.backbone(x))

    def embed(self, maps: Sequence[Tensor]) -> Tensor:
        """What the classifier reads (B, D, 8h, 8w), of `encode`'s maps."""
        return self.decode_head.embed(maps)

    def classify(self, embedding: Tensor) -> Tensor:
        return self.decode_head.conv_seg(embedding)

    def normalise(self, images: Tensor, extent: Tensor | None = None) -> Tensor:
        """RGB in 0–255 to what `segment` takes: resized (bilinear, aligned corners) after the pixel statistics."""
        x = self.standardise(images, extent)
        size = whole_patches(images.shape[-2:])
        return (
            x
            if size == tuple(x.shape[-2:])
            else F.interpolate(x, size, mode="bilinear", align_corners=True)
        )

    def _geometry(self, images: Tensor, size: tuple[int, int] | None) -> Extents:
        given = tuple(images.shape[-2:])
        seen = whole_patches(given)
        return Extents(seen, seen, given if size is None else tuple(size))


def whole_patches(size: Sequence[int]) -> tuple[int, int]:
    """The nearest multiples of 14 of height and width, halves rounded up, 14 at least."""
    height, width = (max(int(side / PATCH + 0.5), 1) * PATCH for side in size)
    return height, width


def dpt(config: ModelConfig) -> DPT:
    """The network of a config whose backbone is a DINOv2."""
    widths, channels = pick(WIDTHS, config.backbone, "model.backbone")
    options = typed(DPTOptions, config.options, "model.options")
    if not config.align_corners:
        raise ConfigError(
            "model.align_corners: DPT resizes with aligned corners; set it to true"
        )

    backbone: DINOv2 = build_backbone(config, **options.backbone)
    backbone.requires_grad_(not options.lock_backbone)
    head = DPTHead(
        backbone.channels[0],
        options.widths or widths,
        options.channels or channels,
        config.num_classes,
    )
    mean, std = pixel_statistics(config)

    return DPT(
        backbone, head, num_classes=config.num_classes, mean=mean, std=std, align_corners=True
    )
