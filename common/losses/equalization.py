"""Softmax equalization loss (Tan et al., CVPR 2020): pixels of other classes often spare the rare classes.

    L = −ln( e^{z_y} / Σ_k v_k e^{z_k} ),   v_k = 1 − β_k · 1[k is rare] · 1[k ≠ y],   β_k ~ Bernoulli(γ)

drawn for every pixel and class: with probability γ a rare class gets no negative gradient from a pixel of another one.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from common.config.bounds import Share
from common.losses.counts import Counts


@dataclass(frozen=True)
class Equalization:
    """gamma: γ, the authors' .9 or .95. tail: the rarest classes that together hold at most this share of the pixels
    are rare (the authors give a threshold on the class's own share, which depends on the number of classes)."""

    gamma: Share = 0.9
    tail: Share = 0.05

    def vector(self, counts: Counts) -> Tensor:
        """1 for rare classes, 0 for others and for those without labels (K,)."""
        share, order = counts.prior().sort()
        below = share.cumsum(0) <= self.tail
        rare = torch.zeros_like(share).scatter_(0, order, below.to(share.dtype))
        return rare * (counts.pixels > 0)

    def __call__(
        self, logits: Tensor, label: Tensor, vector: Tensor, progress: float
    ) -> Tensor:
        rare = vector.view(1, -1, *[1] * (logits.dim() - 2)) > 0
        classes = torch.arange(logits.shape[1], device=logits.device).view_as(rare)
        other = classes != label.unsqueeze(1)
        spared = torch.rand_like(logits, dtype=torch.float32) < self.gamma

        return logits.float().masked_fill(rare & other & spared, float("-inf"))
