"""DeepLabV2 as CPSL (and its parent ProDA) uses it: a dilated ResNet-101 with a pyramid of five branches, stride 8.

Modules carry the names of the official checkpoints, whose tensors load as they are.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import gcd
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.config import ConfigError, ModelConfig, typed
from common.config.bounds import Depth, Pattern, Rate, Width
from common.models.backbones import (
    build_backbone,
    is_timm,
    pixel_statistics,
    refuse_resnet_options,
)
from common.models.pretrained import load_backbone
from common.models.pretrained.containers import find_weights
from common.models.pretrained.cpsl import load_initial
from common.models.segmentor import SegmentationModel

DILATIONS = (1, 6, 12, 18, 24)  # of the head's branches; the first is a 1×1 convolution
REDUCTION = 16  # of the channel gate
BLOCKS, WIDTH = (3, 4, 23, 3), 64  # of the ResNet
STRIDE = 8  # of the map that the head reads


@dataclass(frozen=True)
class DeepLabV2Options:
    """Options of DeepLabV2; the defaults are the official network."""

    # bottlenecks of each stage of the ResNet; None: BLOCKS
    blocks: tuple[Depth, Depth, Depth, Depth] | None = None
    # channels of its stem, None: 64; stages end in 4, 8, 16, 32 times as many
    width: Width | None = None
    # options of a backbone timm:NAME in the ResNet's place
    backbone: Mapping[str, Any] = field(default_factory=dict)
    head_channels: Width = 256  # of each branch
    features: Width = 256  # channels before the classifier
    # a batch norm between backbone and head: CPSL's students of stages 2 and 3
    extra_norm: bool = False
    dropout: Rate = 0.1  # of whole channels, before the classifier
    freeze_bn: bool = False  # batch norms keep their statistics and weights (the warm-up)
    # regular expression → ours, on names of the file
    pretrained_keys: Mapping[Annotated[str, Pattern()], str] = field(default_factory=dict)

    def __post_init__(self):
        fewest = -(-REDUCTION // len(DILATIONS))
        if self.head_channels < fewest:
            raise ValueError(
                f"head_channels: {self.head_channels} is less than {fewest}, too few for the channel gate"
            )


class Bottleneck(nn.Module):
    """1×1, 3×3, 1×1 convolutions with a shortcut; the first one strides, as in the original ResNet."""

    def __init__(self, channels: int, width: int, stride: int, dilation: int, first: bool):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 1, stride, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=dilation, dilation=dilation, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, 4 * width, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(4 * width)
        self.downsample = None
        if first:
            shortcut = nn.Conv2d(channels, 4 * width, 1, stride, bias=False)
            self.downsample = nn.Sequential(shortcut, nn.BatchNorm2d(4 * width))

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        x = F.relu(self.bn1(self.conv1(x)), inplace=True)
        x = F.relu(self.bn2(self.conv2(x)), inplace=True)
        return F.relu(self.bn3(self.conv3(x)) + shortcut, inplace=True)


def stage(
    channels: int, width: int, blocks: int, stride: int = 1, dilation: int = 1
) -> nn.Sequential:
    """One stage of the backbone: (B, channels, h, w) to (B, 4·width, h/stride, w/stride)."""
    layers = [Bottleneck(channels, width, stride, dilation, first=True)]
    layers += [
        Bottleneck(4 * width, width, 1, dilation, first=False) for _ in range(blocks - 1)
    ]
    return nn.Sequential(*layers)


class ChannelGate(nn.Module):
    """Squeeze and excitation: every channel scaled by a gate in (0, 1) that sees the image's mean (B, C)."""

    def __init__(self, channels: int):
        super().__init__()
        hidden = channels // REDUCTION
        self.se = nn.Sequential(
            nn.Linear(channels, hidden), nn.ReLU(), nn.Linear(hidden, channels), nn.Sigmoid()
        )

    def forward(self, x: Tensor) -> Tensor:
        return x * self.se(x.mean((2, 3)))[:, :, None, None]


class PyramidHead(nn.Module):
    """Five branches of different dilation, gated, merged, classified: (B, C, h, w) to (logits, features)."""

    def __init__(
        self, channels: int, branch: int, features: int, num_classes: int, dropout: float
    ):
        super().__init__()
        self.conv2d_list = nn.ModuleList(
            self._branch(channels, branch, dilation) for dilation in DILATIONS
        )
        merged = branch * len(DILATIONS)
        merge = nn.Conv2d(merged, features, 3, padding=1)
        self.bottleneck = nn.Sequential(
            ChannelGate(merged), merge, nn.GroupNorm(gcd(32, features), features)
        )
        self.head = nn.Sequential(
            nn.Dropout2d(dropout), nn.Conv2d(features, num_classes, 1, bias=False)
        )

    @staticmethod
    def _branch(channels: int, branch: int, dilation: int) -> nn.Sequential:
        kernel, padding = (1, 0) if dilation == 1 else (3, dilation)
        conv = nn.Conv2d(channels, branch, kernel, padding=padding, dilation=dilation)
        return nn.Sequential(conv, nn.GroupNorm(gcd(32, branch), branch), nn.ReLU(inplace=True))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.bottleneck(torch.cat([branch(x) for branch in self.conv2d_list], 1))
        features = self.head[0](x)
        return self.head[1](features), features


