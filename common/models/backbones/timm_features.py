"""Any backbone of timm that gives feature maps: `backbone: timm:NAME`.

Hierarchical networks (ResNets, ConvNeXt, EfficientNet, PVT, Swin, MaxViT, …) give their maps from stride 4 on, plain
transformers (ViT, DINOv2, DINOv3, EVA) the tokens of four evenly spaced blocks as maps of one stride.
"""

import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

from common.config import ConfigError, nearest
from common.models.pretrained.containers import read, state_dict, tensors

PREFIX = "timm:"
SIZE_OPTIONS = ({"dynamic_img_size": True}, {"strict_img_size": False}, {})  # how timm lets images be of any size
FINEST = 4  # stride of the finest map that heads read


class TimmFeatures(nn.Module):
    """Normalised images (B, 3, H, W), sides a multiple of `divisor`, to a list of maps (B, C, H/stride, W/stride).

    channels, strides: of the maps. mean, std: the pixel statistics of the weights, on the 0–255 scale.
    """

    family = "timm"

    def __init__(self, net: nn.Module, divisor: int):
        super().__init__()
        self.net, self.divisor = net, divisor
        self.channels = tuple(net.feature_info.channels())
        self.strides = tuple(net.feature_info.reduction())
        self.channels_last = str(getattr(net, "output_fmt", "NCHW")).endswith("NHWC")

    def forward(self, x: Tensor) -> list[Tensor]:
        maps = self.net(x)
        return [m.permute(0, 3, 1, 2).contiguous() for m in maps] if self.channels_last else list(maps)


def timm_features(
    name: str,
    pretrained: bool | str = False,
    *,
    drop_path: float | None = None,
    output_stride: int | None = None,
    taps: tuple[int, ...] | None = None,
) -> TimmFeatures:
    """The backbone `name` of timm, e.g. `convnext_tiny.fb_in22k`.

    pretrained: True, timm's own weights from the hub; a file with weights of the classifier, under timm's names or in
    timm's order, or in a form that timm itself converts; or the name of an installed package that holds one file.
    drop_path: rate of stochastic depth. output_stride: 8 or 16 where timm offers dilation. taps: blocks of a plain
    transformer, or levels of another network, whose maps are given.

    ConfigError for an unknown name or an option that it does not have, ValueError for weights that do not fit.
    """
    architecture = name.split(".")[0]
    if architecture not in timm.list_models():
        known = dict.fromkeys(timm.list_models())
        raise ConfigError(f"model.backbone: timm has no model {architecture!r}; {_short_nearest(architecture, known)}")

    options = {"drop_path_rate": drop_path, "output_stride": output_stride}
    options = {key: value for key, value in options.items() if value is not None}
    sizes = _size_options(name, options)
    levels = _levels(name, {**options, **sizes}, taps)
    divisor = _divisor(name, {**options, **sizes, "out_indices": levels})

    weights: dict[str, Any] = {}
    if pretrained and torch.get_default_device().type != "meta":
        weights = {"pretrained": True, "pretrained_cfg_overlay": {"state_dict": _weights(name, pretrained, sizes)}}
    net = timm.create_model(name, features_only=True, out_indices=levels, **options, **sizes, **weights)
    return TimmFeatures(net, divisor)


