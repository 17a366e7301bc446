"""Pyramid pooling (PSPNet, CVPR 2017)."""

import torch
import torch.distributed as dist
from torch import Tensor, nn

from common.models.layers import ConvBNAct, DecodeHead
from common.ops.resize import adaptive_average


class Pool(nn.Module):
    """Average over a size × size grid of bins."""

    def __init__(self, size: int):
        super().__init__()
        self.size = size

    def forward(self, x: Tensor) -> Tensor:
        return adaptive_average(x, self.size)


class PSPHead(DecodeHead):
    """Averages of map `level` over grids of several sizes, joined to the map itself: logits at that map's stride."""

    def __init__(
        self,
        in_channels: tuple[int, ...],
        channels: int,
        num_classes: int,
        *,
        pool_scales: tuple[int, ...] = (1, 2, 3, 6),
        level: int = -1,
        dropout: float = 0.1,
        align_corners: bool = False,
    ):
        super().__init__(channels, num_classes, dropout=dropout, align_corners=align_corners)
        width = in_channels[level]
        self.level = level
        self.psp_modules = nn.ModuleList(
            nn.Sequential(Pool(scale), ConvBNAct(width, channels)) for scale in pool_scales
        )
        self.bottleneck = ConvBNAct(width + len(pool_scales) * channels, channels, 3)

    def fuse(self, features: list[Tensor]) -> Tensor:
        return self.pyramid(features[self.level])

    def pyramid(self, x: Tensor) -> Tensor:
        """(B, C, h, w) to (B, channels, h, w)."""
        check_batch(self.psp_modules, x)
        pooled = [self.resize(module(x), x) for module in self.psp_modules]
        return self.bottleneck(torch.cat([x, *pooled], 1))


def check_batch(branches: nn.ModuleList, x: Tensor) -> None:
    """Raise ValueError where batch norm would see one value per channel: one image, pooled to 1×1, in training."""
    for pool, conv in branches:
        together = (
            isinstance(conv.bn, nn.SyncBatchNorm)
            and dist.is_initialized()
            and dist.get_world_size() > 1
        )
        if conv.bn.training and x.shape[0] * pool.size**2 == 1 and not together:
            raise ValueError(
                "batch of 1 image: batch norm of the 1×1 pooling branch needs 2 in training; "
                "set batch_size to 2 per process or more, or train with SyncBN on several GPUs"
            )
