"""What a remedy of each slot of the pixel loss has to do; `build.py` has the table of all remedies."""

from typing import Protocol, runtime_checkable

from torch import Tensor

from common.losses.counts import Counts
from common.ops.upsampled_loss import Change


class LogitsRemedy(Protocol):
    """Slot `logits`: z (B, K, …) and y (B, …) to z' in float32."""

    def vector(self, counts: Counts) -> Tensor: ...

    def __call__(
        self, logits: Tensor, label: Tensor, vector: Tensor, progress: float
    ) -> Tensor: ...


@runtime_checkable
class AdditiveRemedy(Protocol):
    """A remedy of the slot `logits` that adds to them what neither they nor the label decide: it can be fused."""

    def change(self, vector: Tensor, progress: float) -> Change: ...


class ClassWeightRemedy(Protocol):
    """Slot `class_weight`: w (K,), in force from `start` on."""

    start: float

    def vector(self, counts: Counts) -> Tensor: ...


class FocusRemedy(Protocol):
    """Slot `focus`: cross-entropies of pixels (B, …) to losses (B, …)."""

    def __call__(self, loss: Tensor, logits: Tensor, label: Tensor) -> Tensor: ...


class SetRemedy(Protocol):
    """Slot `sets`: a scalar of logits (B, K, H, W) and label (B, H, W). at: `label`, where the logits are enlarged, or
    `network`, where the label is thinned out."""

    weight: float
    at: str

    def __call__(self, logits: Tensor, label: Tensor) -> Tensor: ...
