"""Logit adjustment in the classifier's bias (Menon et al., ICLR 2021): b_k − τ ln π_k.

What `eval.logit_adjustment: τ` adds to the logits, as part of the network: it is then there wherever the network goes.
"""

import warnings
from copy import deepcopy
from dataclasses import dataclass
from typing import TypeGuard, cast

from torch import Tensor, nn

from common.config import ConfigError
from common.evaluation.adjustment import adjusted_by
from common.losses.logit_adjustment import post_hoc_offsets
from common.rebalance.given import Given


@dataclass(frozen=True)
class FoldedAdjustment:
    """tau: strength τ; 0 changes nothing, less gives a network that was adjusted in training its prior back."""

    tau: float = 1.0

    def __call__(self, classifier: nn.Module, given: Given) -> nn.Module:
        if not folds(classifier):
            instead = f"set eval.logit_adjustment: {self.tau:g}, which adds it to any network's scores"
            raise ConfigError(
                f"{given.where}: the classifier has no bias that can hold it; {instead}"
            )

        if self.tau:
            check_others(given, self.tau)

        adjusted = deepcopy(classifier)
        bias = cast(Tensor, classifier.bias).detach()
        offsets = post_hoc_offsets(given.counts.pixels.tolist(), self.tau).to(bias)
        adjusted.bias = nn.Parameter(bias + offsets)

        return adjusted


def folds(classifier: nn.Module | None) -> TypeGuard[nn.Conv2d]:
    """Whether a network's classifier, None where it has none, has a bias that can hold the adjustment."""
    if not isinstance(classifier, nn.Conv2d) or classifier.kernel_size != (1, 1):
        return False

    return classifier.bias is not None


def check_others(given: Given, tau: float) -> None:
    """Say what corrects for class frequency already; ConfigError where τ < 0 and nothing has."""
    others = []
    loss = adjusted_by(given.cfg.remedies, tau, f"{given.where}: tau: {tau:g}")
    if loss and tau > 0:
        others.append(f"remedies.logits {loss}, in training")
    if given.cfg.eval.logit_adjustment:
        others.append(f"eval.logit_adjustment: {given.cfg.eval.logit_adjustment:g}")

    for other in others:
        warnings.warn(f"{given.where}: {other}: both add up", stacklevel=3)
