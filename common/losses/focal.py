"""Losses that weigh a pixel by how well it is predicted: focal loss and PAT."""

import math
from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor

from common.config.bounds import AtLeast, AtMost, NotNegative, Positive

LEAST = torch.finfo(torch.float32).tiny  # the least number of full precision


@dataclass(frozen=True)
class Focal:
    """(1 − p_y)^γ · CE (Lin et al., ICCV 2017), the softmax form; balance classes by `class_weight`, not by an α.

    It is not a proper loss: it levels the prior as well. detach: the factor takes no gradient (as in GCL's stage 2).
    """

    gamma: NotNegative = 2.0
    detach: bool = False

    def __call__(self, loss: Tensor, logits: Tensor, label: Tensor) -> Tensor:
        """Losses of pixels (…), from their cross-entropies (…)."""
        # 1 − p_y, which float32 would round to 0 from a loss of 6e-8 down
        missed = -torch.expm1(-loss)
        # above 0, where the slope of a power with γ < 1 is infinite: its product with a loss of 0 would be NaN
        factor = missed.clamp(min=LEAST) ** self.gamma
        return loss * (factor.detach() if self.detach else factor)


@dataclass(frozen=True)
class PAT:
    """½ · exp(κ (1 − p_y)) · CE with p = softmax(z / T) (Pixel-wise Adaptive Training, arXiv 2404.05393).

    kappa: the authors' code takes the number of classes, whose factor overflows from some 89 classes on; 1 by default.
    Their mean also divides by the number of classes, which this one does not.
    """

    kappa: Annotated[float, AtLeast(0), AtMost(20)] = 1.0
    temperature: Positive = 1.0
    detach: bool = False

    def __call__(self, loss: Tensor, logits: Tensor, label: Tensor) -> Tensor:
        if self.temperature == 1.0:
            p = (-loss).exp()
        else:
            scores = (logits.float() / self.temperature).softmax(1)
            p = scores.gather(1, label.long().clamp(min=0).unsqueeze(1)).squeeze(1)

        factor = (self.kappa * (1 - p) - math.log(2)).exp()
        return loss * (factor.detach() if self.detach else factor)
