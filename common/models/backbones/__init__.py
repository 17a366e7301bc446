"""Backbones: BACKBONES names them, `build_backbone` makes the one a config asks for.

A backbone is a module that gives a list of maps (B, C, H/stride, W/stride); `channels` are their widths and `family`
names the row that reads its official weights.
"""

from collections.abc import Callable
from functools import partial

from torch import nn

from common.config import ModelConfig, pick, typed_keywords
from common.models.backbones.dinov2 import DINOv2
from common.models.backbones.hrnet import HRNet
from common.models.backbones.mit import MiT
from common.models.backbones.resnet import resnet
from common.models.backbones.swin import Swin
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
    "swin_large": partial(Swin, dim=192, depths=(2, 2, 18, 2), heads=(6, 12, 24, 48), window=12),
    "vit_base_patch16": ViT,
    "dinov2_small": partial(DINOv2, dim=384, heads=6),
    "dinov2_base": partial(DINOv2, dim=768, heads=12),
    "dinov2_large": partial(DINOv2, dim=1024, heads=16, taps=(4, 11, 17, 23)),
}


def build_backbone(config: ModelConfig, /, **options) -> nn.Module:
    """The backbone that `config` names, made with `options`, with ImageNet weights when `config.pretrained` says so.

    Raises ConfigError for an unknown backbone or an option that it does not have, ValueError for unusable weights.
    """
    builder = pick(BACKBONES, config.backbone, "model.backbone")
    chosen = typed_keywords(builder, options, f"model.options.backbone ({config.backbone})")
    backbone = builder(**chosen)
    if config.pretrained and not config.checkpoint:  # a checkpoint holds the backbone too
        load_backbone(backbone, config.backbone, config.pretrained)
    return backbone
