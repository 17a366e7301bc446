"""What a remedy after training is given beside the classifier, and what it has to be."""

from dataclasses import dataclass
from typing import Protocol

from torch import nn

from common.config import Config, ConfigError
from common.losses.counts import Counts


@dataclass
class Given:
    """The run of a trained network. counts: of its training labels. where: begins the messages of errors."""

    cfg: Config
    counts: Counts
    where: str


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
