"""What methods are given in tests in place of a counted data set."""

from collections.abc import Sequence

import numpy as np
import torch

from common.data import Statistics
from common.engine import MethodContext


def context(counts: Sequence[int] | torch.Tensor | Statistics | int = 5) -> MethodContext:
    """The context of one training image with these pixels of each class; a number: of so many equal classes."""
    if isinstance(counts, Statistics):
        return MethodContext(counts)
    if isinstance(counts, int):
        counts = [100] * counts
    pixels = np.asarray(counts, np.int32)[None]
    return MethodContext(Statistics(pixels, np.zeros(1, np.int32)))
