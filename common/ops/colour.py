"""Strong augmentation of colours on the device: kornia's jitter, and a Gaussian blur with a strength for each image.

kornia's brightness is added, and its contrast scales about black: torchvision's jitter is another augmentation.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

TAPS = 15  # the longest kernel: up to σ = 1.15, what lies beyond is less than 1e-8


class Jitter(NamedTuple):
    """A factor (B,) of each operation, in the order in which `order` numbers them; 1, 1, 1, 0 change nothing."""

    brightness: Tensor
    contrast: Tensor
    saturation: Tensor
    hue: Tensor  # in turns of the colour circle


def draw_jitter(batch: int, strength: float, device: torch.device) -> Jitter:
    """Factors U(1 − strength, 1 + strength), of hue U(−strength, strength), for each image."""
    b, c, s, h = (2 * torch.rand(4, batch, device=device) - 1) * strength
    return Jitter(1 + b, 1 + c, 1 + s, h)


def jitter(rgb: Tensor, factors: Jitter, order: Sequence[int] = (0, 1, 2, 3)) -> Tensor:
    """Images (B, 3, H, W) in [0, 1] with brightness (0), contrast (1), saturation (2), hue (3) changed in `order`."""
    operations = (_brightness, _contrast, _saturation, _hue)
    for number in order:
        rgb = operations[number](rgb, factors[number].view(-1, 1, 1, 1))

    return rgb


def _brightness(rgb: Tensor, factor: Tensor) -> Tensor:
    return (rgb + (factor - 1)).clamp(0, 1)


def _contrast(rgb: Tensor, factor: Tensor) -> Tensor:
    return (rgb * factor).clamp(0, 1)


def _saturation(rgb: Tensor, factor: Tensor) -> Tensor:
    hue, saturation, value = to_hsv(rgb)
    return to_rgb(hue, (saturation * factor).clamp(0, 1), value)


def _hue(rgb: Tensor, turns: Tensor) -> Tensor:
    hue, saturation, value = to_hsv(rgb)
    return to_rgb(hue + turns, saturation, value)


def to_hsv(rgb: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Hue in turns, saturation and value, each (B, 1, H, W), of images in [0, 1]; the hue of grey is 0."""
    red, green, blue = rgb.split(1, 1)
    value = rgb.amax(1, keepdim=True)
    lowest = rgb.amin(1, keepdim=True)
    spread = value - lowest
    saturation = spread / (value + 1e-6)

    divisor = torch.where(spread == 0, 1, spread)
    from_red = (green - blue) / divisor
    from_green = 2 + (blue - red) / divisor
    from_blue = 4 + (red - green) / divisor
    sixths = torch.where(
        value == red, from_red, torch.where(value == green, from_green, from_blue)
    )

    return (sixths / 6).remainder(1), saturation, value


def to_rgb(hue: Tensor, saturation: Tensor, value: Tensor) -> Tensor:
    """The inverse of `to_hsv`; any number of turns."""
    channels = []
    for sixths in (5, 3, 1):
        k = (sixths + 6 * hue).remainder(6)
        channels.append(value - value * saturation * torch.minimum(k, 4 - k).clamp(0, 1))

    return torch.cat(channels, 1)


def blur(x: Tensor, sigma: Tensor) -> Tensor:
    """Images (B, C, H, W) under a Gaussian of sigma (B,) pixels; edges are reflected.

    The kernel of an axis has about a tenth of its pixels, an odd number, as in DAFormer, and TAPS at most.
    """
    for axis in (2, 3):
        x = _blur_axis(x, sigma, axis)
    return x


def _blur_axis(x: Tensor, sigma: Tensor, axis: int) -> Tensor:
    radius = taps(x.shape[axis]) // 2
    if radius == 0:
        return x

    distance = torch.arange(-radius, radius + 1, device=x.device, dtype=x.dtype)
    kernel = (-0.5 * (distance / sigma[:, None].to(x.dtype)) ** 2).exp()
    kernel = kernel / kernel.sum(1, keepdim=True)

    padding = (0, 0, radius, radius) if axis == 2 else (radius, radius, 0, 0)
    padded = F.pad(x, padding, mode="reflect")
    windows = [padded.narrow(axis, start, x.shape[axis]) for start in range(2 * radius + 1)]
    blurred = torch.zeros_like(x)

    for window, weight in zip(windows, kernel.T, strict=True):
        blurred.addcmul_(window, weight.view(-1, 1, 1, 1))

    return blurred


def taps(side: int) -> int:
    """The length of the kernel for a side of so many pixels."""
    tenth = math.ceil(0.1 * side)
    return min(math.floor(tenth - 0.5 + tenth % 2), TAPS)
