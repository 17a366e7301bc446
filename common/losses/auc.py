"""AUC loss (AUCSeg, NeurIPS 2024): each class's score has to rank its pixels above those of every other class."""

from dataclasses import dataclass

import torch
from torch import Tensor

from common.config.bounds import NotNegative
from common.losses.presence import At, one_hot


@dataclass(frozen=True)
class AUC:
    """1/(K_b (K_b − 1)) · Σ_{i≠j} mean_{x∈i, x'∈j} ½ (γ − (f_i(x) − f_i(x')))² over the K_b classes of the batch, with
    f = sigmoid(z).

    Made in O(pixels · K), equal to the sum over pairs. The authors' memory bank of tail patches is not built: it pastes
    over what it keeps, and Copy-Paste does its work. weight: 4 for ADE20K, 1 for Cityscapes.
    """

    gamma: float = 1.0
    weight: NotNegative = 1.0
    at: At = "label"

    def __call__(self, logits: Tensor, label: Tensor) -> Tensor:
        """Scalar of logits (B, K, H, W) and label (B, H, W), −1 where ignored; 0 where fewer than two classes are."""
        truth, valid = one_hot(label, logits.shape[1])
        f = logits.float().sigmoid().transpose(0, 1).flatten(1)  # (K, N)

        n = truth.sum(1)
        present = n > 0
        classes = present.sum()

        # With d = f_i − γ·1[x ∈ i] a pair's term is ½ (d(x) − d(x'))², which splits into sums over single pixels.
        d = f - self.gamma * truth
        other = (1 - truth) * valid
        # 1/n_y of the pixel's own class
        with torch.autocast(logits.device.type, enabled=False):
            share = other * (truth.T @ (1 / n.clamp(min=1)))
        own_mean = (d * truth).sum(1) / n.clamp(min=1)
        other_sum = (d * share).sum(1)
        squares = (d.square() * share).sum(1)
        own_squares = (d.square() * truth).sum(1) / n.clamp(min=1) * (classes - 1)

        of_class = 0.5 * (squares + own_squares) - own_mean * other_sum
        pairs = (classes * (classes - 1)).clamp(min=1)

        return (of_class * present).sum() / pairs * (classes > 1)
