"""DeepLabV3+ (ECCV 2018) as USRN builds it, with one branch, or with a second one for the subclasses of its classes.

ResNet with the plain stem at stride 16, multi-grid dilations 2, 4, 8 in the last stage, ASPP, a decoder at stride 4.
The second branch shares stem and first stage, and has its own copy of everything else. Modules carry the names of the
official checkpoints.
"""

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.config import ConfigError, ModelConfig, pick, typed
from common.config.bounds import AtLeast, AtMost, Depth, Rate, Width
from common.lazy import Lazy
from common.models.backbones import (
    build_backbone,
    is_timm,
    pixel_statistics,
    refuse_resnet_options,
    require_stride_4,
)
from common.models.pretrained import load_backbone
from common.models.segmentor import SegmentationModel
from common.ops.resize import resize

torchvision = Lazy("torchvision")

BLOCKS = {"resnet50": (3, 4, 6, 3), "resnet101": (3, 4, 23, 3)}
WIDTH = 64
RATES = (6, 12, 18)  # dilations of the ASPP's 3×3 branches
SUFFIX = "_SubCls"  # of the second branch's ASPP, decoder, classifier; its stages end in _aux
DROPOUT = (0.5, 0.5, 0.1)  # after the ASPP, inside the decoder, before the classifier


@dataclass(frozen=True)
class DeepLabV3PlusOptions:
    """Options of DeepLabV3+; the defaults are the official network."""

    # bottlenecks of the ResNet's stages; None: those of model.backbone
    blocks: tuple[Depth, ...] | None = None
    # channels of its stem, None: 64; stages end in 4, 8, 16, 32 times as many
    width: Width | None = None
    channels: Width = 256  # of every ASPP branch and of the decoder
    low_channels: Width = 48  # that the first stage's map is reduced to
    dropout: tuple[Rate, Rate, Rate] = DROPOUT
    # options of a backbone timm:NAME in the ResNet's place
    backbone: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        if self.blocks and len(self.blocks) != 4:
            raise ValueError(f"blocks: {list(self.blocks)} are not four stages")


@dataclass(frozen=True)
class USRNOptions(DeepLabV3PlusOptions):
    """Options of the network with two branches."""

    subclasses: Annotated[int, AtLeast(0), AtMost(32768)] = 0  # K, all subclasses together
    copy_branch: bool = False  # weights of one branch fill both; the second's classifier is new


class Backbone(nn.Module):
    """(B, 3, H, W) to the maps of the first stage (stride 4) and of the last one (stride 16), this one per branch."""

    def __init__(self, blocks: tuple[int, ...], width: int, dual: bool):
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        grid = [2 * 2 ** min(i, 2) for i in range(blocks[3])]
        self.layer1 = stage(width, width, [1] * blocks[0])
        for suffix in ("", "_aux") if dual else ("",):
            self.add_module(
                f"layer2{suffix}", stage(4 * width, 2 * width, [1] * blocks[1], stride=2)
            )
            self.add_module(
                f"layer3{suffix}", stage(8 * width, 4 * width, [1] * blocks[2], stride=2)
            )
            self.add_module(f"layer4{suffix}", stage(16 * width, 8 * width, grid))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        self.channels = (4 * width, 32 * width)
        self.copy_stages()

    def copy_stages(self) -> None:
        """Start the second copy of stages 2 to 4 where the first one is."""
        for name in ("layer2", "layer3", "layer4"):
            if hasattr(self, f"{name}_aux"):
                getattr(self, f"{name}_aux").load_state_dict(getattr(self, name).state_dict())

    def forward(self, x: Tensor, dual: bool = False) -> tuple[Tensor, Tensor, Tensor | None]:
        x = F.relu(self.bn1(self.conv1(x)), inplace=True)
        low = self.layer1(F.max_pool2d(x, 3, 2, 1))
        high = self.layer4(self.layer3(self.layer2(low)))
        return (
            low,
            high,
            self.layer4_aux(self.layer3_aux(self.layer2_aux(low))) if dual else None,
        )


