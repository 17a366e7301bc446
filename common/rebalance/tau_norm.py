"""τ-normalised classifier (Kang et al., ICLR 2020): W_k / ‖W_k‖^τ.

Weights of frequent classes are longer. The authors try τ = 0, 0.1, …, 2 on the test set, and leave the bias out; here
it is kept unless told otherwise, and τ is to be chosen on images that are not reported.
"""

from copy import deepcopy
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from common.config.bounds import NotNegative
from common.rebalance.given import Given, require_pointwise


@dataclass(frozen=True)
class TauNorm:
    """tau: strength τ, at 1 all weights are equally long; 0 changes nothing. bias: `drop` sets it to 0."""

    tau: NotNegative = 1.0
    bias: Literal["keep", "drop"] = "keep"

    def __call__(self, classifier: nn.Module, given: Given) -> nn.Module:
        instead = "the length of its weights says nothing, or is not theirs alone; take another remedy"
        normalised = deepcopy(require_pointwise(classifier, given.where, instead))

        with torch.no_grad():
            length = normalised.weight.flatten(1).norm(dim=1)
            # a class whose weights are 0 keeps them
            length = torch.where(length > 0, length, 1.0)
            normalised.weight /= length.pow(self.tau).view(-1, 1, 1, 1)
            if self.bias == "drop" and normalised.bias is not None:
                normalised.bias.zero_()

        return normalised
