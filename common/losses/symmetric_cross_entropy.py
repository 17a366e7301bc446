"""Cross-entropy for labels that may be wrong: beside it the reverse one, which is bounded."""

from math import log

from torch import Tensor

from common.data import IGNORE
from common.losses.cross_entropy import pixel_cross_entropy

FLOOR = 1e-7  # of the probabilities in the reverse cross-entropy
WRONG = 1e-4  # what the label's distribution gives to a wrong class, instead of 0


def symmetric_cross_entropy(
    logits: Tensor, label: Tensor, alpha: float = 0.1, beta: float = 1.0
) -> Tensor:
    """α·CE + β·RCE over pixels that are not ignored (Wang et al., ICCV 2019, with CPSL's clamps and means).

        CE = −log p_y       RCE = −Σ_k p_k log ȳ_k = −log(1e-4) · Σ_{k≠y} p_k

    with p clamped to [1e-7, 1], ȳ the one-hot label clamped to [1e-4, 1]; CE is divided by the number of valid pixels,
    RCE by 1e-6 more. logits: (B, K, H, W); label: (B, H, W) integers, −1 where ignored.
    """
    loss = alpha * pixel_cross_entropy(logits, label)
    return loss + beta * reverse_cross_entropy(logits, label) if beta else loss


def reverse_cross_entropy(logits: Tensor, label: Tensor) -> Tensor:
    """RCE of `symmetric_cross_entropy`: bounded, so a wrong label pulls less than in cross-entropy."""
    valid = label != IGNORE
    p = logits.float().softmax(1).clamp(FLOOR, 1)
    wrong = p.sum(1) - p.gather(1, label.long().clamp(min=0)[:, None]).squeeze(1)
    return -log(WRONG) * (wrong * valid).sum() / (valid.sum() + 1e-6)
