"""Class weights: a pixel's loss is multiplied by a number that depends on its class alone.

Weighted cross-entropy of a classifier that is a bias alone ends at p ∝ π · w. torch's own weighted mean divides by the
sum of the weights at hand, which varies from batch to batch; here the divisor stays the number of pixels.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from common.config.bounds import NotNegative, Rate
from common.losses.counts import Counts, Unit, where_present

Normalise = Literal["expected", "mean", "none"]


@dataclass(frozen=True)
class ClassWeights(ABC):
    """normalise: `expected` Σ π_k w_k = 1, so that the mean loss keeps its size; `mean`: the mean of w is 1 (inverse
    weights then shrink the loss of dense labels several times). start: share of the training after which the weights
    apply, from 0 on (deferred re-weighting, LDAM-DRW: 0.8)."""

    normalise: Normalise = "expected"
    start: Rate = 0.0

    @abstractmethod
    def raw(self, counts: Counts) -> Tensor:
        """w (K,) of the classes that occur, before normalisation."""

    def vector(self, counts: Counts) -> Tensor:
        """w (K,), normalised over the classes that occur; the others weigh 1."""
        present = counts.pixels > 0
        raw = torch.where(present, self.raw(counts), 0.0)
        if self.normalise == "expected":
            raw = raw / (counts.prior() * raw).sum().clamp(min=1e-300)
        elif self.normalise == "mean":
            raw = raw * present.sum() / raw.sum().clamp(min=1e-300)

        return where_present(raw, counts.pixels, 1.0)


@dataclass(frozen=True)
class Power(ClassWeights):
    """w_k = π_k^(−rho): 1 is the inverse frequency, ½ its root, 0.2 what DisAlign calls generalised re-weighting."""

    rho: NotNegative = 0.2

    def raw(self, counts: Counts) -> Tensor:
        return counts.prior().clamp(min=1e-300).pow(-self.rho)


@dataclass(frozen=True)
class MedianFrequency(ClassWeights):
    """w_k = median(F) / F_k, with F_k the share of class k in the images that show it (Eigen and Fergus, 2015).

    The pixels of those images are the labelled ones; where nobody has counted them, their number times the mean image.
    A class that only pseudo-labels show has no such share: it weighs 1, and is no part of the median.
    """

    def raw(self, counts: Counts) -> Tensor:
        area = counts.area
        if area is None:
            area = counts.images * (counts.pixels.sum() / max(counts.num_images, 1.0))

        frequency = counts.pixels / area.clamp(min=1e-300)
        shown = (counts.pixels > 0) & (counts.images > 0)
        middle = frequency[shown].quantile(0.5)
        return torch.where(shown, middle / frequency.clamp(min=1e-300), 1.0)


@dataclass(frozen=True)
class EffectiveNumber(ClassWeights):
    """w_k = (1 − β) / (1 − β^n_k) (Cui et al., CVPR 2019).

    of: images by default. On pixel counts the authors' β = 0.9999 saturates, and all weights are equal; `beta: null`
    is 1 − 1/Σn, which is nearly the inverse frequency.
    """

    beta: Rate | None = 0.9999
    of: Unit = "images"

    def raw(self, counts: Counts) -> Tensor:
        n = counts.of(self.of)
        beta = (
            1 - 1 / n.sum().clamp(min=2)
            if self.beta is None
            else torch.full_like(n.sum(), self.beta)
        )
        return (1 - beta) / (1 - beta ** n.clamp(min=1))
