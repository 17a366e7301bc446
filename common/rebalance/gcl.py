"""GCL's second stage (Li et al., CVPR 2022): a cosine classifier goes on with noise, a margin and balanced draws.

    z'_k = s · (cos_k − a · |e| · w_k − m · 1[k = y]),   e ~ N(0, ⅓) within ±1,   w_k = (ln n_max − ln n_k) / max
    loss = (1 − p_y)^γ · −ln p_y,   p = softmax(z')

with the factor out of the gradient, everything before the classifier frozen, and all classes equally often: as many
pixels of each in a batch. The first stage is training with `remedies.logits: gcl`, s = 30 and m = 0.
"""

from copy import deepcopy
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.config import ConfigError, typed
from common.config.bounds import NotNegative, Positive
from common.losses.blv import BLV, PRESETS
from common.losses.focal import Focal
from common.models.cosine import CosineClassifier
from common.rebalance.crt import initialised
from common.rebalance.fitting import Fitting, fit, isolated
from common.rebalance.given import Given
from common.rebalance.place import other_classifiers


@dataclass(frozen=True)
class GaussianClouds(Fitting):
    """scale: s; margin: m; amplitude: a; gamma: γ, all the authors'. fresh: begin at new directions in place of those
    that were trained. steps: None: a tenth of the run's."""

    scale: Positive = 20.0
    margin: NotNegative = 0.1
    amplitude: NotNegative = 0.5
    gamma: NotNegative = 1.0
    fresh: bool = False

    def __call__(self, classifier: nn.Module, given: Given) -> nn.Module:
        if not isinstance(classifier, CosineClassifier):
            raise ConfigError(
                f"{given.where}: the classifier is a {type(classifier).__name__}, and angles are those of a cosine "
                "one; train with model.options.classifier: cosine, or take crt"
            )

        self._refuse_others(classifier, given)
        seed = given.cfg.seed if self.seed is None else self.seed
        made = initialised(classifier, seed) if self.fresh else deepcopy(classifier)
        made.scale = self.scale
        features = given.features(self.cache_mib)

        with isolated(seed, features.values.device):
            fit(
                made,
                made.parameters(),
                features,
                torch.ones(len(features.counts)),
                self,
                steps=self.steps or max(given.cfg.train.steps // 10, 1),
                seed=seed,
                where=given.where,
                loss=self.loss(given, features.values.device),
            )

        return made

    @property
    def anew(self) -> bool:
        return self.fresh

    def _refuse_others(self, classifier: CosineClassifier, given: Given) -> None:
        """ConfigError where another scale would also be that of a classifier which is not trained here, but predicts:
        a config has one for all."""
        others = [] if self.scale == classifier.scale else other_classifiers(given.cfg.model)
        if others:
            raise ConfigError(
                f"{given.where}: scale: {self.scale:g} would be that of {', '.join(others)} as well; "
                f"give scale={classifier.scale:g}, that of the network"
            )

    def loss(self, given: Given, device: torch.device) -> "Clouded":
        """The loss of a pixel, on the device of its features."""
        strength = {"scale": self.scale, "amplitude": self.scale * self.amplitude}
        noise = typed(BLV, PRESETS["gcl"] | strength, given.where)
        weights = noise.vector(given.counts).to(device)
        return Clouded(noise, weights, self.scale * self.margin, Focal(self.gamma, detach=True))


@dataclass(frozen=True)
class Clouded:
    """Losses (N,) of logits (N, K) and classes (N,). weights: w_k (K,). margin: in logits."""

    noise: BLV
    weights: Tensor
    margin: float
    focal: Focal

    def __call__(self, logits: Tensor, target: Tensor) -> Tensor:
        noisy = self.noise(logits, target, self.weights)
        changed = noisy - self.margin * F.one_hot(target, logits.shape[1])
        each = F.cross_entropy(changed, target, reduction="none")
        return self.focal(each, changed, target)