def pixel_statistics(name: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and deviation of the pixels that a timm model expects, on the 0–255 scale."""
    config = timm.get_pretrained_cfg(name)
    if config is None:
        config = timm.models.PretrainedCfg()
    mean = tuple(255 * value for value in config.mean)
    return mean, tuple(255 * value for value in config.std)


# What a model can do, asked of a copy that holds no memory ----------------------------------------------------------


def _draft(name: str, **options: Any) -> nn.Module:
    with torch.device("meta"):
        return timm.create_model(name, features_only=True, **options).eval()


def _size_options(name: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """The option that lets the model take images of any size; ConfigError where another option is unknown to it."""
    problem: Exception | None = None
    for candidate in SIZE_OPTIONS:
        try:
            _draft(name, **options, **candidate)
            return candidate
        except (TypeError, RuntimeError, AssertionError, NotImplementedError, AttributeError, ValueError) as error:
            problem = error
    given = ", ".join(options) or "no option"
    reason = " ".join(str(problem).split())
    raise ConfigError(f"model.backbone: timm:{name} gives no feature maps with {given}: {reason}")


def _levels(name: str, options: Mapping[str, Any], taps: tuple[int, ...] | None) -> tuple[int, ...]:
    """Which of the model's maps are given."""
    every = _draft(name, **options).feature_info
    strides = [item["reduction"] for item in every.info]
    if taps is not None:
        beyond = [tap for tap in taps if not 0 <= tap < len(strides)]
        if beyond or not taps:
            last = len(strides) - 1
            raise ConfigError(f"model.options.backbone: taps: {list(taps)}: timm:{name} has maps 0 to {last}")
        return taps
    if len(set(strides)) == 1:  # a plain transformer
        return tuple(len(strides) * part // 4 - 1 for part in (1, 2, 3, 4))
    return tuple(level for level, stride in enumerate(strides) if stride >= FINEST)[-4:]


def _divisor(name: str, options: Mapping[str, Any]) -> int:
    """What the sides of an image have to be a multiple of: the coarsest stride, or a window's whole size."""
    net = _draft(name, **options)
    coarsest = math.lcm(*net.feature_info.reduction())
    native = timm.get_pretrained_cfg(name)
    window = max(native.input_size[1:]) if native is not None else coarsest
    for divisor in (coarsest, window):
        if _takes(net, (2 * divisor, 3 * divisor)):
            return divisor
    raise ConfigError(
        f"model.backbone: timm:{name} takes images of {window}×{window} alone; choose one that takes any size"
    )


def _takes(net: nn.Module, size: tuple[int, int]) -> bool:
    try:
        net(torch.zeros(1, 3, *size, device="meta"))
    except (RuntimeError, AssertionError, ValueError):
        return False
    return True


def _short_nearest(name: str, known: Mapping[str, Any]) -> str:
    hint = nearest(name, known)
    return hint if len(hint) < 100 else "timm.list_models() names them"


# Weights -------------------------------------------------------------------------------------------------------------


def _weights(name: str, source: bool | str, sizes: Mapping[str, Any]) -> dict[str, Tensor]:
    """Weights under timm's names, checked: every tensor of the network is there and has its shape."""
    overlay: dict[str, Any] = {}
    where = f"weights of timm:{name}"
    if source is not True:
        path = _file(str(source))
        where = str(path)
        overlay = {"state_dict": _in_order(tensors(state_dict(read(path)[0])), name)}
    try:
        # Without a classifier, so that a file may have any number of classes; the rest is loaded strictly.
        whole = timm.create_model(name, pretrained=True, num_classes=0, pretrained_cfg_overlay=overlay, **sizes)
    except Exception as error:  # whatever the download library of the day raises
        reason = " ".join(str(error).split())[:300]
        hint = "; without network, set model.pretrained to a file" if source is True else ""
        raise ValueError(f"{where}: cannot be used for timm:{name} ({type(error).__name__}: {reason}){hint}") from error
    return whole.state_dict()


def _in_order(state: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    """`state` under timm's names where it has all tensors of the classifier, in timm's order and shapes."""
    with torch.device("meta"):
        own = timm.create_model(name).state_dict()
    counters = ("num_batches_tracked",)
    theirs = [(key, value) for key, value in state.items() if not key.endswith(counters)]
    ours = [(key, value.shape) for key, value in own.items() if not key.endswith(counters)]
    same = len(theirs) == len(ours) and all(t.shape == s for (_, t), (_, s) in zip(theirs, ours, strict=True))
    if not same or state.keys() == own.keys():
        return state
    return {key: value for (key, _), (_, value) in zip(ours, theirs, strict=True)}


def _file(source: str) -> Path:
    """The file that `source` names: itself, or the one weight file of an installed package."""
    path = Path(source)
    if path.exists():
        return path
    package = source.replace("-", "_")
    for folder in map(Path, sys.path):
        found = sorted((folder / package).rglob("*.pth")) if package.isidentifier() else []
        if len(found) == 1:
            return found[0]
    raise ValueError(f"model.pretrained: {source}: no such file, and no installed package with one weight file")
