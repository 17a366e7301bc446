"""Pixel cross-entropy with the averaging rules that the papers use."""

from typing import Literal

import torch.nn.functional as F
from torch import Tensor

from common.data import IGNORE

Average = Literal["all", "valid"]


def pixel_cross_entropy(
    logits: Tensor, label: Tensor, *, pixel_weight: Tensor | None = None, average: Average = "valid"
) -> Tensor:
    """Mean of −log softmax(z)_y over pixels, in float32; 0 with zero gradients where every pixel is ignored.

    Args:
        logits: (B, K, H, W) or (B, K, N), at the label's resolution.
        label: (B, H, W) or (B, N), integers, −1 where ignored.
        pixel_weight: factor for each pixel, of the label's shape; it does not change the denominator.
        average: "valid" divides by the pixels that are not ignored, "all" by all pixels (what MMSegmentation 0.x does).
    """
    label = label.long()
    if pixel_weight is None:
        total = F.cross_entropy(logits.float(), label, ignore_index=IGNORE, reduction="sum")
    else:
        each = F.cross_entropy(logits.float(), label, ignore_index=IGNORE, reduction="none")
        total = (each * pixel_weight).sum()
    if average == "all":
        return total / label.numel()
    return total / (label != IGNORE).sum().clamp(min=1)
