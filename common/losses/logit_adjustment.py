"""Logit adjustment (Menon et al., ICLR 2021): the class prior is added to the logits in training, and left out later.

    z'_k = z_k + τ · ln π_k

with π_k the share of class k. At τ = 1 the loss is that of balanced softmax (Ren et al., NeurIPS 2020), and the optimum
scores all classes as if they were equally frequent; a classifier that is a bias alone ends at p ∝ π^(1−τ).

Post hoc, the scores of a network trained without it are adjusted in its place: argmax z_k − τ · ln π_k.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from common.config.bounds import NotNegative
from common.losses.counts import Counts, Unit, where_present
from common.ops.upsampled_loss import Change


@dataclass(frozen=True)
class LogitAdjustment:
    """tau: strength τ; 0 changes nothing. of: what is counted, pixels (dense labels) or images that show a class."""

    tau: NotNegative = 1.0
    of: Unit = "pixels"

    def vector(self, counts: Counts) -> Tensor:
        """τ ln π (K,); a class without labels is treated as the most frequent one, so it gains nothing."""
        prior = counts.prior(self.of)
        offsets = self.tau * prior.clamp(min=1e-300).log()
        return where_present(offsets, prior, self.tau * prior.max().log())

    def __call__(
        self, logits: Tensor, label: Tensor, vector: Tensor, progress: float
    ) -> Tensor:
        return logits.float() + vector.view(1, -1, *[1] * (logits.dim() - 2))

    def change(self, vector: Tensor, progress: float) -> Change:
        """z' − z, for the fused loss."""
        return Change(vector)


def post_hoc_offsets(pixels: Sequence[float], tau: float) -> Tensor:
    """−τ ln π, float32 (K,), of the pixels of each class in the training labels: what is added to trained logits."""
    return -LogitAdjustment(tau).vector(Counts.from_pixels(pixels)).float()
