"""DeepLabV3+ (ECCV 2018) as detectron2's DeepLab project builds it, as UniMatch (CVPR 2023) and U2PL (CVPR 2022) do.

All: ResNet, ASPP, the finest map reduced in channels, decoder at stride 4. They differ in switches:

                               detectron2              UniMatch                U2PL
    stride, last stage         16; dilations 2 2 2     16; dilations 1 2 2     8; dilations 4 8 16
    rates of the ASPP          6 12 18                 6 12 18                 12 24 36
    its pooled branch          has a bias              has a batch norm        has a batch norm
    what joins its branches    1×1 convolution         1×1 convolution         3×3 convolution
    channels of the finest     48                      48                      256
    decoder's convolutions     have no bias            have no bias            have a bias
    dropout                    0.1, after the ASPP     none                    0.1 of channels, after each of them
    auxiliary head             none                    none                    on the map before the last
    resizing                   half-pixel              aligned corners         aligned corners
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.config import ConfigError, ModelConfig, typed
from common.config.bounds import Length, Rate, Side, Width
from common.models.backbones import (
    build_backbone,
    is_timm,
    pixel_statistics,
    require_stride_4,
)
from common.models.segmentor import EncoderDecoder, Extents
from common.ops.resize import resize

STRIDE = 4  # of the logits


@dataclass(frozen=True)
class DeepLabV3PlusD2Options:
    """Defaults are detectron2's."""

    channels: Width = 256  # of every ASPP branch and of the decoder
    lateral_channels: Width = 48
    dilations: Annotated[tuple[Side, ...], Length(0, 16)] = (6, 12, 18)
    dropout: Rate = 0.1  # after the ASPP
    pool_norm: bool = False  # the pooled branch has a batch norm instead of a bias
    project_kernel: Literal[1, 3] = 1  # of the convolution that joins the branches
    bias: bool = False  # of the finest map's and the decoder's convolutions
    # of whole channels, after the ASPP, the decoder's and the auxiliary convolutions
    channel_dropout: Rate = 0.0
    auxiliary: bool = False  # a head on the map before the last
    backbone: Mapping[str, Any] = field(default_factory=dict)  # options of the backbone


class ConvNormReLU(nn.Module):
    """Convolution that keeps the size, batch norm, ReLU, dropout of whole channels."""

    def __init__(
        self,
        channels: int,
        out: int,
        kernel: int = 1,
        dilation: int = 1,
        *,
        bias: bool = False,
        dropout: float = 0.0,
    ):
        super().__init__()
        padding = kernel // 2 * dilation
        self.conv = nn.Conv2d(
            channels, out, kernel, padding=padding, dilation=dilation, bias=bias
        )
        self.norm = nn.BatchNorm2d(out)
        self.dropout = dropout
        nn.init.kaiming_uniform_(self.conv.weight, a=1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.conv(x)), inplace=True)
        return F.dropout2d(x, self.dropout, self.training) if self.dropout else x


class PyramidPooling(nn.Module):
    """Atrous spatial pyramid pooling: 1×1, dilated 3×3 and pooled branches, joined by a convolution.

    detectron2 pools with a window of the training crop's size; at that size, and here at any, it is the global mean.
    """

    def __init__(self, channels: int, options: DeepLabV3PlusD2Options):
        super().__init__()
        o = options
        out = o.channels
        branches = [ConvNormReLU(channels, out)] + [
            ConvNormReLU(channels, out, 3, d) for d in o.dilations
        ]
        self.branches = nn.ModuleList(branches)
        self.pool = ConvNormReLU(channels, out) if o.pool_norm else nn.Conv2d(channels, out, 1)
        joined = out * (len(branches) + 1)
        self.project = ConvNormReLU(joined, out, o.project_kernel, dropout=o.channel_dropout)
        self.dropout = nn.Dropout(o.dropout)
        if not o.pool_norm:
            nn.init.kaiming_uniform_(self.pool.weight, a=1)
            nn.init.zeros_(self.pool.bias)

    def forward(self, x: Tensor) -> Tensor:
        alone = isinstance(self.pool, ConvNormReLU) and not isinstance(
            self.pool.norm, nn.SyncBatchNorm
        )
        if alone and self.training and len(x) < 2:
            raise ValueError(
                "DeepLabV3+ cannot train on one image at a time, its pooled branch needs a variance: set "
                "data.streams.labeled.batch_size to 2 or more in each process"
            )

        pooled = F.relu(self.pool(x.mean((2, 3), keepdim=True))).expand(-1, -1, *x.shape[2:])
        return self.dropout(
            self.project(torch.cat([*(branch(x) for branch in self.branches), pooled], 1))
        )


