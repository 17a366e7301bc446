"""DeepLabV2's classifier (Chen et al., TPAMI 2018): a sum of dilated convolutions, here of any number of them.

Domain adaptation trains it with two, dilations 6 and 12, since AdaptSegNet: the sum over four of the paper never ran
there, because its loop over the branches returned after the second.
"""

import torch
from torch import Tensor, nn


class DeepLabV2Head(nn.Module):
    """The deepest map to logits (B, K, h, w) at its stride; no norm, no dropout."""

    family = "deeplabv2_reduced"  # of its official names

    def __init__(
        self,
        in_channels: tuple[int, ...],
        num_classes: int,
        *,
        dilations: tuple[int, ...] = (6, 12),
    ):
        super().__init__()
        self.convs = nn.ModuleList(
            nn.Conv2d(in_channels[-1], num_classes, 3, padding=dilation, dilation=dilation)
            for dilation in dilations
        )

        for conv in self.convs:
            nn.init.normal_(conv.weight, std=0.01)
            nn.init.zeros_(conv.bias)

    def forward(self, features: list[Tensor]) -> Tensor:
        return torch.stack([conv(features[-1]) for conv in self.convs]).sum(0)
