"""The augmentations of CPSL (CVPR 2022): the weak crop, and a strong view of it with the geometry that relates both."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageEnhance, ImageFilter, ImageOps

from common.config import SourceConfig, typed
from common.config.bounds import Interval, Share, Side, Size
from common.data.colour import colour_jitter, from_pillow, to_pillow
from common.data.colour_transfer import (
    ColourStatistics,
    Recoloured,
    colour_statistics,
    rgb_to_lab,
)
from common.data.dataset import SegmentationDataset
from common.data.focus import Focus, draw_until_shown, point_of, take_focus
from common.data.geometry import (
    Geometry,
    cut_maps,
    draw_offset,
    pad,
    pillow,
    pillow_nearest_index,
)
from common.data.images import Picture
from common.data.recipes.recipe import Recipe

_GREY = (127, 127, 127)


@dataclass(frozen=True)
class CPSLViews(Recipe):
    """Load at `base`, resize to a drawn width, crop, mirror; optionally a strong view.

    crop: height, width. base: the size that images are brought to first (height, width; GTA5 and Cityscapes
    1024×2048, SYNTHIA 760×1280); `geometry` counts from it. width, ratio: the drawn width is ⌊U(ratio) · width⌋, the
    height follows the aspect of `base`. Filters are Pillow's bilinear (image) and nearest (labels).
    strong: give `weak` and `strong` in place of `image`, and how they relate: `warp` and `cutout` (see `strong_view`).
    blur, jitter: how probable the two are in the strong view (CPSL's 0.5; ProDA has neither, 0).
    full: also the whole image at `base`, as `full` (the teacher's input).
    colour_from: a source whose images lend their LAB colour statistics, one drawn for each sample (GTA5 takes
    Cityscapes train); in a config also the name of another stream.
    """

    crop: Size = (512, 896)
    base: Size | None = None
    width: Side = 2200
    ratio: Interval = (0.5, 1.5)
    flip: Share = 0.5
    strong: bool = False
    blur: Share = 0.5
    jitter: Share = 0.5
    full: bool = False
    colour_from: Mapping[str, Any] | None = None

    def __post_init__(self):
        if self.colour_from is not None:
            try:
                _ = self._colours  # made now: a missing data set is an error before training
            except ValueError as error:
                raise ValueError(f"colour_from: {error}") from error

    @property
    def gives(self) -> frozenset[str]:
        views = {"weak", "strong", "warp", "cutout"} if self.strong else {"image"}
        return frozenset({*views, *(["full"] if self.full else [])})

    @cached_property
    def reference(self) -> SegmentationDataset:
        """The images of `colour_from`."""
        return SegmentationDataset(
            typed(SourceConfig, {"labels": False, **self.colour_from}, "its section")
        )

    @cached_property
    def _colours(self) -> torch.Tensor:
        """Mean and spread of each image of `reference`, float64 (N, 2, 3); NaN where nobody has looked yet.

        Loader processes share the memory, so an image is looked at once; two that do it at once write the same.
        """
        return torch.full(
            (len(self.reference), 2, 3), torch.nan, dtype=torch.float64
        ).share_memory_()

    def __call__(
        self,
        sample: dict[str, Any],
        rng: np.random.Generator,
        dataset: SegmentationDataset,
        index: int,
    ) -> dict[str, Any]:
        focus = take_focus(sample)
        sample = at_base(sample, self.base)
        picture = sample["image"]
        if self.colour_from is not None:
            picture = Recoloured(
                picture, self._reference_colours(int(rng.integers(len(self.reference))))
            )

        g = self._shown(focus, picture.size, sample.get("label"), rng)
        # a padded crop is mirrored with its padding, so that the mirror is about the crop's middle
        left = bool(g.flip)
        result = cut_maps(sample, g, self.crop, pillow_nearest_index, left)
        if self.full:
            result["full"] = torch.from_numpy(picture.pixels()).permute(2, 0, 1).contiguous()

        weak = pad(
            pillow(picture, g, self.crop, Image.Resampling.BILINEAR), self.crop, left=left
        )
        if not self.strong:
            return {**result, "image": weak}

        return {**result, "weak": weak, **strong_view(weak, rng, self.blur, self.jitter)}

    def _shown(
        self,
        focus: Focus | None,
        size: tuple[int, int],
        label: np.ndarray | None,
        rng: np.random.Generator,
    ) -> Geometry:
        """`draw`, again while the crop shows too little of the class that is in focus."""
        draw = partial(self.draw, size, rng, point_of(focus))
        return draw_until_shown(draw, focus, label, self.crop, pillow_nearest_index)

    def draw(
        self,
        size: tuple[int, int],
        rng: np.random.Generator,
        near: tuple[float, float] | None = None,
    ) -> Geometry:
        """Size, crop and mirror. near: see `draw_offset`."""
        width = int(rng.uniform(*self.ratio) * self.width)
        height = int(width / (size[1] / size[0]))
        y, x = draw_offset((height, width), self.crop, rng, near)
        return Geometry(*size, height, width, y, x, int(rng.random() < self.flip))

    def _reference_colours(self, index: int) -> ColourStatistics:
        known = self._colours[index]
        if known.isnan().any():
            known.copy_(
                torch.stack(
                    colour_statistics(rgb_to_lab(self.reference.open(index)["image"].pixels()))
                )
            )

        return ColourStatistics(*known)


def at_base(sample: Mapping[str, Any], base: tuple[int, int] | None) -> dict[str, Any]:
    """The opened sample with the image, and all maps of the image's size, brought to `base` (height, width)."""
    picture = sample["image"]
    if base is None or picture.size == tuple(base):
        return dict(sample)

    g = Geometry(*picture.size, *base, 0, 0, 0)
    pixels = np.array(
        Image.fromarray(picture.pixels()).resize(base[::-1], Image.Resampling.BILINEAR)
    )
    result = {
        **sample,
        **cut_maps(sample, g, base, pillow_nearest_index),
        "image": Picture.of(pixels),
    }
    del result["geometry"]

    return {
        key: value.numpy() if isinstance(value, torch.Tensor) else value
        for key, value in result.items()
    }


def strong_view(
    weak: torch.Tensor, rng: np.random.Generator, blur: float = 0.5, jitter: float = 0.5
) -> dict[str, torch.Tensor]:
    """Mirror, blur, colour jitter, two random operations of fourteen, cutout of `weak` uint8 (3, H, W).

    blur, jitter: probabilities of these two; the mirror's is 0.5.

    Returns `strong` uint8 (3, H, W); `warp` float32 (3, 3), which takes a position (x, y, 1) of the strong view to
    the weak view, both in pixels with centres at k + ½; `cutout` int32 (4,) = y0, x0, y1, x1 of the grey box in the
    strong view, ends excluded. Where the warp leads outside the weak view, the strong view is grey too.
    """
    height, width = weak.shape[1:]
    image = to_pillow(weak)
    warp = np.eye(3)
    if rng.random() < 0.5:
        image = ImageOps.mirror(image)
        warp = np.array([[-1.0, 0, width], [0, 1, 0], [0, 0, 1]])

    if rng.random() < blur:
        image = image.filter(ImageFilter.GaussianBlur(1))

    if rng.random() < jitter:
        image = colour_jitter(image, rng, 0.4, 0.4)

    image, moved = random_operations(image, rng)
    box = _draw_cutout(height, width, rng)
    # draws its last row and column
    ImageDraw.Draw(image).rectangle((box[1], box[0], box[3], box[2]), fill=_GREY)

    return {
        "strong": from_pillow(image),
        "warp": torch.from_numpy(warp @ moved).float(),
        "cutout": torch.tensor(box, dtype=torch.int32),
    }


def _draw_cutout(
    height: int, width: int, rng: np.random.Generator
) -> tuple[int, int, int, int]:
    side = min(height, width) // 3
    x0 = max(0, int(rng.uniform(0, width) - side / 2))
    y0 = max(0, int(rng.uniform(0, height) - side / 2))
    return y0, x0, min(height, y0 + side), min(width, x0 + side)


def random_operations(
    image: Image.Image, rng: np.random.Generator
) -> tuple[Image.Image, np.ndarray]:
    """Two operations drawn with replacement, each applied with probability 0.5; and their geometry (3, 3), output →
    input. Two geometric ones are composed before the image is resampled, so that no content is lost in between."""
    names = list(COLOUR_OPERATIONS) + list(GEOMETRIC_OPERATIONS)
    total = np.eye(3)
    waiting = False

    for name in rng.choice(names, 2):
        level = int(rng.integers(1, 10))
        sign = 1 if rng.integers(2) else -1
        if rng.random() >= 0.5:
            continue

        if name in GEOMETRIC_OPERATIONS:
            total = total @ GEOMETRIC_OPERATIONS[name](level, sign, image.width, image.height)
            waiting = True
        else:
            image = _resample(image, total) if waiting else image
            waiting = False
            image = COLOUR_OPERATIONS[name](image, level)

    return (_resample(image, total) if waiting else image), total


def _resample(image: Image.Image, matrix: np.ndarray) -> Image.Image:
    data = tuple(matrix[:2].ravel())
    return image.transform(
        image.size, Image.Transform.AFFINE, data, Image.Resampling.BILINEAR, fillcolor=_GREY
    )


def _factor(level: int) -> float:
    return 0.05 + 0.09 * level


COLOUR_OPERATIONS = {
    "identity": lambda image, level: image,
    "autocontrast": lambda image, level: ImageOps.autocontrast(image),
    "equalize": lambda image, level: ImageOps.equalize(image),
    "brightness": lambda image, level: ImageEnhance.Brightness(image).enhance(_factor(level)),
    "color": lambda image, level: ImageEnhance.Color(image).enhance(_factor(level)),
    "contrast": lambda image, level: ImageEnhance.Contrast(image).enhance(_factor(level)),
    "sharpness": lambda image, level: ImageEnhance.Sharpness(image).enhance(_factor(level)),
    "posterize": lambda image, level: ImageOps.posterize(image, 4 + int(0.4 * level)),
    "solarize": lambda image, level: ImageOps.solarize(image, 256 - int(25.6 * level)),
}


def _rotate(level: int, sign: int, width: int, height: int) -> np.ndarray:
    angle = np.deg2rad(3 * level * sign)  # positive: counter-clockwise
    c = np.cos(angle)
    s = np.sin(angle)
    x = width / 2
    y = height / 2

    return np.array([[c, -s, x - c * x + s * y], [s, c, y - s * x - c * y], [0, 0, 1]])


# (level, sign, width, height) → 3×3, output → input, pixel centres at k + ½
GEOMETRIC_OPERATIONS = {
    "rotate": _rotate,
    "shear_x": lambda v, sign, w, h: np.array([[1, sign * 0.03 * v, 0], [0, 1, 0], [0, 0, 1]]),
    "shear_y": lambda v, sign, w, h: np.array([[1, 0, 0], [sign * 0.03 * v, 1, 0], [0, 0, 1]]),
    "translate_x": lambda v, sign, w, h: np.array(
        [[1, 0, sign * int(0.03 * v * w)], [0, 1, 0], [0, 0, 1]]
    ),
    "translate_y": lambda v, sign, w, h: np.array(
        [[1, 0, 0], [0, 1, sign * int(0.03 * v * h)], [0, 0, 1]]
    ),
}
