"""ClassMix (Olsson et al., WACV 2021): half of the classes of one image pasted into another, on the device."""

import torch
from torch import Tensor


def choose_classes(label: Tensor, num_classes: int) -> Tensor:
    """Half of the classes of a whole batch, rounded up, drawn for each image anew: bool (B, K + 1).

    The last column is that of ignored pixels, which count as one more class. Nothing is counted on the host.
    label: (B, H, W), −1 where ignored.
    """
    present = torch.zeros(num_classes + 1, dtype=torch.bool, device=label.device)
    present.scatter_(0, _columns(label, num_classes).flatten(), True)

    noise = torch.rand(len(label), num_classes + 1, device=label.device)
    noise = noise.masked_fill(~present, 2)  # behind all that are there
    rank = noise.argsort(1).argsort(1)
    half = (present.sum() + 1) // 2

    return rank < half


def class_mask(label: Tensor, chosen: Tensor) -> Tensor:
    """Where a label map (B, H, W) shows a class that `chosen`, bool (B, K + 1), names for its image: bool (B, H, W)."""
    columns = _columns(label, chosen.shape[1] - 1)
    return chosen.gather(1, columns.flatten(1)).view_as(label)


def paste(mask: Tensor, source: Tensor, target: Tensor) -> Tensor:
    """`source` where the mask (B, H, W) is true, `target` elsewhere; both (B, H, W) or both (B, C, H, W)."""
    return torch.where(mask if source.ndim == mask.ndim else mask[:, None], source, target)


def _columns(label: Tensor, num_classes: int) -> Tensor:
    label = label.long()
    return torch.where(label < 0, num_classes, label)