class DeepLabV3PlusD2(EncoderDecoder):
    """`segment` gives `logits` (B, K, H/4, W/4) and `features`, what the classifier reads."""

    classifiers = ("predictor",)
    pixel_classifiers = classifiers
    average_softmax = False  # detectron2 averages logits

    def __init__(
        self,
        backbone: nn.Module,
        num_classes: int,
        mean,
        std,
        options: DeepLabV3PlusD2Options,
        align_corners: bool = False,
    ):
        super().__init__(num_classes, mean, std, align_corners)
        o = options
        self.backbone = backbone
        finest, *_, last_but_one, coarsest = backbone.channels
        self.aspp = PyramidPooling(coarsest, o)
        self.lateral = ConvNormReLU(finest, o.lateral_channels, bias=o.bias)
        widths = (o.channels + o.lateral_channels, o.channels)
        convs = {"bias": o.bias, "dropout": o.channel_dropout}
        self.fuse = nn.Sequential(*(ConvNormReLU(n, o.channels, 3, **convs) for n in widths))
        self.embedding_channels = o.channels
        self.predictor = nn.Conv2d(o.channels, num_classes, 1)
        nn.init.normal_(self.predictor.weight, std=0.001)
        nn.init.zeros_(self.predictor.bias)

        self.auxiliary_head: nn.Module | None = None
        if o.auxiliary:
            self.heads = ("decode", "aux")
            self.classifiers = self.pixel_classifiers = ("predictor", "auxiliary_head.1")
            self.auxiliary_head = nn.Sequential(
                ConvNormReLU(last_but_one, o.channels, 3, **convs),
                nn.Conv2d(o.channels, num_classes, 1),
            )

    def segment(self, x: Tensor, *, auxiliary: bool = True) -> dict[str, Any]:
        """Normalised images (B, 3, H, W) to `logits`, `features` and `embedding`, both what the classifier read, and
        `aux`: a list of the auxiliary head's logits, empty without such a head or `auxiliary`."""
        finest, *_, last_but_one, coarsest = self.backbone(x)
        features = self.embed((finest, coarsest))
        used = auxiliary and self.auxiliary_head is not None
        aux = [self.auxiliary_head(last_but_one)] if used else []

        logits = self.classify(features)
        return {"logits": logits, "features": features, "embedding": features, "aux": aux}

    def infer(self, images: Tensor) -> dict[str, Any]:
        """`segment` without the auxiliary head."""
        return self.segment(self.normalise(images), auxiliary=False)

    def encode(self, x: Tensor) -> tuple[Tensor, ...]:
        """Normalised images (B, 3, H, W) to the maps that the decoder reads: the finest and the coarsest one."""
        finest, *_, coarsest = self.backbone(x)
        return finest, coarsest

    def embed(self, maps: Sequence[Tensor]) -> Tensor:
        """What the classifier reads (B, channels, H/4, W/4), of `encode`'s maps."""
        finest, coarsest = maps
        lateral = self.lateral(finest)
        context = resize(self.aspp(coarsest), lateral.shape[-2:], self.align_corners)
        return self.fuse(torch.cat([lateral, context], 1))

    def classify(self, embedding: Tensor) -> Tensor:
        return self.predictor(embedding)

    def scores(self, out: dict[str, Any], geometry: Extents, rows: tuple[int, int]) -> Tensor:
        """Rows [a, b) of the logits enlarged 4 times and cropped: a side that is no multiple of 4 is not squeezed."""
        padded = tuple(STRIDE * side for side in out["logits"].shape[-2:])
        return self.upsample(out["logits"], geometry._replace(padded=padded), rows)


