"""DeepLabV3+ (ECCV 2018) as detectron2's DeepLab project builds it: ResNet at stride 16, ASPP, decoder at stride 4.

Differences from other DeepLabs: every block of the last stage has dilation 2, the first included; the pooled branch of
the ASPP has a bias instead of a norm; the finest map is reduced to 48 channels.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.config import ConfigError, ModelConfig, typed
from common.config.bounds import Length, Rate, Side, Width
from common.models.backbones import build_backbone
from common.models.segmentor import Extents, SegmentationModel
from common.ops.resize import resize

STRIDE = 4  # of the logits


@dataclass(frozen=True)
class DeepLabV3PlusD2Options:
    """Defaults are those of the release."""

    channels: Width = 256  # of every ASPP branch and of the decoder
    lateral_channels: Width = 48
    dilations: Annotated[tuple[Side, ...], Length(0, 16)] = (6, 12, 18)
    dropout: Rate = 0.1  # after the ASPP
    backbone: Mapping[str, Any] = field(default_factory=dict)  # options of the backbone


class ConvNormReLU(nn.Module):
    """Convolution without bias that keeps the size, batch norm, ReLU."""

    def __init__(self, channels: int, out: int, kernel: int = 1, dilation: int = 1):
        super().__init__()
        padding = kernel // 2 * dilation
        self.conv = nn.Conv2d(channels, out, kernel, padding=padding, dilation=dilation, bias=False)
        self.norm = nn.BatchNorm2d(out)
        nn.init.kaiming_uniform_(self.conv.weight, a=1)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.norm(self.conv(x)), inplace=True)


class PyramidPooling(nn.Module):
    """Atrous spatial pyramid pooling: 1×1, dilated 3×3 and pooled branches, joined by a 1×1 convolution.

    The release pools with a window of the training crop's size; at that size, and here at any, it is the global mean.
    """

    def __init__(self, channels: int, out: int, dilations: tuple[int, ...], dropout: float):
        super().__init__()
        branches = [ConvNormReLU(channels, out)] + [ConvNormReLU(channels, out, 3, d) for d in dilations]
        self.branches = nn.ModuleList(branches)
        self.pool = nn.Conv2d(channels, out, 1)
        self.project = ConvNormReLU(out * (len(branches) + 1), out)
        self.dropout = nn.Dropout(dropout)
        nn.init.kaiming_uniform_(self.pool.weight, a=1)
        nn.init.zeros_(self.pool.bias)

    def forward(self, x: Tensor) -> Tensor:
        pooled = F.relu(self.pool(x.mean((2, 3), keepdim=True))).expand(-1, -1, *x.shape[2:])
        return self.dropout(self.project(torch.cat([*(branch(x) for branch in self.branches), pooled], 1)))


class DeepLabV3PlusD2(SegmentationModel):
    """`segment` gives `logits` (B, K, H/4, W/4) and `features`, what the classifier reads; align_corners is false."""

    classifiers = ("predictor",)
    average_softmax = False  # detectron2 averages logits

    def __init__(self, backbone: nn.Module, num_classes: int, mean, std, options: DeepLabV3PlusD2Options):
        super().__init__(num_classes, mean, std, align_corners=False)
        self.backbone = backbone
        finest, *_, coarsest = backbone.channels
        self.aspp = PyramidPooling(coarsest, options.channels, options.dilations, options.dropout)
        self.lateral = ConvNormReLU(finest, options.lateral_channels)
        self.fuse = nn.Sequential(
            ConvNormReLU(options.channels + options.lateral_channels, options.channels, 3),
            ConvNormReLU(options.channels, options.channels, 3),
        )
        self.predictor = nn.Conv2d(options.channels, num_classes, 1)
        nn.init.normal_(self.predictor.weight, std=0.001)
        nn.init.zeros_(self.predictor.bias)

    def segment(self, x: Tensor) -> dict[str, Any]:
        finest, *_, coarsest = self.backbone(x)
        lateral = self.lateral(finest)
        features = self.fuse(torch.cat([lateral, resize(self.aspp(coarsest), lateral.shape[-2:])], 1))
        return {"logits": self.predictor(features), "features": features, "aux": []}

    def scores(self, out: dict[str, Any], geometry: Extents, rows: tuple[int, int]) -> Tensor:
        """Rows [a, b) of the logits enlarged 4 times and cropped: a side that is no multiple of 4 is not squeezed."""
        padded = tuple(STRIDE * side for side in out["logits"].shape[-2:])
        return self.upsample(out["logits"], geometry._replace(padded=padded), rows)


def dilate_last_stage(backbone: nn.Module, dilation: int = 2) -> nn.Module:
    """Give the 3×3 convolutions of the last stage's first block, too, the stage's dilation; in place.

    timm's (and torchvision's) ResNet leaves one at the dilation of the stage before.
    """
    for conv in backbone.layer4[0].modules():
        if isinstance(conv, nn.Conv2d) and conv.kernel_size == (3, 3):
            conv.dilation = conv.padding = (dilation, dilation)
    return backbone


def deeplabv3plus_d2(config: ModelConfig) -> DeepLabV3PlusD2:
    """The network of a config with a ResNet."""
    options = typed(DeepLabV3PlusD2Options, config.options, "model.options")
    if config.align_corners:
        raise ConfigError(
            "model.align_corners: detectron2's DeepLabV3+ resizes without aligned corners; set it to false"
        )
    backbone = dilate_last_stage(build_backbone(config, **{"output_stride": 16, **options.backbone}))
    return DeepLabV3PlusD2(backbone, config.num_classes, config.mean, config.std, options)
