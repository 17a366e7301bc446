"""Backbones: BACKBONES names them, `build_backbone` makes the one a config asks for.

A backbone is a module that gives a list of maps (B, C, H/stride, W/stride); `channels` are their widths and `family`
names the row that reads its official weights. Beside these there is every network of timm: `timm:NAME`.
"""

from collections.abc import Callable, Collection
from functools import partial

from torch import nn

from common.config import ConfigError, ModelConfig, pick, typed_keywords
from common.models.backbones.dinov2 import DINOv2
from common.models.backbones.hrnet import HRNet
from common.models.backbones.mit import MiT
from common.models.backbones.resnet import resnet
from common.models.backbones.swin import Swin
from common.models.backbones.timm_features import (
    FINEST,
    PREFIX,
    PYRAMID,
    Statistics,
    TimmFeatures,
    own_statistics,
    timm_features,
)
from common.models.backbones.vit import ViT
from common.models.pretrained.timm import load_backbone

BACKBONES: dict[str, Callable[..., nn.Module]] = {
    "resnet18": partial(resnet, "resnet18"),
    "resnet50": partial(resnet, "resnet50"),
    "resnet101": partial(resnet, "resnet101"),
    "resnet50c": partial(resnet, "resnet50c"),
    "resnet101c": partial(resnet, "resnet101c"),
    "resnet50s": partial(resnet, "resnet50s"),
    "resnet101s": partial(resnet, "resnet101s"),
    "hrnet_w18": partial(HRNet, "hrnet_w18"),
    "hrnet_w18_small": partial(HRNet, "hrnet_w18_small"),
    "mit_b0": partial(MiT, "mit_b0"),
    "mit_b5": partial(MiT, "mit_b5"),
    "swin_tiny": Swin,
    "swin_small": partial(Swin, depths=(2, 2, 18, 2)),
    "swin_base": partial(Swin, dim=128, depths=(2, 2, 18, 2), heads=(4, 8, 16, 32), window=12),
    "swin_large": partial(
        Swin, dim=192, depths=(2, 2, 18, 2), heads=(6, 12, 24, 48), window=12
    ),
    "vit_base_patch16": ViT,
    "dinov2_small": partial(DINOv2, dim=384, heads=6),
    "dinov2_base": partial(DINOv2, dim=768, heads=12),
    "dinov2_large": partial(DINOv2, dim=1024, heads=16, taps=(4, 11, 17, 23)),
}
IMAGENET: Statistics = ((123.675, 116.28, 103.53), (58.395, 57.12, 57.375))  # mean, deviation


def build_backbone(config: ModelConfig, /, **options) -> nn.Module:
    """The backbone that `config` names, made with `options`, with ImageNet weights when `config.pretrained` says so.

    Raises ConfigError for an unknown backbone or an option that it does not have, ValueError for unusable weights.
    """
    where = f"model.options.backbone ({config.backbone})"
    # a checkpoint holds the backbone too
    pretrained = False if config.checkpoint else config.pretrained
    if is_timm(config):
        chosen = typed_keywords(timm_features, options, where)
        return timm_features(config.backbone.removeprefix(PREFIX), pretrained, **chosen)

    builder = pick(
        {**BACKBONES, f"{PREFIX}NAME": timm_features}, config.backbone, "model.backbone"
    )
    backbone = builder(**typed_keywords(builder, options, where))
    if pretrained:
        load_backbone(backbone, config.backbone, pretrained)

    return backbone


def build_pyramid(config: ModelConfig, /, **options) -> nn.Module:
    """`build_backbone` for a head that reads maps of falling resolution: a plain transformer of timm ends in the
    multi-level neck, which makes maps of strides 4, 8, 16 and 32."""
    backbone = build_backbone(config, **options)
    if isinstance(backbone, TimmFeatures) and backbone.plain:
        backbone.add_neck()

    return backbone


def require_stride_4(backbone: nn.Module, model: str) -> None:
    """ConfigError unless a backbone gives maps of which the first has stride 4, as `model` needs them."""
    strides = getattr(backbone, "strides", PYRAMID)
    if strides[0] != FINEST or len(set(strides)) == 1:
        name = (
            f"{PREFIX}{backbone.name}"
            if isinstance(backbone, TimmFeatures)
            else backbone.family
        )
        raise ConfigError(
            f"model.backbone: {name} gives maps of strides {', '.join(map(str, strides))}; {model} needs one of "
            "stride 4 and coarser ones (UPerNet takes any)"
        )


def refuse_resnet_options(options: object, names: Collection[str]) -> None:
    """ConfigError for options of a ResNet that stand beside `timm:NAME`, where they have no effect."""
    for name in names:
        if getattr(options, name):
            raise ConfigError(
                f"model.options.{name}: of the ResNet; with backbone timm:NAME set it to null"
            )


def is_timm(config: ModelConfig) -> bool:
    """Whether the backbone is one of timm's, `timm:NAME`."""
    return config.backbone.startswith(PREFIX)


def pixel_statistics(config: ModelConfig) -> Statistics:
    """Mean and deviation of the pixels on the 0–255 scale: the config's; else those of a network of timm's own weights,
    and of ImageNet for every other one."""
    own = own_statistics(config.backbone.removeprefix(PREFIX)) if is_timm(config) else IMAGENET
    mean = own[0] if config.mean is None else config.mean
    std = own[1] if config.std is None else config.std
    return mean, std
