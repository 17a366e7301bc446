"""Whether probabilities are true: expected calibration errors, and the probability that a class is given in all.

| score | over | is |
|---|---|---|
| ECE | all pixels | mean distance of confidence and accuracy, in 15 bins of the confidence (Guo et al., ICML 2017) |
| ECE of class k | pixels with p_k ≥ 0.05 | mean distance of p_k and the share of pixels of class k, in the same bins |
| mass of class k | all pixels | Σ p_k over the number of pixels of class k; 1 where the class is given its due |

A class's ECE over *all* pixels cannot exceed twice its share of them, so it says nothing of a rare class.
"""

import numpy as np
import torch
from torch import Tensor

from common import distributed

BINS = 15
FLOOR = 0.05


class Calibration:
    """Sums over labelled pixels, of which the scores are made."""

    def __init__(self, num_classes: int, device: torch.device | str = "cpu"):
        self.num_classes = num_classes
        # pixels, their probabilities, hits
        self.best = torch.zeros(3, BINS, dtype=torch.float64, device=device)
        self.each = torch.zeros(3, num_classes, BINS, dtype=torch.float64, device=device)
        # probability and pixels of each class
        self.mass = torch.zeros(2, num_classes, dtype=torch.float64, device=device)

    def update(self, probabilities: Tensor, label: Tensor) -> None:
        """Count probabilities (B, K, h, W) at the pixels of label (B, h, W), −1 where there is none."""
        known = label.flatten() >= 0
        truth = label.flatten()[known].long()
        p = probabilities.movedim(1, 0).flatten(1)[:, known]

        confidence, best = p.max(0)
        _add(self.best, _bin(confidence), confidence, best == truth)

        classes, pixels = (p >= FLOOR).nonzero(as_tuple=True)
        values = p[classes, pixels]
        places = classes * BINS + _bin(values)
        _add(self.each.view(3, -1), places, values, truth[pixels] == classes)

        self.mass[0] += p.sum(1, dtype=torch.float64)
        self.mass[1] += torch.bincount(truth, minlength=self.num_classes)

    def scores(self) -> "CalibrationScores":
        """Those of all ranks."""
        best, each, mass = (
            distributed.all_sum(sums.clone()).cpu().numpy()
            for sums in (self.best, self.each, self.mass)
        )
        return CalibrationScores(best, each, mass)


class CalibrationScores:
    """ece: of the best class, a number. class_ece, mass: (K,). NaN where nothing was counted.

    bins: `pixels`, `confidence` and `accuracy` of each bin, the reliability diagram; None where a bin is empty.
    """

    def __init__(self, best: np.ndarray, each: np.ndarray, mass: np.ndarray):
        self.ece = float(_error(best))
        self.class_ece = _error(each)
        self.mass = _ratio(mass[0], mass[1])

        pixels, probabilities, hits = best
        self.bins = {
            "pixels": pixels.astype(int).tolist(),
            "confidence": _numbers(_ratio(probabilities, pixels)),
            "accuracy": _numbers(_ratio(hits, pixels)),
        }


def _bin(values: Tensor) -> Tensor:
    """The bin ((m − 1) / 15, m / 15] of probabilities."""
    return ((values * BINS).ceil().long() - 1).clamp(0, BINS - 1)


def _add(sums: Tensor, places: Tensor, values: Tensor, hits: Tensor) -> None:
    """Add pixels, probabilities and hits to sums (3, bins)."""
    values = values.double()
    for total, added in zip(
        sums, (torch.ones_like(values), values, hits.double()), strict=True
    ):
        total.index_add_(0, places, added)


def _error(sums: np.ndarray) -> np.ndarray:
    """Of sums (3, …, bins): the distance of hits and probabilities, weighted by pixels (…)."""
    pixels, probabilities, hits = sums
    return _ratio(np.abs(hits - probabilities).sum(-1), pixels.sum(-1))


def _ratio(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    return np.divide(part, whole, out=np.full_like(part, np.nan), where=whole > 0)


def _numbers(values: np.ndarray) -> list[float | None]:
    return [float(value) if np.isfinite(value) else None for value in values]
