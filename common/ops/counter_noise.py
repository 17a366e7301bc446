"""Noise that is a function of its place: any part of it can be drawn at any time, again and again, and none is stored.

The generator is Philox4×32 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011): four words of 32
bits for each counter (column // 4, row, class, image) under a seed of 64 bits, of which word j is for column j mod 4.
The seed is a tensor on the device, drawn from torch's generator there, so that nothing waits for the host. This is the
definition; counter_noise_triton.py is the same inside kernels.
"""

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

Law = Literal["gaussian", "uniform", "beta", "exponential"]
Limit = Literal["positive", "folded", "signed", "none"]

ROUNDS = 7  # the fewest that pass its authors' tests; 10 cost half as much again
WORD = 0xFFFFFFFF


class Noise(NamedTuple):
    """e = limit(scale · draw) − shift.

    law: N(0, 1), U(0, 1), Beta(½, ½) or Exp(1). limit: clamp(0, 1), |clamp(−1, 1)|, clamp(−1, 1), or none.
    """

    law: Law
    limit: Limit
    scale: float
    shift: float = 0.0


def new_seed(device: torch.device) -> Tensor:
    """int64 (1,), from torch's generator of the device, without a word of the host."""
    return torch.randint(2**63 - 1, (1,), device=device)


def draws(noise: Noise, seed: Tensor, shape: Sequence[int]) -> Tensor:
    """e (B, K, H, W), float32 on the device of the seed.

    Four columns share one call of the generator, counted by (column // 4, row, class, image): word j is column j's.
    """
    batch, classes, height, width = shape
    quads = -(-width // 4)

    def count(length: int, *after: int) -> Tensor:
        return torch.arange(length, device=seed.device).view(-1, *after)

    counter = (count(quads), count(height, 1), count(classes, 1, 1), count(batch, 1, 1, 1))
    # 24 bits are exact in float32
    u0, u1, u2, u3 = ((word >> 8).float() * 2.0**-24 for word in philox(counter, seed))
    pairs = (*_pair(noise.law, u0, u1), *_pair(noise.law, u2, u3))
    e = torch.stack(pairs, -1).flatten(-2)[..., :width] * noise.scale

    if noise.limit == "positive":
        e = e.clamp(0, 1)
    elif noise.limit == "folded":
        e = e.abs().clamp(max=1)
    elif noise.limit == "signed":
        e = e.clamp(-1, 1)

    return e - noise.shift


def _pair(law: Law, u: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Two draws from two uniform numbers in [0, 1)."""
    if law == "gaussian":  # Box and Muller
        radius = (-2 * (1 - u).log()).sqrt()
        angle = 2 * math.pi * v
        return radius * angle.cos(), radius * angle.sin()
    if law == "uniform":
        return u, v
    if law == "beta":  # Beta(½, ½) is the arcsine law
        return (math.pi / 2 * u).sin().square(), (math.pi / 2 * v).sin().square()

    return -(1 - u).log(), -(1 - v).log()


def philox(
    counter: Sequence[Tensor], seed: Tensor, rounds: int = ROUNDS
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4×32: four words of 32 bits, as int64, of a counter of four words (broadcast) and a seed of 64 bits."""
    a, b, c, d = torch.broadcast_tensors(*counter)
    low, high = seed & WORD, (seed >> 32) & WORD

    for _ in range(rounds):
        left = 0xD2511F53 * a  # int64 wraps at 2⁶⁴, and its bits are those of the product
        right = 0xCD9E8D57 * c
        a, b = (right >> 32 & WORD) ^ b ^ low, right & WORD
        c, d = (left >> 32 & WORD) ^ d ^ high, left & WORD
        low, high = low + 0x9E3779B9 & WORD, high + 0xBB67AE85 & WORD

    return a, b, c, d
