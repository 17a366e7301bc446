"""DisAlign (Zhang et al., CVPR 2021): the logits of a trained network, calibrated for balance; all else is frozen.

    minimise Σ_k π_k w_k · mean of −log softmax(ẑ)_k over class k's pixels,   w_k ∝ π_k^(−rho)

which is class-weighted cross-entropy on the data as they are; `common/models/disalign.py` has ẑ. In the release frozen
batch norms still move their statistics; here the features are those of the evaluation.
"""

from copy import deepcopy
from dataclasses import dataclass

from torch import nn

from common.config import ConfigError
from common.config.bounds import Count, NotNegative, Positive
from common.losses.class_weights import Power
from common.models.disalign import Aligned, calibrated
from common.rebalance.fitting import Fitting, fit
from common.rebalance.given import Given


@dataclass(frozen=True)
class DisAlign(Fitting):
    """rho: how strongly rare classes are weighed; 0: not at all. steps and rho are the authors'."""

    rho: NotNegative = 0.2
    steps: Count = 4000
    lr: Positive = 0.1
    weight_decay: NotNegative = 0.0

    def __call__(self, classifier: nn.Module, given: Given) -> nn.Module:
        if isinstance(classifier, Aligned):
            raise ConfigError(
                f"{given.where}: the run is calibrated already; take the one before it"
            )

        aligned = calibrated(deepcopy(classifier).requires_grad_(False))
        features = given.features(self.cache_mib)
        aligned.to(features.values.device)

        weights = given.counts.prior() * Power(rho=self.rho).vector(given.counts)
        seed = given.cfg.seed if self.seed is None else self.seed
        own = aligned.own_parameters()
        fit(
            aligned,
            own,
            features,
            weights,
            self,
            steps=self.steps,
            seed=seed,
            where=given.where,
        )

        return aligned
