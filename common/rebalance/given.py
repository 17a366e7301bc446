"""What a remedy after training is given beside the classifier, and what it has to be."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from torch import nn

from common.config import Config, ConfigError
from common.losses.counts import Counts
from common.rebalance.features import Features


@dataclass(frozen=True)
class Given:
    """The run of a trained network. counts: of its training labels. where: begins the messages of errors.

    features: what the classifier reads of the training images, in so many MiB; it takes a pass over them.
    """

    cfg: Config
    counts: Counts
    where: str
    features: Callable[[int], Features]


class Stage2(Protocol):
    """A remedy after training: a frozen dataclass of its options, which makes a classifier of a trained one."""

    def __call__(self, classifier: nn.Module, given: Given) -> nn.Module:
        """A new module in the classifier's place, which stays as it is: (B, D, h, w) to logits (B, K, h, w)."""
        ...


def require_pointwise(classifier: nn.Module, where: str, instead: str) -> nn.Conv2d:
    """The classifier, a plain 1×1 convolution. ConfigError for another one, which ends in what to do `instead`."""
    if isinstance(classifier, nn.Conv2d) and classifier.kernel_size == (1, 1):
        return classifier

    kind = type(classifier).__name__
    raise ConfigError(f"{where}: the classifier is a {kind}, not a 1×1 convolution; {instead}")
