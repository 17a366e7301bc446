"""ResNet with the plain or a deep stem (three 3×3 convolutions, "c": 32, 32, 64 channels, "s": 64, 64, 128), from timm;
parameters keep timm's names."""

from typing import Literal

import timm
from torch import nn

from common.config.bounds import Rate


def resnet(
    name: str, *, output_stride: Literal[32, 16, 8] = 32, drop_path: Rate = 0.0
) -> nn.Module:
    """Four maps at strides 4, 8, 16, 32; with `output_stride` 8 or 16 later stages are dilated instead.

    The first block of a dilated stage keeps the dilation of the stage before, as in MMSegmentation. Convolutions are
    Kaiming normal over the fan-out and the last BN of each residual block starts at 0.
    """
    net = timm.create_model(
        name,
        features_only=True,
        out_indices=(1, 2, 3, 4),
        output_stride=output_stride,
        drop_path_rate=drop_path,
    )
    net.family, net.channels = "resnet", tuple(net.feature_info.channels())
    return net
