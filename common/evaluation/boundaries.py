"""Scores that forgive a few pixels, for classes so thin that most of their pixels lie at an edge.

P are the predicted and T the true pixels of a class, E(·) those of them at its edges: with a neighbour (of four) of
another class. Near is at a Euclidean distance of at most `radius` pixels.

| score | is | source |
|---|---|---|
| tolerant precision p, recall r | share of P near T, share of T near P | Mnih and Hinton, ECCV 2010 |
| tolerant IoU | 1 / (1/p + 1/r − 1), at radius 0 the plain IoU | |
| boundary F | harmonic mean of the same shares of E(P) and E(T) | Csurka et al., BMVC 2013 |

Counts add up over the images before shares are taken, as those of IoU do. Pixels without a label are left out, whatever
is predicted there, and neither they nor the image's border make an edge.
"""

import numpy as np
import torch
from torch import Tensor

from common import distributed

NOTHING = -1  # in a map of classes


class Boundaries:
    """Counts of K classes for tolerant IoU and boundary F, summed over images."""

    def __init__(self, num_classes: int, radius: int, device: torch.device | str = "cpu"):
        self.num_classes = num_classes
        self.radius = radius
        # pixels and edges; predicted and true; near and all
        self.counts = torch.zeros(2, 2, 2, num_classes, dtype=torch.int64, device=device)

    def update(self, pred: Tensor, label: Tensor) -> None:
        """Count one image: classes (H, W), label with −1 where there is none."""
        truth = label.to(torch.int16)
        predicted = pred.to(torch.int16).masked_fill(truth < 0, NOTHING)

        pixels = torch.stack([predicted, truth])
        for counts, maps in zip(self.counts, (pixels, edges(pixels)), strict=True):
            near = near_own_class(maps, maps.flip(0), self.radius)
            self._add(counts[:, 0], maps.masked_fill(~near, NOTHING))
            self._add(counts[:, 1], maps)

    def _add(self, counts: Tensor, maps: Tensor) -> None:
        """Add the pixels of each class in the maps (2, H, W) to counts (2, K)."""
        for total, classes in zip(counts, maps, strict=True):
            found = torch.bincount(classes.flatten() + 1, minlength=self.num_classes + 1)
            total += found[1:]

    def scores(self) -> dict[str, np.ndarray]:
        """`tolerant_iou` and `boundary_f` (K,) of all ranks, 0..1; NaN for a class neither there nor predicted."""
        total = distributed.all_sum(self.counts.clone()).cpu().numpy().astype(np.float64)
        near = total[:, :, 0]
        there = total[:, :, 1]
        share = np.divide(near, there, out=np.zeros_like(near), where=there > 0)

        precision, recall = share[0]
        product = precision * recall
        tolerant_iou = _ratio(product, precision + recall - product)

        precision, recall = share[1]
        boundary_f = _ratio(2 * precision * recall, precision + recall)

        absent = there.sum(1) == 0
        tolerant_iou[absent[0]] = np.nan
        boundary_f[absent[1]] = np.nan

        return {"tolerant_iou": tolerant_iou, "boundary_f": boundary_f}


def edges(maps: Tensor) -> Tensor:
    """Maps of classes (…, H, W) with NOTHING but where a neighbour, right, left, below or above, has another class."""
    edge = torch.zeros_like(maps, dtype=torch.bool)

    for axis in (-2, -1):
        pairs = maps.shape[axis] - 1
        first = maps.narrow(axis, 0, pairs)
        second = maps.narrow(axis, 1, pairs)
        differ = (first != second) & (first >= 0) & (second >= 0)
        edge.narrow(axis, 0, pairs).logical_or_(differ)
        edge.narrow(axis, 1, pairs).logical_or_(differ)

    return maps.masked_fill(~edge, NOTHING)


def near_own_class(maps: Tensor, others: Tensor, radius: int) -> Tensor:
    """Where `others` (…, H, W) has the class of `maps` at most `radius` pixels away; bool (…, H, W).

    One comparison for each place of a disk, whatever the number of classes.
    """
    found = torch.zeros_like(maps, dtype=torch.bool)
    height, width = maps.shape[-2:]

    for down in range(-radius, radius + 1):
        for right in range(-radius, radius + 1):
            if down**2 + right**2 > radius**2:
                continue
            rows, other_rows = _overlap(height, down)
            columns, other_columns = _overlap(width, right)
            same = maps[..., rows, columns] == others[..., other_rows, other_columns]
            found[..., rows, columns] |= same

    return found


def _overlap(length: int, shift: int) -> tuple[slice, slice]:
    """The places of an axis that have one `shift` further on, and those further on."""
    low = max(-shift, 0)
    high = max(length - max(shift, 0), low)
    return slice(low, high), slice(low + shift, high + shift)


def _ratio(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    return np.divide(part, whole, out=np.zeros_like(part), where=whole > 0)
