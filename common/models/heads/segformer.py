"""SegFormer's head in the MMSegmentation form: one 1×1 conv with BN and ReLU a level, joined at stride 4.

The original release uses linear layers without BN and ReLU and joins the levels in reverse: its checkpoints do not fit.
"""

import torch
from torch import Tensor, nn

from common.models.layers import ConvBNAct, DecodeHead


class SegFormerHead(DecodeHead):
    """Maps at falling resolution to logits (B, K, h, w) at the stride of map 0."""

    def __init__(
        self,
        in_channels: tuple[int, ...],
        channels: int,
        num_classes: int,
        *,
        dropout: float = 0.1,
        align_corners: bool = False,
    ):
        super().__init__(channels, num_classes, dropout=dropout, align_corners=align_corners)
        self.convs = nn.ModuleList(ConvBNAct(width, channels) for width in in_channels)
        self.fusion_conv = ConvBNAct(len(in_channels) * channels, channels)

    def fuse(self, features: list[Tensor]) -> Tensor:
        levels = [
            self.resize(conv(x), features[0])
            for conv, x in zip(self.convs, features, strict=True)
        ]
        return self.fusion_conv(torch.cat(levels, 1))
