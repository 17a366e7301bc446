"""DAFormer's head (Hoyer et al., CVPR 2022): every level embedded, joined, and seen at several dilations."""

from typing import Literal

import torch
from torch import Tensor, nn

from common.models.layers import ConvBNAct, DecodeHead

Fusion = Literal["sep_aspp", "conv"]


class Embedding(nn.Module):
    """A linear layer for each pixel: (B, C, h, w) to (B, out, h, w)."""

    def __init__(self, channels: int, out: int):
        super().__init__()
        self.proj = nn.Linear(channels, out)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x.flatten(2).transpose(1, 2)).transpose(1, 2).unflatten(2, x.shape[2:])


class SeparableConv(nn.Module):
    """A dilated 3×3 convolution of each channel, then a 1×1 convolution; BN and ReLU after both."""

    def __init__(self, channels: int, out: int, dilation: int):
        super().__init__()
        self.depthwise_conv = ConvBNAct(
            channels, channels, 3, dilation=dilation, groups=channels
        )
        self.pointwise_conv = ConvBNAct(channels, out)

    def forward(self, x: Tensor) -> Tensor:
        return self.pointwise_conv(self.depthwise_conv(x))


class SeparableASPP(nn.Module):
    """Branches of several dilations (1: a 1×1 convolution), joined by a 3×3 convolution; no image pooling."""

    def __init__(self, channels: int, out: int, dilations: tuple[int, ...]):
        super().__init__()
        self.aspp_modules = nn.ModuleList(
            ConvBNAct(channels, out)
            if dilation == 1
            else SeparableConv(channels, out, dilation)
            for dilation in dilations
        )
        self.bottleneck = ConvBNAct(len(dilations) * out, out, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.bottleneck(torch.cat([branch(x) for branch in self.aspp_modules], 1))


class DAFormerHead(DecodeHead):
    """Maps at falling resolution to logits (B, K, h, w) at the stride of map 0.

    fusion: what joins the embedded levels, the paper's context-aware "sep_aspp" or one 1×1 convolution, "conv".
    """

    def __init__(
        self,
        in_channels: tuple[int, ...],
        channels: int,
        num_classes: int,
        *,
        fusion: Fusion = "sep_aspp",
        dilations: tuple[int, ...] = (1, 6, 12, 18),
        dropout: float = 0.1,
        align_corners: bool = False,
    ):
        super().__init__(channels, num_classes, dropout=dropout, align_corners=align_corners)
        self.embed_layers = nn.ModuleList(Embedding(width, channels) for width in in_channels)

        joined = len(in_channels) * channels
        if fusion == "sep_aspp":
            self.fuse_layer = SeparableASPP(joined, channels, dilations)
        else:
            self.fuse_layer = ConvBNAct(joined, channels)

    def fuse(self, features: list[Tensor]) -> Tensor:
        embedded = [embed(x) for embed, x in zip(self.embed_layers, features, strict=True)]
        joined = torch.cat([self.resize(x, features[0]) for x in embedded], 1)
        return self.fuse_layer(joined)
