"""Dice and Tversky losses: soft overlap of a class's prediction with its region."""

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from common.config.bounds import NotNegative, Positive
from common.losses.presence import At, one_hot


@dataclass(frozen=True)
class Tversky:
    """Mean over classes of 1 − (TP + s) / (TP + α·FP + β·FN + s), soft counts over the labelled pixels of the batch
    (Salehi et al., 2017).

    absent: `skip` leaves out classes without a pixel in the batch; with `include`, as in MMSegmentation, each costs up
    to 1 and pushes the class down everywhere. weight: beside the pixel loss. at: on logits enlarged to the label, or at
    the network's stride.
    """

    alpha: NotNegative = 0.3  # of false positives
    beta: NotNegative = 0.7  # of false negatives
    smooth: Positive = 1.0
    absent: Literal["skip", "include"] = "skip"
    weight: NotNegative = 1.0
    at: At = "label"

    def __call__(self, logits: Tensor, label: Tensor) -> Tensor:
        """Scalar of logits (B, K, H, W) and label (B, H, W), −1 where ignored; 0 where no pixel is labelled."""
        truth, valid = one_hot(label, logits.shape[1])
        p = logits.float().softmax(1).transpose(0, 1).flatten(1) * valid

        hit = (p * truth).sum(1)
        false_positive = p.sum(1) - hit
        false_negative = truth.sum(1) - hit
        whole = hit + self.alpha * false_positive + self.beta * false_negative
        loss = 1 - (hit + self.smooth) / (whole + self.smooth)

        counted = truth.sum(1) > 0
        if self.absent == "include":
            counted = counted | valid.any()

        return (loss * counted).sum() / counted.sum().clamp(min=1)


@dataclass(frozen=True)
class Dice(Tversky):
    """Tversky's loss with α = β = ½ (V-Net, 2016): 1 − (2·TP + 2s) / (Σp + Σy + 2s)."""

    alpha: NotNegative = 0.5
    beta: NotNegative = 0.5
    smooth: Positive = 0.5  # s of V-Net's form is 1
