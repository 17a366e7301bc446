"""What methods are given in tests in place of a counted data set."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from common.config import Config
from common.data import Statistics
from common.engine import Method, MethodContext


def context(counts: Sequence[int] | torch.Tensor | Statistics | int = 5) -> MethodContext:
    """The context of one training image with these pixels of each class; a number: of so many equal classes."""
    if isinstance(counts, Statistics):
        return MethodContext(counts)
    if isinstance(counts, int):
        counts = [100] * counts
    pixels = np.asarray(counts, np.int32)[None]
    return MethodContext(Statistics(pixels, np.zeros(1, np.int32)))


@dataclass(frozen=True)
class NoOptions:
    """An empty section `method`."""


class BareMethod(Method):
    """What the engine's tests make their own small methods of: no options, nothing counted."""

    Options = NoOptions

    def __init__(self, cfg: Config):
        super().__init__(cfg, context(1))
