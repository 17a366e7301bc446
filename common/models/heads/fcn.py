"""Fully convolutional head: n convolutions and a classifier on one map, or on all maps resized to the first."""

import torch
from torch import Tensor, nn

from common.models.layers import ConvBNAct, DecodeHead


class FCNHead(DecodeHead):
    """Maps to logits (B, K, h, w) at the stride of map `level`, or of map 0 when `level` is None (all maps, joined)."""

    def __init__(
        self,
        in_channels: tuple[int, ...],
        channels: int,
        num_classes: int,
        *,
        level: int | None = None,
        kernel: int = 3,
        convs: int = 1,
        dropout: float = 0.1,
        align_corners: bool = False,
    ):
        super().__init__(channels, num_classes, dropout=dropout, align_corners=align_corners)
        self.level = level
        widths = [sum(in_channels) if level is None else in_channels[level]] + [channels] * (
            convs - 1
        )
        self.convs = nn.Sequential(*(ConvBNAct(width, channels, kernel) for width in widths))

    def fuse(self, features: list[Tensor]) -> Tensor:
        return self.convs(self.select(features))

    def select(self, features: list[Tensor]) -> Tensor:
        """The map that the convolutions read."""
        if self.level is not None:
            return features[self.level]
        return torch.cat([self.resize(feature, features[0]) for feature in features], 1)
