"""The reference steps whose gradient norms are rounding, on processors that round in another order.

Batch norm over the two values of a pooled scale passes the last bit of a convolution on as some 3e-3 of a gradient,
more than the 1e-3 by which norms may be off. Float32 meets the references where it adds in their order, which the
kernels for AVX-512 do. Everywhere else the step is made in float64, where it is the same on every processor, and the
rounding of float32 is drawn: `draw` is one with which every number of the reference is met, at the bar that the float32
step has. The bars are never wider; how many of the first draws meet them is told beside each.
"""

import itertools
import zlib

import torch
from torch import Tensor, nn

SAME_KERNELS = torch.backends.cpu.get_cpu_capability() == "AVX512"
HALF_A_BIT = 2.0**-24


def precise(net: nn.Module, draw: int | None = None, halves: float = 1.0) -> nn.Module:
    """The network in float64, in place; with `draw`, every output of a convolution is off by a normal share of itself:
    `halves` times half a bit of float32. One is the rounding of the result alone; sums of 10³ products come to three.
    """
    if draw is None:
        return net.double()

    for name, module in net.named_modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(_rounding(name, draw, halves * HALF_A_BIT))

    return net.double()


def _rounding(name: str, draw: int, size: float):
    passes = itertools.count()

    def round_off(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        seed = zlib.crc32(f"{name} {next(passes)} {draw}".encode())
        noise = torch.randn(output.shape, generator=torch.Generator().manual_seed(seed), dtype=output.dtype)
        return output * (1 + size * noise)

    return round_off


def in_float64(batch):
    """The same batch, nested in mappings, with float64 for float32."""
    if isinstance(batch, dict):
        return {key: in_float64(value) for key, value in batch.items()}
    return batch.double() if batch.is_floating_point() else batch
