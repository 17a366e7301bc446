"""Logit adjustment in the classifier's bias (Menon et al., ICLR 2021): b_k − τ ln π_k.

What `eval.logit_adjustment: τ` adds to the logits, as part of the network: it is then there wherever the network goes.
"""

import warnings
from copy import deepcopy
from dataclasses import dataclass

from torch import nn

from common.config import ConfigError
from common.config.bounds import NotNegative
from common.evaluation.adjustment import IN_TRAINING
from common.losses.logit_adjustment import post_hoc_offsets
from common.rebalance.given import Given, require_pointwise


@dataclass(frozen=True)
class FoldedAdjustment:
    """tau: strength τ; 0 changes nothing."""

    tau: NotNegative = 1.0

    def __call__(self, classifier: nn.Module, given: Given) -> nn.Module:
        instead = f"set eval.logit_adjustment: {self.tau:g}, which adds it to any network's scores"
        trained = require_pointwise(classifier, given.where, instead)
        if trained.bias is None:
            raise ConfigError(f"{given.where}: the classifier has no bias; {instead}")

        if self.tau:
            warn_of_others(given)

        adjusted = deepcopy(trained)
        offsets = post_hoc_offsets(given.counts.pixels.tolist(), self.tau).to(trained.bias)
        adjusted.bias = nn.Parameter(trained.bias.detach() + offsets)

        return adjusted


def folds(classifier: nn.Module | None) -> bool:
    """Whether a network's classifier, None where it has none, has a bias that can hold the adjustment."""
    if not isinstance(classifier, nn.Conv2d) or classifier.kernel_size != (1, 1):
        return False

    return classifier.bias is not None


def warn_of_others(given: Given) -> None:
    """Say what corrects for class frequency already."""
    others = []
    loss = (given.cfg.remedies.get("logits") or {}).get("name")
    if loss in IN_TRAINING:
        others.append(f"remedies.logits {loss}, in training")
    if given.cfg.eval.logit_adjustment:
        others.append(f"eval.logit_adjustment: {given.cfg.eval.logit_adjustment:g}")

    for other in others:
        warnings.warn(f"{given.where}: {other}: both add up", stacklevel=3)
