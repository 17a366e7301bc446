"""MODEL.WEIGHTS: nothing, the ImageNet weights of a backbone, or a checkpoint of the whole network."""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from common.config import Config, ConfigError

# Files of a backbone alone, as the release's conversion tools and detectron2's catalogue name them
RESNET = re.compile(r"R-(?P<depth>50|101)\.(pkl|pth)$")
SWIN = re.compile(
    r"(?P<name>swin_(tiny|small|base|large))_patch4_window\d+_\d+(?P<large>_22k)?\.(pkl|pth)$"
)
FETCHED = {  # the files whose weights `model.pretrained: true` fetches
    "R-50": "resnet50",
    "R-101": "resnet101",
    "swin_tiny_patch4_window7_224": "swin_tiny",
    "swin_small_patch4_window7_224": "swin_small",
    "swin_base_patch4_window12_384": "swin_base",
    "swin_large_patch4_window12_384_22k": "swin_large",
}


def quoted(text: str) -> str:
    """What YAML reads as this very string, which may look like a number."""
    return json.dumps(text, ensure_ascii=False)


def weights(value: str, typed: Mapping[str, str], draft: Config) -> Sequence[str]:
    """Our overrides. "": from scratch. A backbone's file, such as R-50.pkl or detectron2://…/R-50.pkl: that file, or
    where there is none the same weights from timm. Any other: a checkpoint of the whole network. Raises ConfigError."""
    if value in ("", "''", '""'):
        return ["model.checkpoint=null", "model.pretrained=false"]

    backbone = backbone_of(value)
    if backbone is None:
        if "://" in value:
            raise ConfigError(f"{value!r} is not fetched here; give the path of the file")
        return [f"model.checkpoint={quoted(value)}"]

    if backbone != draft.model.backbone:
        raise ConfigError(
            f"{value!r} is of {backbone}, and model.backbone is {draft.model.backbone}; make them equal"
        )

    return ["model.checkpoint=null", f"model.pretrained={backbone_source(value)}"]


def backbone_of(value: str) -> str | None:
    """The backbone whose ImageNet weights a file name says it holds; None for any other file."""
    name = value.rpartition("/")[2]
    if found := RESNET.match(name):
        return f"resnet{found['depth']}"
    if found := SWIN.match(name):
        return found["name"]

    return None


def backbone_source(value: str) -> str:
    """`model.pretrained` for a backbone's file: the file where it exists, else `true`."""
    path = Path(value)
    if path.is_file():
        return quoted(value)
    if "/MSRA/" in value:
        raise ConfigError(
            f"{value!r} is for BGR images and another place of the strides; give torchvision's R-50.pkl"
        )
    if path.stem not in FETCHED:
        raise ConfigError(
            f"{value!r}: no such file, and timm's weights of this backbone are others"
        )

    return "true"