class DeepLabV2(SegmentationModel):
    """Logits at stride 8, and the features that the prototypes of CPSL live in.

    encoder: a network of timm in the ResNet's place, whose last map the head reads.
    """

    classifiers = ("layer5.head.1",)
    pixel_classifiers = classifiers
    backbone = ("conv1", "bn1", "layer1", "layer2", "layer3", "layer4")

    def __init__(
        self,
        num_classes: int,
        mean,
        std,
        align_corners: bool = True,
        options: DeepLabV2Options | None = None,
        encoder: nn.Module | None = None,
    ):
        super().__init__(num_classes, mean, std, align_corners)
        self.options = o = options or DeepLabV2Options()
        self.embedding_channels = o.features
        self.encoder = encoder
        if encoder is None:
            self._add_resnet(o.width or WIDTH, o.blocks or BLOCKS)

        channels = 32 * (o.width or WIDTH) if encoder is None else encoder.channels[-1]
        self.bn_pretrain = nn.BatchNorm2d(channels) if o.extra_norm else None
        self.layer5 = PyramidHead(channels, o.head_channels, o.features, num_classes, o.dropout)
        self._initialise()

    def _add_resnet(self, width: int, blocks: tuple[int, int, int, int]) -> None:
        first, second, third, fourth = blocks

        self.conv1 = nn.Conv2d(3, width, kernel_size=7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(width)

        self.layer1 = stage(width, width, first)
        self.layer2 = stage(4 * width, 2 * width, second, stride=2)
        self.layer3 = stage(8 * width, 4 * width, third, dilation=2)
        self.layer4 = stage(16 * width, 8 * width, fourth, dilation=4)

    def _initialise(self) -> None:
        """N(0, 0.01) for every convolution, the classifier too; biases and the gate keep PyTorch's start."""
        for name, module in self.named_modules():
            if isinstance(module, nn.Conv2d) and not name.startswith("encoder."):
                nn.init.normal_(module.weight, std=0.01)

        nn.init.zeros_(self.layer5.bottleneck[1].bias)
        if self.options.freeze_bn:
            for norm in self._batchnorms():
                norm.requires_grad_(False)

    def _batchnorms(self) -> list[nn.Module]:
        return [m for m in self.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]

    def train(self, mode: bool = True) -> "DeepLabV2":
        super().train(mode)
        if self.options.freeze_bn:
            for norm in self._batchnorms():
                norm.eval()

        return self

    def segment(self, x: Tensor) -> dict[str, Any]:
        """Normalised images (B, 3, H, W) to `logits` (B, K, h, w) and `features` (B, D, h, w), both at stride 8.

        The features are signed, and are those that the classifier sees: in training, whole channels are dropped.
        """
        x = self._encode(x) if self.encoder is None else self.encoder(x)[-1]
        x = x if self.bn_pretrain is None else self.bn_pretrain(x)
        logits, features = self.layer5(x)
        return {"logits": logits, "features": features, "embedding": features, "aux": []}

    def _encode(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)), inplace=True)
        x = F.max_pool2d(x, 3, 2, 1, ceil_mode=True)
        return self.layer4(self.layer3(self.layer2(self.layer1(x))))


def deeplabv2(config: ModelConfig) -> DeepLabV2:
    """DeepLabV2 with initial weights for the backbone: torchvision's (`pretrained: true`) or those of a file.

    CPSL feeds RGB / 255 without further statistics (mean 0, std 255) and resizes with aligned corners.
    A backbone `timm:NAME` stands in the ResNet's place, with its own weights as for other networks.
    """
    options = typed(DeepLabV2Options, config.options, "model.options")
    shared = (config.num_classes, *pixel_statistics(config), config.align_corners, options)
    if is_timm(config):
        refuse_resnet_options(options, ("blocks", "width", "pretrained_keys"))
        return DeepLabV2(
            *shared, build_backbone(config, **{"output_stride": STRIDE, **options.backbone})
        )

    if options.backbone:
        raise ConfigError(
            "model.options.backbone: only a backbone timm:NAME has options here; set model.backbone"
        )

    model = DeepLabV2(*shared)
    if config.pretrained is True:
        if (options.blocks or BLOCKS, options.width or WIDTH) != (BLOCKS, WIDTH):
            raise ConfigError(
                "model.pretrained: public weights exist for blocks [3, 4, 23, 3] and width 64 alone"
            )
        load_backbone(_Backbone(model), "resnet101", True)
    elif config.pretrained and not model.conv1.weight.is_meta:
        load_initial(
            model, find_weights(str(config.pretrained)), model.backbone, options.pretrained_keys
        )

    return model


class _Backbone(nn.Module):
    """The parts of a DeepLabV2 that ImageNet weights fill, as a module of their own."""

    family = "resnet"

    def __init__(self, model: DeepLabV2):
        super().__init__()
        for name in model.backbone:
            self.add_module(name, getattr(model, name))
