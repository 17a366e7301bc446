"""Cosine classifiers in the place of a network's 1×1 convolutions: `model.options.classifier: cosine`, `scale: 30`.

    z_k = s · (f · W_k) / (‖f‖ · ‖W_k‖)

with f a pixel's features and no bias. Neither the length of the features nor that of a class's weights can then say how
frequent a class is, and margins (LDAM, GCL) have a scale to be stated in.
"""

import math
from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.config import ConfigError, ModelConfig, typed
from common.config.bounds import Positive
from common.models.segmentor import SegmentationModel

SCALE = 30.0  # of LDAM, and of GCL's first stage
SHORTEST = 1e-6  # features that have a direction


@dataclass(frozen=True)
class ClassifierOptions:
    """Options of any network that classifies pixels by 1×1 convolutions. scale: s; None: SCALE."""

    classifier: Literal["linear", "cosine"] = "linear"
    scale: Positive | None = None

    def __post_init__(self):
        if self.scale is not None and self.classifier != "cosine":
            raise ValueError(
                f"scale: {self.scale:g} is that of a cosine classifier; set classifier: cosine, or remove it"
            )

    @property
    def cosine(self) -> float | None:
        """s; None where the classifier is linear."""
        if self.classifier == "linear":
            return None
        return SCALE if self.scale is None else self.scale


KEYS = ("classifier", "scale")


def split_options(config: ModelConfig) -> tuple[ClassifierOptions, ModelConfig]:
    """The options of the classifier, and the config without them. ConfigError where they are wrong."""
    ours = {key: value for key, value in config.options.items() if key in KEYS}
    others = {key: value for key, value in config.options.items() if key not in KEYS}
    return typed(ClassifierOptions, ours, "model.options"), replace(config, options=others)


def cosine_scale(config: ModelConfig) -> float | None:
    """The scale of a config's cosine classifier; None where it has a linear one."""
    return split_options(config)[0].cosine


class CosineClassifier(nn.Module):
    """Features (B, D, h, w) to float32 logits (B, K, h, w) in [−s, s]; norms are made in float32.

    Features of length 0 have no direction: their logits are 0, and have no gradient.
    The parameter is not called `weight`, so that a linear classifier's file is no file of this one.
    """

    def __init__(self, linear: nn.Conv2d, scale: float = SCALE):
        """linear: the 1×1 convolution whose initial weights are taken over."""
        super().__init__()
        self.in_channels = linear.in_channels
        self.out_channels = linear.out_channels
        self.scale = scale
        self.directions = linear.weight  # (K, D, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        unit = F.normalize(self.directions.float(), dim=1)
        length = torch.linalg.vector_norm(x, dim=1, keepdim=True, dtype=torch.float32)
        length = length.masked_fill(length < SHORTEST, math.inf)
        return F.conv2d(x, unit.to(x.dtype)) * (self.scale / length)

    def extra_repr(self) -> str:
        return f"{self.in_channels}, {self.out_channels}, scale={self.scale:g}"


def use_cosine(model: SegmentationModel, scale: float, name: str) -> None:
    """Exchange the classifiers of pixels for cosine ones, in place; all other weights stay as they were initialised.

    Raises ConfigError for a network, `name`, that has none.
    """
    if not model.pixel_classifiers:
        raise ConfigError(
            f"model.options.classifier: cosine does not fit {name}, whose pixels are not classified by a 1×1 "
            "convolution; remove it"
        )

    for place in model.pixel_classifiers:
        linear = model.get_submodule(place)
        model.set_submodule(place, CosineClassifier(linear, scale))
