"""Seesaw loss (Wang et al., CVPR 2021) on pixels; `seesaw.py` is the form for queries.

    z'_j = z_j + p · min(0, ln n_j − ln n_y) + q · max(0, ln p_j − ln max(p_y, ε))   for j ≠ y

with n the training labels' counts and p the softmax, constant in the gradient: classes rarer than the true one are
spared (mitigation), classes that are scored above it are not (compensation). With q = 0 it is logit adjustment cut to
the pixels whose class is the more frequent.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from common.config.bounds import NotNegative, Positive
from common.losses.counts import Counts, where_present


@dataclass(frozen=True)
class PixelSeesaw:
    """p, q: exponents of mitigation and compensation. eps: lowest probability of the true class in the latter.

    counts: n of the training labels, or, as the authors count, of the labels that the loss has seen so far: each batch
    (or image, where the loss is made of one at a time) counts before it is used.
    """

    p: NotNegative = 0.8
    q: NotNegative = 2.0
    eps: Positive = 0.01
    counts: Literal["dataset", "online"] = "dataset"

    @property
    def online(self) -> bool:
        """Whether the loss has to count for itself, see `SeenCounts`."""
        return self.counts == "online"

    def vector(self, counts: Counts) -> Tensor:
        """ln n (K,); a class without labels counts as the most frequent one, so nothing spares it."""
        logs = counts.pixels.clamp(min=1).log()
        return where_present(logs, counts.pixels, logs.max())

    def __call__(
        self, logits: Tensor, label: Tensor, vector: Tensor, progress: float
    ) -> Tensor:
        logits = logits.float()
        index = label.long().clamp(min=0).unsqueeze(1)

        seen = vector.view(1, -1, *[1] * (logits.dim() - 2)).expand_as(logits)
        mitigation = self.p * (seen - seen.gather(1, index)).clamp(max=0)
        if self.q == 0:
            return logits + mitigation

        with torch.no_grad():
            score = logits.log_softmax(1)
            own = score.gather(1, index).exp().clamp(min=self.eps).log()
            compensation = (self.q * (score - own)).clamp_(min=0).scatter_(1, index, 0.0)

        return logits + mitigation + compensation
