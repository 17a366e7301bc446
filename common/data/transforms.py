"""Augmentations: typed from the `augment` section of a stream, run on opened samples with an explicit generator.

A transform is called as transform(sample, rng, dataset, index). The sample comes from `SegmentationDataset.open`: its
image is decoded only when asked for. The result is what training sees (see `SegmentationDataset.sample`).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from common.config import typed
from common.data.colour import photometric_distortion
from common.data.cpsl_views import CPSL
from common.data.detectron2_views import Detectron2
from common.data.geometry import Geometry, bilinear, draw_offset, fit, identity, nearest, pad, warp_maps
from common.data.labels import is_varied
from common.data.segmentation import SegmentationDataset, Transform
from common.data.usrn_views import USRN

Sample = dict[str, Any]


@dataclass(frozen=True)
class Native:
    """No augmentation: the image at its own size, or shrunk or enlarged to fit `box` (labels stay as they are)."""

    box: tuple[int, int] | None = None  # height, width

    def __call__(self, sample: Sample, rng: np.random.Generator, dataset: SegmentationDataset, index: int) -> Sample:
        size = sample["image"].size
        whole = identity(*size)
        height, width = size if self.box is None else fit(size, self.box)
        g = whole._replace(height=height, width=width)
        image = bilinear(sample["image"], g, (g.height, g.width))
        return {**warp_maps(sample, whole, size), "image": image, "geometry": g.array()}


@dataclass(frozen=True)
class MMSeg:
    """MMSegmentation's training pipeline for Cityscapes: ratio resize, crop, flip, photometric distortion, pad.

    crop: height, width. box: the size that ratio 1 stands for (height, width); None: the image's own.
    category_limit: up to ten times a crop is drawn again whose labelled pixels are all one class, or are one class by
    this share or more. full: also the whole image, un-augmented, as `full`.
    """

    crop: tuple[int, int]
    ratio: tuple[float, float] = (0.5, 2.0)
    box: tuple[int, int] | None = None
    category_limit: float = 0.75
    flip: float = 0.5
    photometric: bool = True
    full: bool = False

    def __call__(self, sample: Sample, rng: np.random.Generator, dataset: SegmentationDataset, index: int) -> Sample:
        picture = sample["image"]
        g = self.draw(picture.size, sample.get("label"), rng)
        result = warp_maps(sample, g, self.crop)
        if self.full:  # before the crop is cut: the image is then decoded once
            result["full"] = torch.from_numpy(picture.pixels()).permute(2, 0, 1).contiguous()
        image = bilinear(picture, g, self.crop)
        if self.photometric:
            image = photometric_distortion(image, rng)
        return {**result, "image": pad(image, self.crop)}

    def draw(self, size: tuple[int, int], label: np.ndarray | None, rng: np.random.Generator) -> Geometry:
        """The geometry: size, crop and mirror. Only the label decides which crops are refused."""
        ratio = rng.uniform(*self.ratio)
        box = size if self.box is None else self.box
        height, width = fit(size, (int(box[0] * ratio), int(box[1] * ratio)))
        g = Geometry(*size, height, width, *draw_offset((height, width), self.crop, rng), 0)
        if label is not None and self.category_limit < 1:
            for _ in range(10):
                if is_varied(nearest(label, g, self.crop), self.category_limit):
                    break
                y, x = draw_offset((height, width), self.crop, rng)
                g = g._replace(y=y, x=x)
        return g._replace(flip=int(rng.random() < self.flip))


RECIPES: dict[str, type] = {"none": Native, "mmseg": MMSeg, "cpsl": CPSL, "usrn": USRN, "detectron2": Detectron2}


def build_transform(augment: Mapping[str, Any], where: str = "augment") -> Transform:
    """The transform of an `augment` section: its `recipe` names the pipeline, the other keys are that one's options.

    An empty section is no augmentation. ConfigError (one line) for an unknown recipe, key or type.
    """
    options = dict(augment)
    recipe = options.pop("recipe", "none")
    if recipe not in RECIPES:
        raise ValueError(f"{where}: recipe {recipe!r} is unknown; known: {', '.join(RECIPES)}")
    return typed(RECIPES[recipe], options, where)
