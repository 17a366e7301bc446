"""Colour transfer in CIE-LAB: an image takes the mean and spread of another's colours (CPSL)."""

from typing import NamedTuple

import numpy as np
import torch

from common.data.images import Picture

# sRGB under D65 with the 2° observer
_TO_XYZ = (
    (0.412453, 0.357580, 0.180423),
    (0.212671, 0.715160, 0.072169),
    (0.019334, 0.119193, 0.950227),
)
_WHITE = (0.95047, 1.0, 1.08883)
_FORWARD = (
    torch.tensor(_TO_XYZ, dtype=torch.float64)
    / torch.tensor(_WHITE, dtype=torch.float64)[:, None]
)
_INVERSE = torch.linalg.inv(_FORWARD)
_LEVELS = torch.arange(256, dtype=torch.float64) / 255
_LINEAR = (
    torch.where(_LEVELS > 0.04045, ((_LEVELS + 0.055) / 1.055) ** 2.4, _LEVELS / 12.92)
    .float()
    .numpy()
)


class ColourStatistics(NamedTuple):
    """Mean and population standard deviation of L, a, b over an image, float64 (3,)."""

    mean: torch.Tensor
    std: torch.Tensor


def rgb_to_lab(pixels: np.ndarray) -> torch.Tensor:
    """uint8 (H, W, 3) → float32 (3, H, W): L in 0–100, a, b."""
    linear = torch.from_numpy(np.take(_LINEAR, np.ascontiguousarray(pixels.transpose(2, 0, 1))))
    xyz = (_FORWARD.float() @ linear.flatten(1)).view_as(linear)

    # CIE's f: a cube root, but straight near black
    root = xyz.clamp(min=0.008856) ** (1 / 3)
    straight = 7.787 * xyz + 16 / 116
    x, y, z = torch.where(xyz > 0.008856, root, straight)

    return torch.stack((116 * y - 16, 500 * (x - y), 200 * (y - z)))


def lab_to_rgb(lab: torch.Tensor) -> np.ndarray:
    """float32 (3, H, W) → uint8 (H, W, 3), clipped to the sRGB range and truncated."""
    y = (lab[0] + 16) / 116
    x = lab[1] / 500 + y
    z = (y - lab[2] / 200).clamp_(min=0)
    f = torch.stack((x, y, z))

    dark = (f - 16 / 116) / 7.787
    xyz = torch.where(f > 0.2068966, f**3, dark)
    linear = (_INVERSE.float() @ xyz.flatten(1)).view_as(xyz)

    curve = 1.055 * linear.clamp(min=0.0031308) ** (1 / 2.4) - 0.055
    rgb = torch.where(linear > 0.0031308, curve, 12.92 * linear)
    pixels = (rgb.clamp_(0, 1) * 255).to(torch.uint8)
    return pixels.permute(1, 2, 0).contiguous().numpy()


def colour_statistics(lab: torch.Tensor) -> ColourStatistics:
    """Of a whole image, float32 (3, H, W)."""
    flat = lab.flatten(1)
    mean = flat.mean(1, keepdim=True)
    variance = (flat - mean).square_().mean(1)
    return ColourStatistics(mean.flatten().double(), variance.double().sqrt())


class Recoloured(Picture):
    """A picture with the colours of another: per channel (x - mean) / std · std' + mean', computed where it is read.

    A channel without spread (a grey image) keeps spread 0 and takes the other's mean.
    """

    def __init__(self, picture: Picture, colours: ColourStatistics):
        self._lab = rgb_to_lab(picture.pixels())
        own = colour_statistics(self._lab)
        gain = torch.where(own.std > 0, colours.std / own.std.clamp(min=1e-12), 0)
        self._gain = gain.float()[:, None, None]
        self._offset = (colours.mean - own.mean * gain).float()[:, None, None]
        self.path = picture.path
        (self.height, self.width) = picture.size

    def window(self, rows: slice, columns: slice) -> np.ndarray:
        return lab_to_rgb(self._lab[:, rows, columns] * self._gain + self._offset)

    def pixels(self) -> np.ndarray:
        return self.window(slice(None), slice(None))
