"""Colour augmentations on uint8 images: photometric distortion (SSD's, as MMSegmentation and detectron2 have it),
torchvision's colour jitter with an explicit generator, and blur."""

import numpy as np
import torch
from PIL import Image, ImageEnhance

_ROWS = 64  # rows at a time in the HSV round trip


def photometric_distortion(
    image: torch.Tensor, rng: np.random.Generator, hue_high: int = 17
) -> torch.Tensor:
    """Brightness, contrast, saturation and hue, each with probability 0.5; contrast before or after the other two.

    image: uint8 (3, H, W), RGB; a new tensor is returned. Brightness adds U(-32, 32); contrast multiplies by
    U(0.5, 1.5); saturation multiplies S by U(0.5, 1.5); hue adds a whole number in [-18, hue_high] modulo 180
    (MMSegmentation: 17, detectron2: 18). Values are clipped and truncated to uint8 after each of the first three;
    saturation and hue make an 8-bit HSV round trip each.
    """
    table = np.arange(256, dtype=np.uint8)
    if rng.integers(2):
        table = _truncate(table + np.float32(rng.uniform(-32, 32)))

    contrast_first = bool(rng.integers(2))
    if contrast_first:
        table = _contrast(table, rng)

    image = _look_up(image, table)
    if rng.integers(2):
        image = shift_hsv(image, saturation=float(rng.uniform(0.5, 1.5)))

    if rng.integers(2):
        image = shift_hsv(image, hue=int(rng.integers(-18, hue_high + 1)))

    if not contrast_first:
        image = _look_up(image, _contrast(np.arange(256, dtype=np.uint8), rng))

    return image


def _truncate(values: np.ndarray) -> np.ndarray:
    return np.clip(values, 0, 255).astype(np.uint8)


def _contrast(table: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return _truncate(table * np.float32(rng.uniform(0.5, 1.5))) if rng.integers(2) else table


def _look_up(image: torch.Tensor, table: np.ndarray) -> torch.Tensor:
    if np.array_equal(table, np.arange(256)):
        return image
    data = bytearray(image.contiguous().numpy()).translate(table.tobytes())
    return torch.frombuffer(data, dtype=torch.uint8).view(image.shape)


def shift_hsv(image: torch.Tensor, saturation: float = 1.0, hue: int = 0) -> torch.Tensor:
    """One round trip through 8-bit HSV with S scaled and H (degrees/2) shifted by -30 … 30; uint8 (3, H, W)."""
    result = torch.empty_like(image)
    for start in range(0, image.shape[1], _ROWS):
        rows = slice(start, start + _ROWS)
        h, s, v = rgb_to_hsv(image[:, rows].float())
        if saturation != 1.0:
            s = s.mul_(saturation).clamp_(0, 255).floor_()

        result[:, rows] = hsv_to_rgb(h.add_(hue), s, v)

    return result


def rgb_to_hsv(rgb: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """float (3, h, w) of whole numbers 0–255 → H (degrees/2, -30 … 150), S, V (0–255), rounded as in 8-bit OpenCV
    (within 1, H modulo 180)."""
    r, g, b = rgb
    value = torch.maximum(torch.maximum(r, g), b)
    span = value - torch.minimum(torch.minimum(r, g), b)
    scale = 30 / span.clamp(min=1)
    red = (g - b).mul_(scale)
    green = (b - r).mul_(scale).add_(60)
    blue = (r - g).mul_(scale).add_(120)
    # torch.where and == are several times slower than this: 1 where the channel is the largest, else 0
    is_red, is_green = ((channel - value).add_(1).clamp_(min=0) for channel in (r, g))
    hue = blue.lerp_(green, is_green).lerp_(red, is_red).round_()

    return hue, span.mul_(255).div_(value.clamp(min=1)).round_(), value


def hsv_to_rgb(
    hue: torch.Tensor, saturation: torch.Tensor, value: torch.Tensor
) -> torch.Tensor:
    """The inverse: float H (degrees/2, -60 … 180), S, V → uint8 (3, h, w), truncated as OpenCV does.

    Channel c is V·(1 - S·clamp(2 - d, 0, 1)), d the distance on the circle of six sectors from the hue h' opposite to
    c. Without a modulo: clamp(2 - d, 0, 1) = clamp(||h - h'| - 3|, 1, 2) - 1.
    """
    sector = hue / 30
    drop = (value * saturation).mul_(-1 / 255)
    base = (value - drop).add_(1e-4)  # whole numbers must survive the truncation
    result = torch.empty((3, *hue.shape), dtype=torch.uint8)

    for channel, opposite in enumerate((3, 5, 1)):
        share = (sector - opposite).abs_().sub_(3).abs_().clamp_(1, 2)
        # float → uint8 at once is slower
        result[channel] = torch.addcmul(base, share, drop).int()

    return result


def to_pillow(image: torch.Tensor) -> Image.Image:
    """uint8 (3, H, W) → a Pillow RGB image."""
    return Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())


def from_pillow(image: Image.Image) -> torch.Tensor:
    """A Pillow RGB image → uint8 (3, H, W)."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


def colour_jitter(
    image: Image.Image, rng: np.random.Generator, strength: float, hue: float
) -> Image.Image:
    """Brightness, contrast and saturation by factors U(1 - strength, 1 + strength), hue by U(-hue, hue), in random
    order: torchvision's ColorJitter on Pillow images."""
    brightness, contrast, saturation = rng.uniform(1 - strength, 1 + strength, 3)
    steps = (
        lambda x: ImageEnhance.Brightness(x).enhance(brightness),
        lambda x: ImageEnhance.Contrast(x).enhance(contrast),
        lambda x: ImageEnhance.Color(x).enhance(saturation),
        lambda x: shift_hue(x, shift),
    )
    shift = rng.uniform(-hue, hue)

    for k in rng.permutation(4):
        image = steps[k](image)

    return image


def shift_hue(image: Image.Image, turns: float) -> Image.Image:
    """The hue of an RGB image moved around its circle, in whole 255ths, as torchvision does it."""
    hue, saturation, value = image.convert("HSV").split()
    steps = int(turns * 255)
    moved = hue.point(lambda level: (level + steps) % 256)

    return Image.merge("HSV", (moved, saturation, value)).convert("RGB")


def greyscale(image: Image.Image) -> Image.Image:
    """An RGB image without its colours, still of three channels."""
    return image.convert("L").convert("RGB")


def binomial_blur(image: torch.Tensor) -> torch.Tensor:
    """5×5 blur with taps (1, 4, 6, 4, 1)/16 per axis, edges mirrored without repeating, rounded half up.

    uint8 (3, H, W) with H, W ≥ 3. This is OpenCV's Gaussian of size 5 with sigma 0.
    """
    for axis in (1, 2):
        if image.dtype == torch.uint8:
            image = image.to(torch.int32)

        n = image.shape[axis]
        index = torch.arange(-2, n + 2).abs()
        padded = image.index_select(axis, torch.where(index >= n, 2 * (n - 1) - index, index))
        a, b, c, d, e = (padded.narrow(axis, k, n) for k in range(5))
        image = a + e + 4 * (b + d) + 6 * c

    return (image + 128 >> 8).to(torch.uint8)
