"""ResNet with the plain or a deep stem (three 3×3 convolutions, "c": 32, 32, 64 channels, "s": 64, 64, 128), from timm;
parameters keep timm's names."""

from typing import Literal

from torch import nn

from common.config import ConfigError
from common.config.bounds import Rate, Side
from common.lazy import Lazy

timm = Lazy("timm")


def resnet(
    name: str,
    *,
    output_stride: Literal[32, 16, 8] = 32,
    drop_path: Rate = 0.0,
    multi_grid: tuple[Side, ...] | None = None,
    ceil_pool: bool = False,
) -> nn.Module:
    """Four maps at strides 4, 8, 16, 32; with `output_stride` 8 or 16 later stages are dilated instead.

    The first block of a dilated stage keeps the dilation of the stage before, as in MMSegmentation. Convolutions are
    Kaiming normal over the fan-out and the last BN of each residual block starts at 0.

    multi_grid: factors of the dilations of the last stage, one a block. ceil_pool: the stem's pooling rounds an odd
    side up. Raises ConfigError for factors that are not one a block.
    """
    net = timm.create_model(
        name,
        features_only=True,
        out_indices=(1, 2, 3, 4),
        output_stride=output_stride,
        drop_path_rate=drop_path,
    )
    net.family, net.channels = "resnet", tuple(net.feature_info.channels())
    net.maxpool.ceil_mode = ceil_pool
    if multi_grid is not None:
        spread_last_stage(net, multi_grid)

    return net


def spread_last_stage(net: nn.Module, factors: tuple[int, ...]) -> None:
    """Multiply the dilations of the 3×3 convolutions of each block of the last stage by the block's factor."""
    if len(factors) != len(net.layer4):
        raise ConfigError(
            f"model.options.backbone.multi_grid: {list(factors)} for {len(net.layer4)} blocks of the last stage; "
            "give one factor a block"
        )

    for block, factor in zip(net.layer4, factors, strict=True):
        for conv in block.modules():
            if isinstance(conv, nn.Conv2d) and conv.kernel_size == (3, 3):
                conv.dilation = conv.padding = tuple(factor * d for d in conv.dilation)
