"""Classifier re-training (Kang et al., ICLR 2020): a new classifier on frozen features, all classes equally often.

The authors train it for 10 epochs of 90, with 4 images of a class in a batch. Here every batch has equally many pixels
of each class, and there are a tenth of the run's steps.
"""

import math
from copy import deepcopy
from dataclasses import dataclass
from typing import ClassVar, TypeVar

import torch
from torch import nn

from common.config import ConfigError
from common.models.disalign import Aligned
from common.rebalance.fitting import Fitting, fit
from common.rebalance.given import Given

Classifier = TypeVar("Classifier", bound=nn.Module)


@dataclass(frozen=True)
class ClassifierRetraining(Fitting):
    """steps: None: a tenth of the run's."""

    anew: ClassVar[bool] = True  # nothing of the trained classifier is left

    def __call__(self, classifier: nn.Module, given: Given) -> nn.Module:
        if isinstance(classifier, Aligned):
            raise ConfigError(
                f"{given.where}: the run has DisAlign's calibration; take the one before it"
            )

        cfg = given.cfg
        steps = self.steps or max(cfg.train.steps // 10, 1)
        seed = cfg.seed if self.seed is None else self.seed
        fresh = initialised(classifier, seed)
        features = given.features(self.cache_mib)
        equal = torch.ones(len(features.counts))
        fit(
            fresh,
            fresh.parameters(),
            features,
            equal,
            self,
            steps=steps,
            seed=seed,
            where=given.where,
        )

        return fresh


def initialised(classifier: Classifier, seed: int) -> Classifier:
    """A copy with torch's own start for weights, and biases of 0."""
    fresh = deepcopy(classifier)
    draws = torch.Generator().manual_seed(seed)

    with torch.no_grad():
        for parameter in fresh.parameters():
            if parameter.dim() == 1:
                parameter.zero_()
                continue
            bound = 1 / math.sqrt(parameter[0].numel())
            start = torch.empty(parameter.shape).uniform_(-bound, bound, generator=draws)
            parameter.copy_(start)

    return fresh
