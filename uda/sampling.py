"""Which pixels of a label map enter the feature bank."""

import torch
import torch.nn.functional as F
from torch import Tensor


def uniform(labels: Tensor, n: int) -> Tensor:
    """n distinct positions of each row of labels (B, N), as int64 (B, n)."""
    return torch.rand(labels.shape, device=labels.device).topk(n, dim=1).indices


def stretched(labels: Tensor, size: tuple[int, int]) -> Tensor:
    """A label map (B, h, w) on another grid (B, H, W), nearest: what the release does to pair labels with pixels."""
    return F.interpolate(labels[:, None].float(), tuple(size), mode="nearest")[:, 0].to(
        labels.dtype
    )


def class_balanced(labels: Tensor, distribution: Tensor, n: int) -> Tensor:
    """n distinct positions of each row of labels (B, N), classes in the proportion of `distribution` (C,).

    Every class that is present gets at least one position (CPSL, eq. 9: a quota for each class, proportional to its
    share of the pseudo-labels). Where a class has fewer pixels than its quota the others share the rest, and ignored
    pixels (−1) come last. A class's r-th pixel in random order has the priority r / share: the n smallest are taken,
    so nothing is counted on the host.
    """
    batch, length = labels.shape
    classes = len(distribution)
    labels = torch.where(labels < 0, classes, labels)
    noise = torch.rand(labels.shape, device=labels.device, dtype=torch.float64)
    order = (labels + noise * 0.999).argsort(1)
    ordered = labels.gather(1, order)
    counts = torch.zeros(batch, classes + 1, dtype=torch.int64, device=labels.device)
    counts.scatter_add_(1, labels, torch.ones_like(labels))
    starts = counts.cumsum(1) - counts
    rank = torch.arange(length, device=labels.device) - starts.gather(1, ordered)
    share = torch.cat((distribution, distribution.new_zeros(1))).clamp(min=1e-12)
    priority = (rank + noise) / share.double()[ordered]
    priority = torch.where((rank == 0) & (ordered < classes), -1.0, priority)
    chosen = priority.topk(n, dim=1, largest=False).indices

    return order.gather(1, chosen)
