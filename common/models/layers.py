"""Pieces that several networks share; names follow the official checkpoints (`<name>.conv`, `<name>.bn`)."""

from abc import ABC, abstractmethod

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.ops.resize import resize


def layer_dtype(weight: Tensor) -> torch.dtype:
    """The precision in which a layer with this weight works: under autocast not the weight's own.

    Autocast remembers its cast of a parameter, but neither that of a part of one nor that of a constant.
    """
    device = weight.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return weight.dtype


class ConvBNAct(nn.Module):
    """Convolution without bias, batch norm, ReLU; (B, C, H, W) to (B, out, H', W').

    Initialised as MMSegmentation does: Kaiming normal over the fan-out, BN weight 1 and bias 0.
    """

    def __init__(
        self,
        channels: int,
        out: int,
        kernel: int = 1,
        *,
        stride: int = 1,
        padding: int | None = None,
        dilation: int = 1,
        groups: int = 1,
    ):
        super().__init__()
        padding = dilation * (kernel // 2) if padding is None else padding
        self.conv = nn.Conv2d(
            channels, out, kernel, stride, padding, dilation, groups, bias=False
        )
        self.bn = nn.BatchNorm2d(out)
        nn.init.kaiming_normal_(self.conv.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)), inplace=True)


class DecodeHead(nn.Module, ABC):
    """Base of heads that end in channel dropout and the 1×1 classifier `conv_seg` (N(0, 0.01), bias 0)."""

    def __init__(
        self,
        channels: int,
        num_classes: int,
        *,
        dropout: float = 0.1,
        align_corners: bool = False,
    ):
        super().__init__()
        self.align_corners = align_corners
        self.embedding_channels = channels
        self.dropout = nn.Dropout2d(dropout)
        self.conv_seg = nn.Conv2d(channels, num_classes, 1)
        nn.init.normal_(self.conv_seg.weight, std=0.01)
        nn.init.zeros_(self.conv_seg.bias)

    @abstractmethod
    def fuse(self, features: list[Tensor]) -> Tensor:
        """A backbone's maps, joined: (B, channels, h, w)."""

    def embed(self, features: list[Tensor]) -> Tensor:
        """What the classifier reads: the joined maps, in training with channels dropped."""
        return self.dropout(self.fuse(features))

    def forward(self, features: list[Tensor]) -> Tensor:
        return self.conv_seg(self.embed(features))

    def classify(self, x: Tensor) -> Tensor:
        """Features (B, channels, h, w) to logits (B, K, h, w)."""
        return self.conv_seg(self.dropout(x))

    def resize(self, x: Tensor, like: Tensor) -> Tensor:
        """`x` resized bilinearly to the height and width of `like`."""
        return resize(x, like.shape[-2:], self.align_corners)
