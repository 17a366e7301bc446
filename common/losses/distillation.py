"""Losses between a student's outputs and those of a teacher, which takes no gradient."""

from typing import Literal

import torch.nn.functional as F
from torch import Tensor


def consistency(
    student: Tensor, teacher: Tensor, mask: Tensor, temperature: float = 0.08
) -> Tensor:
    """Σ m·KL(softmax(t/τ) ‖ softmax(s/τ)) / (C·Σ m): student s and teacher t (B, C, H, W), mask m (B, H, W).

    The factor 1/C is CPSL's, whose mean runs over pixels and classes. The teacher takes no gradient.
    """
    log_s = (student.float() / temperature).log_softmax(1)
    log_t = (teacher.detach().float() / temperature).log_softmax(1)
    divergence = F.kl_div(log_s, log_t, reduction="none", log_target=True).sum(1)
    return (divergence * mask).sum() / (mask.sum() * student.shape[1]).clamp(min=1)


def distillation(
    student: Tensor, teacher: Tensor, form: Literal["kl", "inner_product"] = "kl"
) -> Tensor:
    """Knowledge distillation from teacher to student logits, both (B, C, H, W), averaged over pixels and classes.

    kl: KL(t ‖ p) / C with t, p the probabilities. inner_product: t·(ln t − p) as CPSL and ProDA released it, where
    the logarithm of p is missing; it grows the inner product of t and p, and is negative. No mask: every pixel counts.
    """
    log_t = teacher.detach().float().log_softmax(1)
    p = student.float().log_softmax(1) if form == "kl" else student.float().softmax(1)
    return F.kl_div(p, log_t, reduction="sum", log_target=True) / student.numel()
