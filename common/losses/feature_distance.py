"""DAFormer's feature distance: the student's features of things stay near those of a frozen ImageNet network."""

import torch
from torch import Tensor


def feature_distance(features: Tensor, frozen: Tensor, where: Tensor) -> Tensor:
    """Mean Euclidean distance of features and frozen features (B, C, h, w) over the cells of `where`, bool (B, h, w).

    0, with a gradient of 0, where there are none. Equal features pull nowhere.
    """
    squares = (features.float() - frozen.detach().float()).square().sum(1)
    near = squares == 0
    distance = torch.where(near, 1.0, squares).sqrt() * ~near  # no infinite slope at 0
    return (distance * where).sum() / where.sum().clamp(min=1)


def cells_of(label: Tensor, size: tuple[int, int], classes: Tensor, ratio: float) -> Tensor:
    """Cells of a grid (h, w) whose pixels are, by a share of `ratio` or more, of one of `classes`: bool (B, h, w).

    label: (B, H, W), −1 where ignored, which counts as a class of its own. classes: bool (K,). A cell has
    (H // h) × (W // w) pixels; ratio is above ½, so one class at most can have that share.
    """
    majority = main_class(label, size, len(classes), ratio)
    return (majority >= 0) & classes[majority.clamp(min=0)]


def main_class(label: Tensor, size: tuple[int, int], num_classes: int, ratio: float) -> Tensor:
    """The class that `ratio` or more of a cell's pixels show, int64 (B, h, w); −1 where there is none, or ignored."""
    h, w = size
    down = label.shape[1] // h
    across = label.shape[2] // w
    cells = (
        label[:, : h * down, : w * across]
        .long()
        .unflatten(2, (w, across))
        .unflatten(1, (h, down))
    )
    pixels = cells.transpose(2, 3).flatten(3)  # (B, h, w, pixels of a cell)

    pixels = torch.where(pixels < 0, num_classes, pixels)
    counts = torch.zeros(
        *pixels.shape[:3], num_classes + 1, dtype=torch.int64, device=label.device
    )
    counts.scatter_add_(3, pixels, torch.ones_like(pixels))
    most, majority = counts.max(3)
    known = (majority < num_classes) & (most >= ratio * down * across)

    return torch.where(known, majority, -1)
