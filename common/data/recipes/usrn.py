"""The augmentations of USRN (CVPR 2022): labelled images, and two aligned views of unlabelled ones."""

from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from PIL import Image

from common.config.bounds import Interval, Share, Side, Size
from common.data.colour import binomial_blur, colour_jitter, from_pillow, greyscale, to_pillow
from common.data.dataset import SegmentationDataset
from common.data.focus import draw_until_shown, point_of, take_focus
from common.data.geometry import Geometry, cut_maps, draw_offset, pad, pillow
from common.data.recipes.recipe import Recipe


@dataclass(frozen=True)
class USRNViews(Recipe):
    """Resize by the long side, pad, crop, mirror; then colour.

    crop: height, width. base: pixels of the long side at ratio 1 (VOC 400, Cityscapes 2048); the long side is drawn
    from the whole numbers int(base·low) … int(base·high). jitter: colour jitter on every image (labelled Cityscapes).
    views: give `weak` (no colour change) and `strong` (blur, jitter, greyscale) of the same crop in place of `image`.
    Images are resized with Pillow's bicubic filter, labels with OpenCV's nearest rule. Padding lies at the bottom
    and the right, before the crop is mirrored.
    """

    crop: Size
    base: Side
    ratio: Interval = (0.5, 2.0)
    flip: Share = 0.5
    jitter: bool = False
    views: bool = False

    @property
    def gives(self) -> frozenset[str]:
        return frozenset({"weak", "strong"} if self.views else {"image"})

    def __call__(
        self,
        sample: dict[str, Any],
        rng: np.random.Generator,
        dataset: SegmentationDataset,
        index: int,
    ) -> dict[str, Any]:
        size = sample["image"].size
        label = sample.get("label")
        focus = take_focus(sample)
        draw = partial(self.draw, size, rng, point_of(focus))
        g = draw_until_shown(draw, focus, label, self.crop)
        left = bool(g.flip)
        result = cut_maps(sample, g, self.crop, left=left)
        weak = pad(
            pillow(sample["image"], g, self.crop, Image.Resampling.BICUBIC),
            self.crop,
            left=left,
        )
        if self.jitter:
            weak = from_pillow(colour_jitter(to_pillow(weak), rng, 0.4, 0.1))

        if not self.views:
            return {**result, "image": weak}

        strong = binomial_blur(weak) if rng.random() < 0.5 else weak
        image = to_pillow(strong)
        if rng.random() < 0.8:
            image = colour_jitter(image, rng, 0.4, 0.1)

        if rng.random() < 0.2:
            image = greyscale(image)

        return {**result, "weak": weak, "strong": from_pillow(image)}

    def draw(
        self,
        size: tuple[int, int],
        rng: np.random.Generator,
        near: tuple[float, float] | None = None,
    ) -> Geometry:
        """Size, crop and mirror. near: see `draw_offset`."""
        low, high = (int(self.base * r) for r in self.ratio)
        longest = int(rng.integers(low, high + 1))
        shortest = int(min(size) / max(size) * longest + 0.5)
        height, width = (shortest, longest) if size[1] >= size[0] else (longest, shortest)
        y, x = draw_offset((height, width), self.crop, rng, near)

        return Geometry(*size, height, width, y, x, int(rng.random() < self.flip))