class TimmBackbone(nn.Module):
    """A network of timm in the ResNet's place. Which of its parts are late stages is not known of every network, so the
    second branch has a whole copy of it, of which it reads the coarsest map; the finest one is the first branch's."""

    def __init__(self, net: nn.Module, dual: bool):
        super().__init__()
        self.net = net
        self.net_aux = deepcopy(net) if dual else None
        self.channels = (net.channels[0], net.channels[-1])

    def forward(self, x: Tensor, dual: bool = False) -> tuple[Tensor, Tensor, Tensor | None]:
        low, *_, high = self.net(x)
        return low, high, self.net_aux(x)[-1] if dual else None


def stage(channels: int, width: int, dilations: list[int], stride: int = 1) -> nn.Sequential:
    """Bottlenecks that stride in their 3×3 convolution: (B, channels, h, w) to (B, 4·width, h/stride, w/stride)."""
    shortcut = nn.Sequential(
        nn.Conv2d(channels, 4 * width, 1, stride, bias=False), nn.BatchNorm2d(4 * width)
    )
    block = torchvision.models.resnet.Bottleneck
    first = block(channels, width, stride, shortcut, dilation=dilations[0])
    others = (block(4 * width, width, dilation=dilation) for dilation in dilations[1:])
    return nn.Sequential(first, *others)


class Branch(nn.Module):
    """One dilated convolution of the ASPP, batch norm, ReLU."""

    def __init__(self, channels: int, out: int, dilation: int):
        super().__init__()
        kernel, padding = (1, 0) if dilation == 1 else (3, dilation)
        self.atrous_conv = nn.Conv2d(
            channels, out, kernel, padding=padding, dilation=dilation, bias=False
        )
        self.bn = nn.BatchNorm2d(out)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.atrous_conv(x)), inplace=True)


