"""MMSegmentation's augmentation, as BLV trains with it."""

from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

from common.config.bounds import Interval, Share, Size
from common.data.colour import photometric_distortion
from common.data.dataset import SegmentationDataset
from common.data.focus import draw_until_shown, point_of, take_focus
from common.data.geometry import (
    Geometry,
    bilinear,
    cut_maps,
    draw_offset,
    fit,
    nearest_crop,
    pad,
)
from common.data.labels import is_varied
from common.data.recipes.recipe import Recipe

Sample = dict[str, Any]


@dataclass(frozen=True)
class MMSeg(Recipe):
    """MMSegmentation's training pipeline for Cityscapes: ratio resize, crop, flip, photometric distortion, pad.

    crop: height, width. box: the size that ratio 1 stands for (height, width); None: the image's own.
    category_limit: up to ten times a crop is drawn again whose labelled pixels are all one class, or are one class by
    this share or more. full: also the whole image, un-augmented, as `full`.
    `extent`, int32 (2,), is the height and width of the image within the crop: the network takes what lies beyond for
    0 after normalisation, as MMSegmentation pads, where the mean colour of 8 bits is up to 0.01 off.
    """

    crop: Size
    ratio: Interval = (0.5, 2.0)
    box: Size | None = None
    category_limit: Share = 0.75
    flip: Share = 0.5
    photometric: bool = True
    full: bool = False

    @property
    def gives(self) -> frozenset[str]:
        return frozenset({"image", "extent", *(["full"] if self.full else [])})

    def __call__(
        self, sample: Sample, rng: np.random.Generator, dataset: SegmentationDataset, index: int
    ) -> Sample:
        picture = sample["image"]
        label = sample.get("label")
        focus = take_focus(sample)
        draw = partial(self.draw, picture.size, label, rng, point_of(focus))
        g = draw_until_shown(draw, focus, label, self.crop)
        result = cut_maps(sample, g, self.crop)
        if self.full:  # before the crop is cut: the image is then decoded once
            result["full"] = torch.from_numpy(picture.pixels()).permute(2, 0, 1).contiguous()

        image = bilinear(picture, g, self.crop)
        if self.photometric:
            image = photometric_distortion(image, rng)

        extent = torch.tensor(g.extent(self.crop), dtype=torch.int32)

        return {**result, "image": pad(image, self.crop), "extent": extent}

    def draw(
        self,
        size: tuple[int, int],
        label: np.ndarray | None,
        rng: np.random.Generator,
        near: tuple[float, float] | None = None,
    ) -> Geometry:
        """The geometry: size, crop and mirror. Only the label decides which crops are refused. near: see
        `draw_offset`."""
        ratio = rng.uniform(*self.ratio)
        box = size if self.box is None else self.box
        height, width = fit(size, (int(box[0] * ratio), int(box[1] * ratio)))
        g = Geometry(
            *size, height, width, *draw_offset((height, width), self.crop, rng, near), 0
        )
        if label is not None and self.category_limit < 1:
            for _ in range(10):
                if is_varied(nearest_crop(label, g, self.crop), self.category_limit):
                    break
                y, x = draw_offset((height, width), self.crop, rng, near)
                g = g._replace(y=y, x=x)

        return g._replace(flip=int(rng.random() < self.flip))
