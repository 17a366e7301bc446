"""UPerNet's head (ECCV 2018): pyramid pooling on the deepest map, then a feature pyramid."""

import torch
from torch import Tensor, nn

from common.models.heads.psp import PSPHead
from common.models.layers import ConvBNAct


class UPerHead(PSPHead):
    """Maps at falling resolution to logits (B, K, h, w) at the stride of map 0."""

    def __init__(
        self,
        in_channels: tuple[int, ...],
        channels: int,
        num_classes: int,
        *,
        pool_scales: tuple[int, ...] = (1, 2, 3, 6),
        dropout: float = 0.1,
        align_corners: bool = False,
    ):
        super().__init__(
            in_channels,
            channels,
            num_classes,
            pool_scales=pool_scales,
            dropout=dropout,
            align_corners=align_corners,
        )
        self.lateral_convs = nn.ModuleList(
            ConvBNAct(width, channels) for width in in_channels[:-1]
        )
        self.fpn_convs = nn.ModuleList(
            ConvBNAct(channels, channels, 3) for _ in in_channels[:-1]
        )
        self.fpn_bottleneck = ConvBNAct(len(in_channels) * channels, channels, 3)

    def fuse(self, features: list[Tensor]) -> Tensor:
        """The maps joined: (B, channels, h, w) at the stride of map 0."""
        deepest = self.pyramid(features[-1])
        laterals = [conv(x) for conv, x in zip(self.lateral_convs, features, strict=False)]
        levels = [deepest]

        # top down; what is passed on is the sum before its 3×3 convolution
        for lateral in reversed(laterals):
            levels.insert(0, lateral + self.resize(levels[0], lateral))

        outputs = [conv(x) for conv, x in zip(self.fpn_convs, levels, strict=False)]
        outputs.append(deepest)
        finest = [self.resize(x, outputs[0]) for x in outputs]
        return self.fpn_bottleneck(torch.cat(finest, 1))
