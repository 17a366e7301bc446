"""What an evaluation counts: sums on the device, image by image; nothing of an image's size is kept."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from common.config import EvalConfig
from common.evaluation.boundaries import Boundaries
from common.evaluation.calibration import Calibration
from common.evaluation.summary import summarise, with_boundaries, with_calibration
from common.metrics import ConfusionMatrix


class Sums:
    """The confusion matrix of the data set `row`, and what the further scores that a config asks for are made of."""

    def __init__(self, row: Any, cfg: EvalConfig, device: torch.device | str = "cpu"):
        num_classes = len(row.classes)
        self.row = row
        self.convention = cfg.convention
        self.matrix = ConfusionMatrix(num_classes, device)
        self.boundaries = (
            Boundaries(num_classes, cfg.boundary, device) if cfg.boundary else None
        )
        self.calibration = Calibration(num_classes, device) if cfg.calibration else None

    def add(self, pred: Tensor, label: Tensor) -> Tensor:
        """Count the classes of one image, both (H, W), and return its confusion matrix (K, K).

        Probabilities are counted apart, while they are there: `calibration.update`.
        """
        counted = self.matrix.update(pred, label)
        if self.boundaries is not None:
            self.boundaries.update(pred, label)

        return counted

    def summary(self, groups: Mapping[str, Sequence[str]] | None = None) -> dict[str, Any]:
        """The scores of all ranks, as `evaluate` returns them."""
        result = summarise(self.matrix.reduce(), self.row, self.convention, groups)
        if self.boundaries is not None:
            result = with_boundaries(result, self.boundaries)
        if self.calibration is not None:
            result = with_calibration(result, self.calibration)

        return result
