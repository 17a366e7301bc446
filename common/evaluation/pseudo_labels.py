"""How right the labels are that a network gives, by class and by confidence: what a threshold on them keeps.

Of pixels whose truth is known, with confidence p and predicted class k, at a threshold τ (kept: p ≥ τ):

    precision_k = kept pixels of prediction k that are right / kept pixels of prediction k
    recall_k    = kept pixels of prediction k that are right / all pixels of truth k

A rare class is learned from pseudo-labels where both are high; one that is right but hardly kept fades (recall), one
that is kept but wrong is taught as another (precision).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

BINS = 1000  # of confidence: thresholds are told apart by a thousandth


class LabelCounts:
    """Sums over labelled pixels."""

    def __init__(self, num_classes: int, device: torch.device | str = "cpu"):
        self.num_classes = num_classes
        # pixels by predicted class and bin of confidence: all, and those that are right
        self.given = torch.zeros(num_classes * BINS, dtype=torch.int64, device=device)
        self.right = torch.zeros_like(self.given)
        self.truth = torch.zeros(num_classes, dtype=torch.int64, device=device)

    def update(self, predicted: Tensor, confidence: Tensor, label: Tensor) -> None:
        """Count predicted classes and their confidence in 0..1 where label is not −1, all (B, H, W)."""
        known = label >= 0
        truth = label[known].long()
        predicted = predicted[known]
        # float32 has 0.95 as slightly less, which passes a threshold of 0.95 all the same
        places = (confidence[known].double() * BINS + 1e-3).long().clamp(0, BINS - 1)
        cells = predicted * BINS + places

        self.given += torch.bincount(cells, minlength=len(self.given))
        self.right += torch.bincount(cells[predicted == truth], minlength=len(self.right))
        self.truth += torch.bincount(truth, minlength=self.num_classes)

    def quality(self) -> "LabelQuality":
        """What the sums say."""
        given, right = (
            # kept at a threshold: the bins from it on
            sums.view(self.num_classes, BINS).flip(1).cumsum(1).flip(1).cpu().numpy()
            for sums in (self.given, self.right)
        )
        return LabelQuality(given, right, self.truth.cpu().numpy())


@dataclass(frozen=True)
class LabelQuality:
    """Pixels (K, BINS) whose confidence reaches each thousandth, `given` by predicted class and those of them that are
    `right`; `truth` (K,). Shares are NaN where nothing was counted."""

    given: np.ndarray
    right: np.ndarray
    truth: np.ndarray

    def kept(self, threshold: float) -> float:
        """Share of all pixels that a threshold keeps."""
        return float(_ratio(self.given[:, place_of(threshold)].sum(), self.truth.sum()))

    def accuracy(self, threshold: float, classes: Sequence[int] | None = None) -> float:
        """Share of right ones among the labels that are kept; among those of some predicted classes."""
        chosen = slice(None) if classes is None else list(classes)
        place = place_of(threshold)
        return float(_ratio(self.right[chosen, place].sum(), self.given[chosen, place].sum()))

    def shares(self, threshold: float) -> np.ndarray:
        """(K,): of the labels that are kept, those of each class."""
        given = self.given[:, place_of(threshold)]
        return _ratio(given, given.sum())

    def precision(self, threshold: float) -> np.ndarray:
        """(K,): how many labels of a class are right."""
        place = place_of(threshold)
        return _ratio(self.right[:, place], self.given[:, place])

    def recall(self, threshold: float) -> np.ndarray:
        """(K,): how many pixels of a class have a label that is kept and right."""
        return _ratio(self.right[:, place_of(threshold)], self.truth)

    def threshold_for(self, precision: float) -> np.ndarray:
        """(2, K): the lowest threshold at which so many labels of a class are right, and its recall there; NaN where
        none is. Few labels may be right by chance, which a recall near 0 tells."""
        enough = (self.given > 0) & (self.right >= precision * self.given)
        places = enough.argmax(1)
        recall = _ratio(self.right[np.arange(len(places)), places], self.truth)
        return np.where(enough.any(1), [places / BINS, recall], np.nan)


def place_of(threshold: float) -> int:
    """The place of a threshold. ValueError for one that is none, or finer than what is counted."""
    if 0 <= threshold < 1:
        place = round(threshold * BINS)
        if place < BINS and abs(threshold * BINS - place) < 1e-6:
            return place

    raise ValueError(f"threshold {threshold:g}: expected 0 to 0.999, in thousandths")


def _ratio(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    part, whole = np.asarray(part, float), np.asarray(whole, float)
    return np.divide(part, whole, out=np.full(np.broadcast(part, whole).shape, np.nan), where=whole > 0)
