"""Lovász-Softmax (Berman et al., CVPR 2018): a convex surrogate of the mean Jaccard index of the classes present."""

from dataclasses import dataclass

import torch
from torch import Tensor

from common.config.bounds import NotNegative
from common.losses.presence import At, one_hot


@dataclass(frozen=True)
class Lovasz:
    """Mean over the classes present of Σ_i e_(i) · (J_i − J_(i−1)), e the errors |1[y = k] − p_k| in descending order
    and J_i the Jaccard loss of the first i pixels being wrong.

    Hard predictions give exactly 1 − the mean IoU of the classes present. weight: beside the pixel loss. per_image:
    each image by itself, then the mean. at: on logits enlarged to the label, or at the network's stride (much cheaper).
    """

    weight: NotNegative = 1.0
    per_image: bool = False
    at: At = "label"

    def __call__(self, logits: Tensor, label: Tensor) -> Tensor:
        """Scalar of logits (B, K, H, W) and label (B, H, W), −1 where ignored; 0 where no pixel is labelled."""
        if self.per_image:
            terms = [
                lovasz_softmax(z[None], y[None]) for z, y in zip(logits, label, strict=True)
            ]
            return torch.stack(terms).mean()
        return lovasz_softmax(logits, label)


def lovasz_softmax(logits: Tensor, label: Tensor) -> Tensor:
    """The loss of a whole batch as one set of pixels. Nothing is selected on the host: ignored pixels sort last."""
    truth, valid = one_hot(label, logits.shape[1])
    p = logits.float().softmax(1).transpose(0, 1).flatten(1)  # (K, N)

    errors = torch.where(valid, (truth - p).abs(), -1.0)
    ordered, order = errors.sort(1, descending=True)
    hit = truth.gather(1, order)

    total = truth.sum(1, keepdim=True)
    intersection = total - hit.cumsum(1)
    union = total + (1 - hit).cumsum(1)
    jaccard = 1 - intersection / union.clamp(min=1)
    steps = jaccard.diff(dim=1, prepend=torch.zeros_like(total))

    present = (total > 0).squeeze(1)
    of_class = (ordered.clamp(min=0) * steps).sum(1)

    return (of_class * present).sum() / present.sum().clamp(min=1)
