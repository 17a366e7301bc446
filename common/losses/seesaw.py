"""Seesaw loss (CVPR 2021) on Mask2Former's queries: rare classes are shielded from the negatives of frequent ones.

For a query of class i the logit of every other class j is raised by ln(M_ij · C_ij):

    M_ij = min(1, (N_j / N_i)^p)     mitigation: less negative gradient on classes that were seen less than i
    C_ij = max(1, (s_j / s_i)^q)     compensation: more on a class that is scored above the true one

with N the queries matched to each class so far and s the softmax. Two further logits say object or no object.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common import distributed


class SeesawLoss(nn.Module):
    """Counts are summed over all ranks and never decay; they grow only in training, before the loss that uses them.

    Args:
        num_classes: K.
        p, q: exponents of mitigation and compensation; the benchmark's 1.2 and 1.0 (the paper: 0.8 and 2.0).
        eps: lowest s_i in the compensation.
    """

    counts: Tensor

    def __init__(self, num_classes: int, p: float = 1.2, q: float = 1.0, eps: float = 0.01):
        super().__init__()
        self.num_classes = num_classes
        self.p = p
        self.q = q
        self.eps = eps
        self.register_buffer("counts", torch.zeros(num_classes, dtype=torch.int64))

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Losses (N,) of N successive calls at once: logits (N, M, K + 2), labels (N, M), K for "no object".

        loss = mean over the queries with an object of the Seesaw cross-entropy (0 if there is none)
             + mean over all queries of the cross-entropy of object (K-th logit) against no object (the last).
        """
        logits = logits.float()
        classes, objectness = logits.split([self.num_classes, 2], -1)
        found = labels < self.num_classes
        label = labels.clamp(max=self.num_classes - 1)
        shifted = classes + self._log_factor(
            classes.detach(), label, self._counts_of_calls(labels)
        )
        each = F.cross_entropy(
            shifted.flatten(0, 1), label.flatten(), reduction="none"
        ).view_as(label)
        of_classes = (each * found).sum(1) / found.sum(1).clamp(min=1)
        objects = F.cross_entropy(
            objectness.flatten(0, 1), (~found).long().flatten(), reduction="none"
        )

        return of_classes + objects.view_as(each).mean(1)

    def _log_factor(self, classes: Tensor, label: Tensor, counts: Tensor) -> Tensor:
        """ln(M_ij · C_ij) (N, M, K); it is 0 at the query's own class."""
        true_class = label.unsqueeze(2)
        seen = counts.clamp(min=1).float().log()  # (N, K)
        seen_true = seen.gather(1, label).unsqueeze(2)
        mitigation = self.p * (seen.unsqueeze(1) - seen_true)

        score = classes.log_softmax(-1)
        score_true = score.gather(2, true_class).exp().clamp(min=self.eps).log()
        compensation = (self.q * (score - score_true)).clamp_(min=0)
        is_true = true_class == torch.arange(self.num_classes, device=label.device)
        compensation.masked_fill_(is_true, 0)

        return mitigation.clamp_(max=0) + compensation

    @torch.no_grad()
    def _counts_of_calls(self, labels: Tensor) -> Tensor:
        """(N, K) counts that each call sees; the last row is kept."""
        if not self.training:
            return self.counts.expand(len(labels), -1)

        index = torch.arange(self.num_classes, device=labels.device)
        new = distributed.all_sum((labels.unsqueeze(2) == index).sum(1))
        counts = self.counts + new.cumsum(0)
        self.counts.copy_(counts[-1])

        return counts
