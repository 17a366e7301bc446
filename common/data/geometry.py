"""Resize, crop, mirror and pad as one drawn geometry that serves the image and every map of a sample.

Only the pixels of the crop are computed: each is read through the sampling grid of the whole-image resize.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image

from common.data.images import Picture
from common.data.labels import IGNORE, Colour

MEAN_COLOUR = (124, 116, 104)  # the ImageNet mean, rounded


class Geometry(NamedTuple):
    """original height and width, resized height and width, row and column of the crop in the resized image, mirror."""

    height0: int
    width0: int
    height: int
    width: int
    y: int
    x: int
    flip: int

    def array(self) -> torch.Tensor:
        """int32 (7,), the form in which it travels with the sample."""
        return torch.tensor(self, dtype=torch.int32)

    def extent(self, crop: tuple[int, int]) -> tuple[int, int]:
        """Height and width of the crop before padding: the resized image may be smaller than the crop."""
        return min(crop[0], self.height - self.y), min(crop[1], self.width - self.x)


def identity(height: int, width: int) -> Geometry:
    """The whole image as it is."""
    return Geometry(height, width, height, width, 0, 0, 0)


def fit(size: tuple[int, int], box: tuple[int, int]) -> tuple[int, int]:
    """(height, width) scaled to fit the box, aspect kept: the longer side meets the box's longer side, or the shorter
    the shorter, whichever comes first; rounded half up (MMSegmentation's ratio resize)."""
    scale = min(max(box) / max(size), min(box) / min(size))
    return int(size[0] * scale + 0.5), int(size[1] * scale + 0.5)


def draw_offset(
    size: tuple[int, int],
    crop: tuple[int, int],
    rng: np.random.Generator,
    near: tuple[float, float] | None = None,
) -> tuple[int, int]:
    """A crop's row and column, uniform over all valid positions; 0 where the image is smaller.

    near: a point in shares of height and width; valid are then the positions whose crop contains it.
    """
    if near is None:
        return tuple(
            int(rng.integers(max(side - want, 0) + 1))
            for side, want in zip(size, crop, strict=True)
        )
    return tuple(_offset_near(*axis, rng) for axis in zip(size, crop, near, strict=True))


def _offset_near(side: int, want: int, share: float, rng: np.random.Generator) -> int:
    point = min(int(share * side), side - 1)
    last = max(side - want, 0)
    low = min(max(point - want + 1, 0), last)
    return int(rng.integers(low, min(point, last) + 1))


def nearest_index(size: int, stored: int, start: int, count: int) -> np.ndarray:
    """Source positions of `count` output positions from `start` when `stored` is resized to `size`, int64.

    OpenCV's nearest rule, corner-aligned, in double precision: ⌊i · 1/(size/stored)⌋.
    """
    index = np.floor(np.arange(start, start + count) * (1.0 / (size / stored))).astype(np.int64)
    return np.minimum(index, stored - 1)


def pillow_nearest_index(size: int, stored: int, start: int, count: int) -> np.ndarray:
    """The same by Pillow's nearest rule, centre-aligned: ⌊(i + ½) · stored/size⌋, the steps added up one by one."""
    steps = np.full(start + count, stored / size)
    steps[:1] *= 0.5
    return np.minimum(np.cumsum(steps).astype(np.int64)[start:], stored - 1)


def torch_nearest_index(size: int, stored: int, start: int, count: int) -> np.ndarray:
    """The same by the rule of torch's `interpolate(mode="nearest")` for float64: ⌊i · stored/size⌋, the product rounded
    to single precision before the floor."""
    position = np.arange(start, start + count) * (stored / size)
    return np.minimum(np.floor(position.astype(np.float32)).astype(np.int64), stored - 1)


Rule = Callable[[int, int, int, int], np.ndarray]


def nearest_crop(
    array: np.ndarray, g: Geometry, crop: tuple[int, int], rule: Rule = nearest_index
) -> np.ndarray:
    """The crop (..., h, w) of `array` (..., H, W) under `g`, nearest neighbour; mirrored, not padded."""
    h, w = g.extent(crop)
    rows = rule(g.height, array.shape[-2], g.y, h)
    columns = rule(g.width, array.shape[-1], g.x, w)
    low = columns[0]
    window = array[..., low : columns[-1] + 1].take(rows, axis=-2)

    return window.take(_mirrored(columns - low, g), axis=-1)


def _mirrored(index: np.ndarray, g: Geometry) -> np.ndarray:
    return index[::-1] if g.flip else index


def _linear_index(
    size: int, stored: int, start: int, count: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    position = (np.arange(start, start + count) + 0.5) * (stored / size) - 0.5
    position = np.clip(position, 0, stored - 1)
    low = np.floor(position).astype(np.int64)
    return low, np.minimum(low + 1, stored - 1), (position - low).astype(np.float32)


def bilinear(picture: Picture, g: Geometry, crop: tuple[int, int]) -> torch.Tensor:
    """The crop, uint8 (3, h, w), of the image resized under `g`; mirrored, not padded.

    OpenCV's rule: half-pixel centres, no smoothing when shrinking, rounded to uint8 (within 1 level of OpenCV, whose
    weights have 11 bits).
    """
    h, w = g.extent(crop)
    top, bottom, down = _linear_index(g.height, picture.height, g.y, h)
    left, right, across = _linear_index(g.width, picture.width, g.x, w)
    window = picture.window(
        slice(int(top[0]), int(bottom[-1]) + 1), slice(int(left[0]), int(right[-1]) + 1)
    )
    top, bottom = top - top[0], bottom - top[0]
    left, right, across = (
        _mirrored(index, g) for index in (left - left[0], right - left[0], across)
    )
    down = _weights(down)[:, None, None]
    across = _weights(across)[:, None]
    if (g.height, g.width) == picture.size:
        return _planes(torch.from_numpy(window[top][:, left]))

    # four channels are one 32-bit value: gathering columns of those is fast
    if window.shape[2] == 4:
        packed = window.view(np.uint32)[..., 0]
        part = _float(packed.take(left, 1), window).lerp_(
            _float(packed.take(right, 1), window), across
        )
        low, high = (part.index_select(0, torch.from_numpy(index)) for index in (top, bottom))
        part = low.lerp_(high, down)
    else:
        part = _float(window[top], window).lerp_(_float(window[bottom], window), down)
        low, high = (
            part.index_select(1, torch.from_numpy(index))
            for index in (left.copy(), right.copy())
        )
        part = low.lerp_(high, across)

    return _planes(part.add_(0.5).int().byte())  # float → uint8 at once is slower


def _float(pixels: np.ndarray, like: np.ndarray) -> torch.Tensor:
    """Gathered pixels, packed or not, as float (h, w, channels of `like`)."""
    return torch.from_numpy(
        pixels.view(np.uint8).reshape(*pixels.shape[:2], like.shape[2])
    ).float()


def _weights(values: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(values))


def _planes(pixels: torch.Tensor) -> torch.Tensor:
    return pixels.permute(2, 0, 1)[:3].contiguous()


def pillow(
    picture: Picture, g: Geometry, crop: tuple[int, int], kernel: Image.Resampling
) -> torch.Tensor:
    """As `bilinear`, with one of Pillow's antialiased filters: the crop of the image that Pillow would resize whole.

    Equal but for roundings (2 levels at most): Pillow keeps the edges of a crop in single precision.
    """
    h, w = g.extent(crop)
    # the filter's radius in source pixels, and one
    reach = 3 if kernel == Image.Resampling.BICUBIC else 2
    rows, top, bottom = _span(g.y, h, picture.height / g.height, picture.height, reach)
    columns, left, right = _span(g.x, w, picture.width / g.width, picture.width, reach)
    window = np.ascontiguousarray(picture.window(rows, columns))
    mode = "RGBX" if window.shape[2] == 4 else "RGB"
    image = Image.frombuffer(
        mode, (window.shape[1], window.shape[0]), window, "raw", mode, 0, 1
    )
    image = image.resize((w, image.height), kernel, box=(left, 0, right, image.height))
    # some releases of Pillow begin here
    resized = np.asarray(image.resize((w, h), kernel, box=(0, top, w, bottom)))

    return _planes(torch.from_numpy(resized[:, ::-1].copy() if g.flip else resized.copy()))


def pillow_exact(
    picture: Picture, g: Geometry, crop: tuple[int, int], kernel: Image.Resampling
) -> torch.Tensor:
    """As `pillow`, but equal bit for bit to the crop of the whole image that Pillow resized, columns before rows.

    Pillow's two passes do not mix rows (the first) or columns (the second): the first runs on the rows that the crop
    needs, the second on the crop's columns, both over their whole length.
    """
    h, w = g.extent(crop)
    rows, *_ = _span(g.y, h, picture.height / g.height, picture.height, 3)
    window = np.ascontiguousarray(picture.window(rows, slice(0, picture.width)))
    mode = "RGBX" if window.shape[2] == 4 else "RGB"
    image = Image.frombuffer(
        mode, (window.shape[1], window.shape[0]), window, "raw", mode, 0, 1
    )
    image = image.resize((g.width, image.height), kernel).crop((g.x, 0, g.x + w, image.height))
    if picture.height != g.height:
        whole = Image.new(mode, (w, picture.height))
        whole.paste(image, (0, rows.start))
        image = whole.resize((w, g.height), kernel).crop((0, g.y, w, g.y + h))
    else:
        image = image.crop((0, g.y - rows.start, w, g.y - rows.start + h))

    pixels = np.asarray(image)

    return _planes(torch.from_numpy(pixels[:, ::-1].copy() if g.flip else pixels.copy()))


def _span(
    start: int, count: int, scale: float, stored: int, reach: int
) -> tuple[slice, float, float]:
    """Source positions that `count` output positions from `start` need, and where those begin and end within."""
    low = start * scale
    high = min((start + count) * scale, stored)
    margin = reach * max(scale, 1)
    first = max(int(low - margin), 0)
    last = min(int(high + margin) + 1, stored)

    return slice(first, last), low - first, high - first


def pad(
    image: torch.Tensor, crop: tuple[int, int], fill: Colour = MEAN_COLOUR, left: bool = False
) -> torch.Tensor:
    """uint8 (3, h, w) → (3, *crop), padded at the bottom and the right (or left) with a colour.

    What the network sees there is the recipe's: USRN's release pads with the rounded mean before the colours change,
    detectron2 with grey; MMSegmentation's 0 after normalisation needs the sample's `extent`.
    """
    if image.shape[1:] == tuple(crop):
        return image

    padded = torch.tensor(fill, dtype=torch.uint8)[:, None, None].repeat(1, *crop)
    x = crop[1] - image.shape[2] if left else 0
    padded[:, : image.shape[1], x : x + image.shape[2]] = image

    return padded


def cut_maps(
    sample: Mapping[str, Any],
    g: Geometry,
    crop: tuple[int, int],
    rule: Rule = nearest_index,
    left: bool = False,
) -> dict[str, Any]:
    """Every array of the sample but the image, under `g`; padded with IGNORE (whole numbers) or 0 (others).

    An array at a stride of its own stays whole: `geometry` tells the device how to cut it.
    """
    result = {"geometry": g.array()}
    for key, value in sample.items():
        if key == "image":
            continue
        if isinstance(value, np.ndarray):
            if value.shape[-2:] == (g.height0, g.width0):
                value = _pad_map(nearest_crop(value, g, crop, rule), crop, left)
            value = torch.from_numpy(value)

        result[key] = value

    return result


def _pad_map(array: np.ndarray, crop: tuple[int, int], left: bool) -> np.ndarray:
    h, w = array.shape[-2:]
    if (h, w) == tuple(crop):
        return array

    padded = np.full(
        (*array.shape[:-2], *crop), IGNORE if array.dtype.kind == "i" else 0, array.dtype
    )
    x = crop[1] - w if left else 0
    padded[..., :h, x : x + w] = array

    return padded
