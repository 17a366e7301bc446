"""The adversary of the warm-up: from which domain does a map of class probabilities come?

AdaptSegNet's scheme (CVPR 2018) on the network's output: the discriminator learns to tell source from target, the
network to have its target maps taken for source.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

SOURCE, TARGET = 0.0, 1.0  # the discriminator's answers


class Discriminator(nn.Module):
    """Class probabilities (B, K, H, W) to scores (B, 1, ⌈H/16⌉, ⌈W/16⌉): four strided convolutions and a 1×1."""

    def __init__(self, num_classes: int, width: int = 64):
        super().__init__()
        self.num_classes = num_classes
        channels = (num_classes, width, 2 * width, 4 * width, 8 * width)
        self.convs = nn.ModuleList(
            nn.Conv2d(before, after, 3, 2, 1)
            for before, after in zip(channels, channels[1:], strict=False)
        )
        self.classifier = nn.Conv2d(8 * width, 1, 1)

    def forward(self, probabilities: Tensor) -> Tensor:
        x = probabilities
        for conv in self.convs[:-1]:
            x = F.relu(conv(x), inplace=True)

        return self.classifier(F.leaky_relu(self.convs[-1](x), 0.2, inplace=True))

    def constant(self, probabilities: Tensor) -> Tensor:
        """As `forward`, but only the input gets a gradient: the generator's term of one joint backward."""
        weights = {name: parameter.detach() for name, parameter in self.named_parameters()}
        return functional_call(self, weights, (probabilities,))


def adversarial_loss(
    scores: Tensor, domain: float, criterion: Literal["LS", "Vanilla"] = "LS"
) -> Tensor:
    """Mean over all scores of (s − domain)² (LS) or of the binary cross-entropy with logits (Vanilla).

    domain: SOURCE or TARGET, the answer that the loss asks for.
    """
    scores = scores.float()
    goal = torch.full_like(scores, domain)
    return (
        F.mse_loss(scores, goal)
        if criterion == "LS"
        else F.binary_cross_entropy_with_logits(scores, goal)
    )
