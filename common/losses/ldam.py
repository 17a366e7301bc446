"""LDAM (Cao et al., NeurIPS 2019): the true class has to win by a margin, which is larger for rare classes.

    z'_y = z_y − s · m_y,   m_k = C · n_k^(−1/4) / max_j n_j^(−1/4)

with z = s · cos of a cosine classifier. On the logits of an ordinary classifier, whose scale is free, it does harm: a
classifier that is a bias alone ends *further* from the rare classes than with plain cross-entropy.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from common.config.bounds import NotNegative, Positive
from common.losses.counts import Counts, where_present


@dataclass(frozen=True)
class LDAM:
    """margin: C, that of the rarest class. scale: s, which has to be the cosine classifier's."""

    margin: NotNegative = 0.5
    scale: Positive = 30.0

    def vector(self, counts: Counts) -> Tensor:
        """s · m (K,); a class without labels has no margin, and does not set the largest."""
        margins = where_present(counts.pixels.clamp(min=1).pow(-0.25), counts.pixels, 0.0)
        return self.scale * self.margin * margins / margins.max().clamp(min=1e-300)

    def __call__(
        self, logits: Tensor, label: Tensor, vector: Tensor, progress: float
    ) -> Tensor:
        index = label.long().clamp(min=0).unsqueeze(1)
        own = torch.zeros_like(logits, dtype=torch.float32).scatter_(1, index, 1.0)
        return logits.float() - own * vector.view(1, -1, *[1] * (logits.dim() - 2))
