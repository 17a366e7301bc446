"""Pixel cross-entropy with the averaging rules that the papers use."""

from typing import Literal

import torch.nn.functional as F
from torch import Tensor

from common.data import IGNORE

Average = Literal["all", "valid"]


def cross_entropy_sum(logits: Tensor, label: Tensor) -> Tensor:
    """Σ −log softmax(z)_y over pixels, in float32; logits (B, K, …), label (B, …), −1 where ignored."""
    return F.cross_entropy(logits.float(), label.long(), ignore_index=IGNORE, reduction="sum")


def pixel_cross_entropy(
    logits: Tensor,
    label: Tensor,
    *,
    pixel_weight: Tensor | None = None,
    average: Average = "valid",
) -> Tensor:
    """Mean of −log softmax(z)_y over pixels, in float32; 0 with zero gradients where every pixel is ignored.

    Args:
        logits: (B, K, H, W) or (B, K, N), at the label's resolution.
        label: (B, H, W) or (B, N), integers, −1 where ignored.
        pixel_weight: factor for each pixel, of the label's shape; it does not change the denominator.
        average: "valid" divides by the pixels that are not ignored, "all" by all pixels (what MMSegmentation 0.x does).
    """
    if pixel_weight is None:
        total = cross_entropy_sum(logits, label)
    else:
        each = F.cross_entropy(
            logits.float(), label.long(), ignore_index=IGNORE, reduction="none"
        )
        total = (each * pixel_weight).sum()

    if average == "all":
        return total / label.numel()
    return total / (label != IGNORE).sum().clamp(min=1)
