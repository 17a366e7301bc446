"""DisAlign's calibration of a trained classifier (Zhang et al., CVPR 2021).

    ẑ = σ(x) · (α∘z + β) + (1 − σ(x)) · z

with x a pixel's features, z its logits, α and β a number each for every class, and σ the sigmoid of a 1×1 convolution:
2K + D + 1 numbers. In the release batch norm and ReLU come before the sigmoid, so that σ ≥ ½; not here.
"""

from typing import Any

import torch
from torch import Tensor, nn

from common.config import ConfigError


class Aligned(nn.Module):
    """A classifier with its calibration: features (B, D, h, w) to logits (B, K, h, w).

    It starts as the classifier itself, bit for bit: α = 1, β = 0, σ = ½.
    """

    def __init__(self, classifier: nn.Module, channels: int, classes: int):
        super().__init__()
        self.classifier = classifier
        self.alpha = nn.Parameter(torch.ones(classes))
        self.beta = nn.Parameter(torch.zeros(classes))
        self.gate = nn.Conv2d(channels, 1, 1)
        nn.init.zeros_(self.gate.weight)
        nn.init.zeros_(self.gate.bias)

    def forward(self, x: Tensor) -> Tensor:
        logits = self.classifier(x)
        share = self.gate(x).sigmoid()
        change = (self.alpha - 1).view(-1, 1, 1) * logits + self.beta.view(-1, 1, 1)
        return logits + share * change

    def own_parameters(self) -> list[nn.Parameter]:
        """Those of the calibration."""
        return [self.alpha, self.beta, *self.gate.parameters()]


def calibrated(classifier: nn.Module) -> Aligned:
    """A classifier of pixels, linear or cosine, with its calibration."""
    channels: Any = classifier.in_channels
    classes: Any = classifier.out_channels
    return Aligned(classifier, channels, classes)


def align(network: nn.Module, place: str) -> None:
    """Give the network's classifier `place` its calibration. ConfigError where that is no classifier of pixels."""
    classifier = dict(network.named_modules()).get(place)
    if not hasattr(classifier, "out_channels"):
        raise ConfigError(
            f"model.disalign: {place!r} is no classifier of the network; scripts/rebalance.py sets it"
        )

    network.set_submodule(place, calibrated(classifier))