class DeepLabV3PlusUniMatch(DeepLabV3PlusD2):
    """UniMatch's and U2PL's: logits are enlarged to the image's size, whatever it is, with aligned corners."""

    average_softmax = True

    def __init__(
        self, backbone: nn.Module, num_classes: int, mean, std, options: DeepLabV3PlusD2Options
    ):
        super().__init__(backbone, num_classes, mean, std, options, align_corners=True)
        for name, module in self.named_modules():
            if isinstance(module, nn.Conv2d) and not name.startswith("backbone."):
                module.reset_parameters()  # torch's own start

    def scores(self, out: dict[str, Any], geometry: Extents, rows: tuple[int, int]) -> Tensor:
        return self.upsample(out["logits"], geometry, rows)


def dilate_last_stage(backbone: nn.Module, dilation: int = 2) -> nn.Module:
    """Give the 3×3 convolutions of the last stage's first block, too, the stage's dilation; in place.

    timm's (and torchvision's) ResNet leaves one at the dilation of the stage before.
    """
    for conv in backbone.layer4[0].modules():
        if isinstance(conv, nn.Conv2d) and conv.kernel_size == (3, 3):
            conv.dilation = conv.padding = (dilation, dilation)
    return backbone


def deeplabv3plus_d2(config: ModelConfig) -> DeepLabV3PlusD2:
    """The network of a config with a ResNet, or with any network of timm that has a map of stride 4."""
    options = typed(DeepLabV3PlusD2Options, config.options, "model.options")
    if config.align_corners:
        raise ConfigError(
            "model.align_corners: detectron2's DeepLabV3+ resizes without aligned corners; set it to false"
        )

    backbone = build_backbone(config, **{"output_stride": 16, **options.backbone})
    require_stride_4(backbone, "DeepLabV3+")
    if backbone.family == "resnet":
        dilate_last_stage(backbone)

    return DeepLabV3PlusD2(backbone, config.num_classes, *pixel_statistics(config), options)


def deeplabv3plus_unimatch(config: ModelConfig) -> DeepLabV3PlusUniMatch:
    """UniMatch's network of a config with a ResNet (the release takes resnet50s or resnet101s), or with any network of
    timm that has a map of stride 4."""
    options = typed(
        DeepLabV3PlusD2Options,
        {"dropout": 0.0, "pool_norm": True, **config.options},
        "model.options",
    )
    if not config.align_corners:
        raise ConfigError(
            "model.align_corners: UniMatch's DeepLabV3+ resizes with aligned corners; set it to true"
        )

    backbone = build_backbone(config, **{"output_stride": 16, **options.backbone})
    require_stride_4(backbone, "DeepLabV3+")

    return DeepLabV3PlusUniMatch(
        backbone, config.num_classes, *pixel_statistics(config), options
    )


U2PL: dict[str, Any] = {
    "lateral_channels": 256,
    "dilations": (12, 24, 36),
    "dropout": 0.0,
    "pool_norm": True,
    "project_kernel": 3,
    "bias": True,
    "channel_dropout": 0.1,
    "auxiliary": True,
}
U2PL_RESNET = {"output_stride": 8, "multi_grid": (2, 2, 4), "ceil_pool": True}


def deeplabv3plus_u2pl(config: ModelConfig) -> DeepLabV3PlusUniMatch:
    """U2PL's network of a config with a ResNet of three blocks in its last stage (the release takes resnet101s), or
    with any network of timm that has a map of stride 4."""
    options = typed(DeepLabV3PlusD2Options, {**U2PL, **config.options}, "model.options")
    if not config.align_corners:
        raise ConfigError(
            "model.align_corners: U2PL's DeepLabV3+ resizes with aligned corners; set it to true"
        )

    own = {"output_stride": 8} if is_timm(config) else U2PL_RESNET
    backbone = build_backbone(config, **{**own, **options.backbone})
    require_stride_4(backbone, "DeepLabV3+")

    return DeepLabV3PlusUniMatch(
        backbone, config.num_classes, *pixel_statistics(config), options
    )