class ASPP(nn.Module):
    """Atrous spatial pyramid pooling: four convolutions and the image's mean, joined by a 1×1 convolution."""

    def __init__(self, channels: int, out: int, dropout: float):
        super().__init__()
        for i, dilation in enumerate((1, *RATES), 1):
            self.add_module(f"aspp{i}", Branch(channels, out, dilation))
        pool = (
            nn.AdaptiveAvgPool2d(1),
            nn.Conv2d(channels, out, 1, bias=False),
            nn.BatchNorm2d(out),
            nn.ReLU(),
        )
        self.global_avg_pool = nn.Sequential(*pool)
        self.conv1 = nn.Conv2d(5 * out, out, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(out)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        if self.training and len(x) < 2 and not isinstance(self.bn1, nn.SyncBatchNorm):
            raise ValueError(
                "DeepLabV3+ cannot train on one image at a time: its pooled branch needs a variance"
            )
        pooled = self.global_avg_pool(x).expand(-1, -1, *x.shape[2:])
        x = torch.cat([self.aspp1(x), self.aspp2(x), self.aspp3(x), self.aspp4(x), pooled], 1)
        return self.dropout(F.relu(self.bn1(self.conv1(x)), inplace=True))


class Decoder(nn.Module):
    """The ASPP's map, enlarged and joined with the reduced map of the first stage: (B, out, H/4, W/4)."""

    def __init__(self, low_channels: int, reduced: int, out: int, dropout: float):
        super().__init__()
        self.conv1 = nn.Conv2d(low_channels, reduced, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(reduced)
        first = (
            nn.Conv2d(out + reduced, out, 3, padding=1, bias=False),
            nn.BatchNorm2d(out),
            nn.ReLU(inplace=True),
        )
        second = (
            nn.Conv2d(out, out, 3, padding=1, bias=False),
            nn.BatchNorm2d(out),
            nn.ReLU(inplace=True),
        )
        self.last_conv = nn.Sequential(*first, nn.Dropout(dropout), *second)

    def forward(self, x: Tensor, low: Tensor) -> Tensor:
        low = F.relu(self.bn1(self.conv1(low)), inplace=True)
        return self.last_conv(
            torch.cat([resize(x, low.shape[-2:], align_corners=True), low], 1)
        )


class Encoder(nn.Module):
    """Backbone, ASPP and decoder, the latter two once per branch: (B, 3, H, W) to maps at stride 4."""

    def __init__(self, backbone: nn.Module, options: DeepLabV3PlusOptions, dual: bool):
        super().__init__()
        o, (after_aspp, inside, _) = options, options.dropout
        self.backbone = backbone
        finest, coarsest = backbone.channels
        for suffix in ("", SUFFIX) if dual else ("",):
            self.add_module(f"aspp{suffix}", ASPP(coarsest, o.channels, after_aspp))
            self.add_module(
                f"decoder{suffix}", Decoder(finest, o.low_channels, o.channels, inside)
            )
        for name, module in self.named_modules():
            if isinstance(module, nn.Conv2d) and not name.startswith("backbone."):
                nn.init.kaiming_normal_(module.weight)

    def forward(self, x: Tensor, dual: bool = False) -> tuple[Tensor, Tensor | None]:
        low, high, high_sub = self.backbone(x, dual)
        sub = self.decoder_SubCls(self.aspp_SubCls(high_sub), low) if dual else None
        return self.decoder(self.aspp(high), low), sub


class DeepLabV3Plus(SegmentationModel):
    """Logits at stride 4; images are padded by reflection to a multiple of 8.

    backbone: a Backbone or TimmBackbone, of two branches where there are subclasses.
    subclasses: K, the outputs of the second branch; 0: there is none.
    """

    def __init__(
        self,
        num_classes: int,
        mean,
        std,
        backbone: nn.Module,
        options: DeepLabV3PlusOptions,
        subclasses: int = 0,
    ):
        super().__init__(num_classes, mean, std, align_corners=True, divisor=8)
        self.subclasses, self.dual = subclasses, subclasses > 0
        self.copy_branch = isinstance(options, USRNOptions) and options.copy_branch
        self.heads = ("decode", "subclasses") if self.dual else ("decode",)
        self.embedding_channels = options.channels
        self.encoder = Encoder(backbone, options, self.dual)
        self.classifier = classifier(options.channels, num_classes, options.dropout[2])
        if self.dual:
            self.classifier_SubCls = classifier(
                options.channels, subclasses, options.dropout[2]
            )
        self.classifiers = ("classifier.1",)
        self.pixel_classifiers = (
            ("classifier.1", "classifier_SubCls.1") if self.dual else self.classifiers
        )

    def normalise(self, images: Tensor, extent: Tensor | None = None) -> Tensor:
        """RGB in 0–255 to what `segment` takes, padded by reflection at the bottom and right."""
        height, width = images.shape[-2:]
        padded_height, padded_width = self._padded((height, width))
        x = self.standardise(images, extent)
        if (height, width) == (padded_height, padded_width):
            return x
        return F.pad(x, (0, padded_width - width, 0, padded_height - height), mode="reflect")

    def encode(self, x: Tensor, subclasses: bool = True) -> tuple[Tensor, Tensor | None]:
        """Normalised images (B, 3, H, W) to the maps (B, 256, H/4, W/4) that `classifier` and `classifier_SubCls`
        read; the second one is None without `subclasses`, or where the network has one branch."""
        return self.encoder(x, subclasses and self.dual)

    def forward(
        self,
        images: Tensor,
        extent: Tensor | None = None,
        *,
        subclasses: bool | None = None,
        pooled: int = 0,
    ) -> dict[str, Any]:
        """Images (B, 3, H, W), RGB in 0–255, to the outputs of `segment`, which says what the keywords do."""
        return self.segment(
            self.normalise(images, extent), subclasses=subclasses, pooled=pooled
        )

    def segment(
        self, x: Tensor, *, subclasses: bool | None = None, pooled: int = 0
    ) -> dict[str, Any]:
        """Normalised images (B, 3, H, W) to `logits` (B, C, H/4, W/4) and `features` (B, 256, H/4, W/4); with
        `subclasses` (default: in training) `sub_logits` (B, K, H/4, W/4) and `sub_features` too.

        pooled: of so many images, the last ones, features are pooled before they are classified: theirs are
        `pooled_logits` (pooled, C, H/8, W/8) and `pooled_sub_logits`, and the others' are `logits` and `sub_logits`,
        which are left out where there are no others.
        """
        features, sub_features = self.encode(
            x, self.training if subclasses is None else subclasses
        )
        out = {
            "features": features,
            "embedding": features[: len(features) - pooled],
            "aux": [],
            **logits_of(features, self.classifier, "logits", pooled),
        }
        if sub_features is not None:
            sub_logits = logits_of(sub_features, self.classifier_SubCls, "sub_logits", pooled)
            out |= {"sub_features": sub_features, **sub_logits}
        return out

    def infer(self, images: Tensor) -> dict[str, Any]:
        """`logits` alone, from the first branch."""
        return {"logits": self.segment(self.normalise(images), subclasses=False)["logits"]}


def pool(features: Tensor) -> Tensor:
    """Features at stride 4 (B, D, h, w) to stride 8 (B, D, h/2, w/2): means of 2×2."""
    return F.avg_pool2d(features, 2)


def logits_of(features: Tensor, head: nn.Module, name: str, pooled: int) -> dict[str, Tensor]:
    """What a classifier says of features (B, D, h, w): as `name`, but of the last `pooled` images as `pooled_<name>`,
    (pooled, K, h/2, w/2)."""
    if pooled == 0:
        return {name: head(features)}

    first = len(features) - pooled
    if first == 0:
        return {f"pooled_{name}": head(pool(features))}

    return {name: head(features[:first]), f"pooled_{name}": head(pool(features[first:]))}


def classifier(channels: int, classes: int, dropout: float) -> nn.Sequential:
    """Dropout and the 1×1 convolution (Kaiming normal over the fan-in)."""
    conv = nn.Conv2d(channels, classes, 1)
    nn.init.kaiming_normal_(conv.weight)
    return nn.Sequential(nn.Dropout(dropout), conv)


def deeplabv3plus(config: ModelConfig) -> DeepLabV3Plus:
    """The network with one branch: USRN's baseline, and what predicts after USRN's training."""
    return _build(config, typed(DeepLabV3PlusOptions, config.options, "model.options"))


def usrn(config: ModelConfig) -> DeepLabV3Plus:
    """The network with a second branch for `options.subclasses` subclasses; both start from the same weights."""
    options = typed(USRNOptions, config.options, "model.options")
    if options.subclasses < config.num_classes:
        raise ConfigError(
            f"model.options.subclasses: {options.subclasses} for {config.num_classes} classes; it is the sum of "
            "the classes' numbers of subclasses, each 1 or more"
        )
    return _build(config, options, options.subclasses)


def _build(
    config: ModelConfig, options: DeepLabV3PlusOptions, subclasses: int = 0
) -> DeepLabV3Plus:
    if not config.align_corners:
        raise ConfigError(
            "model.align_corners: USRN's DeepLabV3+ resizes with aligned corners; set it to true"
        )
    statistics = pixel_statistics(config)
    if is_timm(config):
        backbone = _timm_backbone(config, options, dual=subclasses > 0)
        return DeepLabV3Plus(config.num_classes, *statistics, backbone, options, subclasses)

    if options.backbone:
        raise ConfigError(
            "model.options.backbone: only a backbone timm:NAME has options here; set model.backbone"
        )
    blocks = options.blocks or pick(BLOCKS, config.backbone, "model.backbone")
    backbone = Backbone(blocks, options.width or WIDTH, dual=subclasses > 0)
    model = DeepLabV3Plus(config.num_classes, *statistics, backbone, options, subclasses)
    if config.pretrained and not config.checkpoint:  # a checkpoint holds the backbone too
        load_backbone(_Stages(model.encoder.backbone), config.backbone, config.pretrained)
        model.encoder.backbone.copy_stages()
    return model


def _timm_backbone(
    config: ModelConfig, options: DeepLabV3PlusOptions, dual: bool
) -> TimmBackbone:
    """ConfigError for a network without a map of stride 4, and for options of the ResNet."""
    refuse_resnet_options(options, ("blocks", "width"))
    net = build_backbone(config, **{"output_stride": 16, **options.backbone})
    require_stride_4(net, "DeepLabV3+")
    return TimmBackbone(net, dual)


class _Stages(nn.Module):
    """The parts of a backbone that ImageNet weights fill, as a module of their own."""

    family = "resnet"

    def __init__(self, backbone: Backbone):
        super().__init__()
        for name in ("conv1", "bn1", "layer1", "layer2", "layer3", "layer4"):
            self.add_module(name, getattr(backbone, name))
