"""Balanced assignment of samples to classes by Sinkhorn-Knopp iterations that cannot overflow."""

import torch
from torch import Tensor


@torch.no_grad()
def sinkhorn(
    scores: Tensor,
    marginal: Tensor | None = None,
    epsilon: float = 0.05,
    iterations: int = 3,
    keep: int | None = None,
) -> Tensor:
    """Soft assignments Q that maximise <Q, scores> + epsilon·H(Q) while class k gets the share `marginal[k]`.

    scores: (N, C), any float dtype; computed in float32 (float64 stays). marginal: (C,), sums to 1; None: uniform,
    as in SwAV; a class of share 0 is assigned nothing. keep: return only the last `keep` rows, those after a bank.
    Returns (keep or N, C); rows sum to 1, class shares are approximate after a few iterations.

    An iteration scales the classes to the marginal, then the samples to one another (Cuturi 2013; SwAV; CPSL,
    eq. 12). The first one works with logarithms: exp(score / epsilon) leaves float32 at |score| > 4.4. After it a
    sample's assignments sum to 1 and class k has at least the share marginal[k], so the others keep one (C, N) buffer
    as it is and move only the factors of its rows and columns, by a product of matrix and vector each. Nothing is read
    back to the host.
    """
    dtype = torch.promote_types(scores.dtype, torch.float32)
    with torch.autocast(scores.device.type, enabled=False):
        q = scores.t().to(dtype).contiguous() / epsilon
        classes, samples = q.shape
        share = q.new_full((classes,), 1 / classes) if marginal is None else marginal.to(q)
        q = q.log_softmax(1)
        q = q.add_(share.log()[:, None]).softmax(0)
        of_class = q.new_ones(classes)
        of_sample = q.new_ones(samples)

        for _ in range(iterations - 1):
            # only a class of share 0 has none
            mass = (q @ of_sample).clamp_(min=torch.finfo(dtype).tiny)
            of_class = share * samples / mass
            of_sample = (of_class @ q).reciprocal_()

        first = 0 if keep is None else samples - keep

        return (of_class[:, None] * q[:, first:] * of_sample[first:]).t().contiguous()
