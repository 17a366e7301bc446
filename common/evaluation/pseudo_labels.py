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
import torch.nn.functional as F
from torch import Tensor

BINS = 1000  # of confidence: thresholds are told apart by a thousandth
Threshold = float | np.ndarray


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
            # kept at a threshold: the bins from it on; none at one above all
            F.pad(sums.view(self.num_classes, BINS).flip(1).cumsum(1).flip(1), (0, 1))
            .cpu()
            .numpy()
            for sums in (self.given, self.right)
        )
        return LabelQuality(given, right, self.truth.cpu().numpy())


@dataclass(frozen=True)
class LabelQuality:
    """Pixels (K, BINS + 1) whose confidence reaches each thousandth, `given` by predicted class and those of them that
    are `right`; `truth` (K,). A threshold is one for all or (K,), of each predicted class. Shares are NaN where nothing
    was counted."""

    given: np.ndarray
    right: np.ndarray
    truth: np.ndarray

    def _at(self, counts: np.ndarray, threshold: Threshold) -> np.ndarray:
        """(K,): those that reach the threshold."""
        return counts[np.arange(len(counts)), places_of(threshold)]

    def kept(self, threshold: Threshold) -> float:
        """Share of all pixels that a threshold keeps."""
        return float(_ratio(self._at(self.given, threshold).sum(), self.truth.sum()))

    def accuracy(self, threshold: Threshold, classes: Sequence[int] | None = None) -> float:
        """Share of right ones among the labels that are kept; among those of some predicted classes."""
        chosen = slice(None) if classes is None else list(classes)
        right, given = (
            self._at(counts, threshold)[chosen] for counts in (self.right, self.given)
        )
        return float(_ratio(right.sum(), given.sum()))

    def shares(self, threshold: Threshold) -> np.ndarray:
        """(K,): of the labels that are kept, those of each class."""
        given = self._at(self.given, threshold)
        return _ratio(given, given.sum())

    def precision(self, threshold: Threshold) -> np.ndarray:
        """(K,): how many labels of a class are right."""
        return _ratio(self._at(self.right, threshold), self._at(self.given, threshold))

    def recall(self, threshold: Threshold) -> np.ndarray:
        """(K,): how many pixels of a class have a label that is kept and right."""
        return _ratio(self._at(self.right, threshold), self.truth)

    def threshold_for(self, precision: float) -> np.ndarray:
        """(2, K): the lowest threshold at which so many labels of a class are right, and its recall there; NaN where
        none is. Few labels may be right by chance, which a recall near 0 tells."""
        share = _ratio(self.right, self.given)
        enough = np.nan_to_num(share) >= precision - 1e-12
        places = enough.argmax(1)
        recall = _ratio(self.right[np.arange(len(places)), places], self.truth)
        return np.where(enough.any(1), [places / BINS, recall], np.nan)


def places_of(threshold: Threshold) -> np.ndarray:
    """The places of thresholds. ValueError for one that is none, or finer than what is counted."""
    thresholds = np.asarray(threshold, float)
    places = np.round(thresholds * BINS)
    fits = (thresholds >= 0) & (thresholds <= 1) & (np.abs(thresholds * BINS - places) < 1e-6)
    if not fits.all():
        raise ValueError(
            f"threshold {thresholds[~fits].flat[0]:g}: expected 0 to 1, in thousandths"
        )

    return places.astype(int)


def _ratio(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    part, whole = np.asarray(part, float), np.asarray(whole, float)
    return np.divide(
        part, whole, out=np.full(np.broadcast(part, whole).shape, np.nan), where=whole > 0
    )
