"""Batch norm with fixed statistics and affine, as detectron2 trains backbones: only the convolutions learn.

The norm is folded into its convolution at every forward (weight · scale, bias = shift), so it costs no pass over the
map and keeps no map alive for the backward.
"""

import operator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.models.layers import layer_dtype


class Made(NamedTuple):
    """Scale, and shift in the convolution's precision, with the buffers that they were made of."""

    buffers: tuple[Tensor, ...]
    versions: tuple[int, ...]  # torch counts what is written into a tensor
    scale: Tensor
    shift: Tensor


def _affine(
    weight: Tensor, bias: Tensor, mean: Tensor, variance: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    scale = weight * (variance + eps).rsqrt()
    return scale, (bias - mean * scale).to(dtype)


class FrozenBatchNorm2d(nn.Module):
    """Buffers of a batch norm, named as there; maps pass unchanged because the convolution before has applied it."""

    def __init__(self, norm: nn.BatchNorm2d):
        super().__init__()
        self.eps = norm.eps

        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, getattr(norm, name).detach().clone())

        self._made: Made | None = None

    def affine(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Scale and shift (C,), the latter in `dtype`; made once, and again when that is another, or the buffers have
        other values or are others."""
        buffers = (self.weight, self.bias, self.running_mean, self.running_var)
        if torch.compiler.is_compiling() or torch.is_inference_mode_enabled():
            return _affine(*buffers, self.eps, dtype)

        versions = tuple(buffer._version for buffer in buffers)
        made = self._made
        same = made is not None and all(map(operator.is_, made.buffers, buffers))
        if made is None or not same or made.versions != versions or made.shift.dtype != dtype:
            made = Made(buffers, versions, *_affine(*buffers, self.eps, dtype))
            self._made = made

        return made.scale, made.shift

    def forward(self, x: Tensor) -> Tensor:
        return x


class FrozenNormConv2d(nn.Conv2d):
    """A bias-free convolution followed by a frozen norm, which keeps its own place and names in the network."""

    def __init__(self, conv: nn.Conv2d, norm: FrozenBatchNorm2d):
        shape = (
            conv.in_channels,
            conv.out_channels,
            conv.kernel_size,
            conv.stride,
            conv.padding,
            conv.dilation,
        )
        super().__init__(*shape, conv.groups, bias=False, device="meta")
        self.weight = conv.weight
        self.norm = (norm,)  # in a tuple: the buffers belong to the norm's own place

    def forward(self, x: Tensor) -> Tensor:
        scale, shift = self.norm[0].affine(layer_dtype(self.weight))
        weight = self.weight * scale.view(-1, 1, 1, 1)
        return F.conv2d(x, weight, shift, self.stride, self.padding, self.dilation, self.groups)


def freeze_batchnorm(network: nn.Module, *, untrained: bool = False) -> nn.Module:
    """Replace every batch norm of a timm ResNet, in place: `bn1` follows `conv1`, `downsample.1` `downsample.0`, …

    `untrained`: the network has no weights from elsewhere, so every scale becomes 1. The zero at which the last norm of
    a residual block begins, frozen, would keep the block's convolutions out of the network for good.
    """
    for parent in list(network.modules()):
        children = dict(parent.named_children())
        for name, norm in children.items():
            if not isinstance(norm, nn.BatchNorm2d):
                continue

            before = name.replace("bn", "conv") if name.startswith("bn") else str(int(name) - 1)
            holder = parent
            # the deep stem: its last convolution
            if isinstance(children[before], nn.Sequential):
                holder = children[before]
                before = str(len(children[before]) - 1)

            frozen = FrozenBatchNorm2d(norm)
            if untrained:
                nn.init.ones_(frozen.weight)

            conv = FrozenNormConv2d(getattr(holder, before), frozen)
            setattr(parent, name, frozen)
            setattr(holder, before, conv)

    return network
