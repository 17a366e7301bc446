"""The augmentations of UniMatch (CVPR 2023) and UniMatch V2: labelled images, and a weak and one or two strong views of
unlabelled ones, with the boxes of their CutMix."""

import math
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image, ImageFilter
from torch import Tensor

from common.config.bounds import Interval, Share, Size
from common.data.colour import colour_jitter, from_pillow, greyscale, to_pillow
from common.data.dataset import SegmentationDataset
from common.data.focus import draw_until_shown, point_of, take_focus
from common.data.geometry import (
    Geometry,
    cut_maps,
    draw_offset,
    pad,
    pillow,
    pillow_nearest_index,
)
from common.data.recipes.recipe import Recipe

BLACK = (0, 0, 0)
AREA = (0.02, 0.4)  # of a CutMix box, as a share of the crop
ASPECT = (0.3, 1 / 0.3)  # its height over its width
LONGEST = 15  # long over short side of a crop that can hold, at one of these aspects, a box of about the mean area
TRIES = 10_000  # per area; a crop up to four times as long as wide needs fewer, but for a chance below 1e-39


@dataclass(frozen=True)
class UniMatchViews(Recipe):
    """Resize by the long side, pad with black, crop, mirror; then colour, for strong views.

    crop: height, width. ratio: the long side is drawn from the whole numbers int(low·L) … int(high·L), L the image's
    own. Images are resized with Pillow's bilinear filter, labels with its nearest rule.

    views: 0 gives a labelled sample, `image`. 1 or 2 gives `weak` (no colour change), `strong1`, `strong2` of the same
    crop, `shown` (bool: the image, not padding), and for each strong view the box of CutMix, `box1`, `box2`, int32 (4,)
    = top, left, bottom, right; without area where nothing is pasted.
    partner: what is pasted comes from a second crop of the same image, as in UniMatch: the views and `shown` of that
    one are there, too, as `partner_weak` and so on.
    """

    crop: Size
    ratio: Interval = (0.5, 2.0)
    flip: Share = 0.5
    views: Literal[0, 1, 2] = 0
    partner: bool = False

    def __post_init__(self):
        if self.partner and not self.views:
            raise ValueError("partner: true needs views of 1 or 2")
        if self.views and max(self.crop) > LONGEST * min(self.crop):
            raise ValueError(
                f"crop: {list(self.crop)} is too long for CutMix's boxes; its sides may differ by a factor of {LONGEST}"
            )

    @property
    def gives(self) -> frozenset[str]:
        if not self.views:
            return frozenset({"image"})

        numbers = range(1, self.views + 1)
        looks = {"weak", "shown", *(f"strong{k}" for k in numbers)}
        partner = {f"partner_{key}" for key in looks} if self.partner else set()

        return frozenset(looks | partner | {f"box{k}" for k in numbers})

    def __call__(
        self,
        sample: dict[str, Any],
        rng: np.random.Generator,
        dataset: SegmentationDataset,
        index: int,
    ) -> dict[str, Any]:
        focus = take_focus(sample)
        draw = partial(self.draw, sample["image"].size, rng, point_of(focus))
        g = draw_until_shown(draw, focus, sample.get("label"), self.crop, pillow_nearest_index)
        result = cut_maps(sample, g, self.crop, pillow_nearest_index, left=bool(g.flip))
        weak = self.cut(sample, g)
        if not self.views:
            return {**result, "image": weak}

        result |= self.look(weak, g, rng)

        for view in range(1, self.views + 1):
            result[f"box{view}"] = torch.tensor(draw_box(self.crop, rng), dtype=torch.int32)

        if self.partner:
            second = draw()
            views = self.look(self.cut(sample, second), second, rng)
            result |= {f"partner_{key}": value for key, value in views.items()}

        return result

    def draw(
        self,
        size: tuple[int, int],
        rng: np.random.Generator,
        near: tuple[float, float] | None = None,
    ) -> Geometry:
        """Size, crop and mirror. near: see `draw_offset`."""
        low, high = (int(max(size) * ratio) for ratio in self.ratio)
        longest = int(rng.integers(low, high + 1))
        shortest = max(int(min(size) * longest / max(size) + 0.5), 1)
        resized = (shortest, longest) if size[1] >= size[0] else (longest, shortest)
        offset = draw_offset(resized, self.crop, rng, near)

        return Geometry(*size, *resized, *offset, int(rng.random() < self.flip))

    def cut(self, sample: dict[str, Any], g: Geometry) -> Tensor:
        """The crop, uint8 (3, *crop)."""
        image = pillow(sample["image"], g, self.crop, Image.Resampling.BILINEAR)
        return pad(image, self.crop, BLACK, left=bool(g.flip))

    def look(self, weak: Tensor, g: Geometry, rng: np.random.Generator) -> dict[str, Tensor]:
        """The views of a crop."""
        views = {"weak": weak, "shown": shown(g, self.crop)}
        for view in range(1, self.views + 1):
            views[f"strong{view}"] = from_pillow(strong(to_pillow(weak), rng))

        return views


def shown(g: Geometry, crop: tuple[int, int]) -> Tensor:
    """Which pixels of a crop show the image, bool (*crop); the others are padding."""
    height, width = g.extent(crop)
    inside = torch.zeros(crop, dtype=torch.bool)
    inside[:height, :width] = True
    return inside.flip(1) if g.flip else inside


def strong(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Colour jitter (p 0.8), greyscale (p 0.2), Gaussian blur of radius U(0.1, 2) (p 0.5), in this order."""
    if rng.random() < 0.8:
        image = colour_jitter(image, rng, 0.5, 0.25)

    if rng.random() < 0.2:
        image = greyscale(image)

    if rng.random() < 0.5:
        image = image.filter(ImageFilter.GaussianBlur(rng.uniform(0.1, 2.0)))

    return image


def draw_box(crop: tuple[int, int], rng: np.random.Generator) -> tuple[int, int, int, int]:
    """A CutMix box, top, left, bottom, right: with probability ½ none (0, 0, 0, 0).

    The area is drawn once, the aspect and the corner until the box lies in the crop. In a long crop a large area may
    have no place at any aspect: after `TRIES` another area is drawn.
    """
    if rng.random() < 0.5:
        return 0, 0, 0, 0

    height, width = crop

    while True:
        area = rng.uniform(*AREA) * height * width
        for _ in range(TRIES):
            aspect = rng.uniform(*ASPECT)
            tall = int(math.sqrt(area * aspect))
            wide = int(math.sqrt(area / aspect))
            top = int(rng.integers(height))
            left = int(rng.integers(width))
            if top + tall <= height and left + wide <= width:
                return top, left, top + tall, left + wide
