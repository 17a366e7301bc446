"""Losses for training on labels that a network made: noisy, soft, or those of a teacher."""

from math import log
from typing import Literal

import torch.nn.functional as F
from torch import Tensor

from common.data import IGNORE
from common.losses.cross_entropy import pixel_cross_entropy

FLOOR = 1e-7  # of the probabilities in the reverse cross-entropy
WRONG = 1e-4  # what the label's distribution gives to a wrong class, instead of 0


def symmetric_cross_entropy(logits: Tensor, label: Tensor, alpha: float = 0.1, beta: float = 1.0) -> Tensor:
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


def assignment_cross_entropy(scores: Tensor, assignment: Tensor, temperature: float = 0.08) -> Tensor:
    """−mean_n Σ_k Q_nk log softmax_k(scores_n / τ): scores and Q are (N, C), Q takes no gradient (SwAV, CPSL)."""
    return -(assignment.detach() * (scores.float() / temperature).log_softmax(1)).sum(1).mean()


def consistency(student: Tensor, teacher: Tensor, mask: Tensor, temperature: float = 0.08) -> Tensor:
    """Σ m·KL(softmax(t/τ) ‖ softmax(s/τ)) / (C·Σ m): student s and teacher t (B, C, H, W), mask m (B, H, W).

    The factor 1/C is CPSL's, whose mean runs over pixels and classes. The teacher takes no gradient.
    """
    log_s = (student.float() / temperature).log_softmax(1)
    log_t = (teacher.detach().float() / temperature).log_softmax(1)
    divergence = F.kl_div(log_s, log_t, reduction="none", log_target=True).sum(1)
    return (divergence * mask).sum() / (mask.sum() * student.shape[1]).clamp(min=1)


def distillation(student: Tensor, teacher: Tensor, form: Literal["kl", "inner_product"] = "kl") -> Tensor:
    """Knowledge distillation from teacher to student logits, both (B, C, H, W), averaged over pixels and classes.

    kl: KL(t ‖ p) / C with t, p the probabilities. inner_product: t·(ln t − p) as CPSL and ProDA released it, where
    the logarithm of p is missing; it grows the inner product of t and p, and is negative. No mask: every pixel counts.
    """
    log_t = teacher.detach().float().log_softmax(1)
    p = student.float().log_softmax(1) if form == "kl" else student.float().softmax(1)
    return F.kl_div(p, log_t, reduction="sum", log_target=True) / student.numel()


def pixel_contrast(
    anchors: Tensor, labels: Tensor, bank: Tensor, bank_labels: Tensor, temperature: float = 0.08
) -> Tensor:
    """Supervised contrast of anchors (N, D) with a bank (M, D), rows of unit length, labels (N,) and (M,).

        L_i = −1/(|P_i| + 1e-5) · Σ_{j∈P_i} [l_ij − log(e^{l_ij} + Σ_{n∉P_i} e^{l_in})],   l_ij = a_i·b_j/τ − max_j

    with P_i the bank's entries of anchor i's label; mean over anchors. The bank takes no gradient.
    """
    similarity = anchors.float() @ bank.detach().float().T / temperature
    similarity = similarity - similarity.detach().amax(1, keepdim=True)
    same = labels[:, None] == bank_labels
    e = similarity.exp()
    negatives = e.masked_fill(same, 0).sum(1, keepdim=True)
    terms = (similarity - (e + negatives).log()).masked_fill(~same, 0)
    return -(terms.sum(1) / (same.sum(1) + 1e-5)).mean()
