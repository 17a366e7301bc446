"""Augmentations: typed from the `augment` section of a stream, run on opened samples with an explicit generator.

A transform is called as transform(sample, rng, dataset, index). The sample comes from `SegmentationDataset.open`: its
image is decoded only when asked for, and `focus` is there where a sampler wants a class shown. The result is what
training sees (see `SegmentationDataset.sample`).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from common.config import pick, typed
from common.config.bounds import Size
from common.data.dataset import SegmentationDataset
from common.data.focus import take_focus
from common.data.geometry import bilinear, cut_maps, fit, identity
from common.data.recipes.cpsl import CPSLViews
from common.data.recipes.detectron2 import Detectron2
from common.data.recipes.mmseg import MMSeg
from common.data.recipes.recipe import Recipe
from common.data.recipes.u2pl import U2PL
from common.data.recipes.unimatch import UniMatchViews
from common.data.recipes.usrn import USRNViews

Sample = dict[str, Any]


@dataclass(frozen=True)
class Native(Recipe):
    """No augmentation: the image at its own size, or shrunk or enlarged to fit `box` (labels stay as they are)."""

    box: Size | None = None  # height, width

    def __call__(
        self, sample: Sample, rng: np.random.Generator, dataset: SegmentationDataset, index: int
    ) -> Sample:
        take_focus(sample)  # the whole image shows whatever it has
        size = sample["image"].size
        whole = identity(*size)
        height, width = size if self.box is None else fit(size, self.box)
        g = whole._replace(height=height, width=width)
        image = bilinear(sample["image"], g, (g.height, g.width))

        return {**cut_maps(sample, whole, size), "image": image, "geometry": g.array()}


RECIPES: dict[str, type[Recipe]] = {
    "none": Native,
    "mmseg": MMSeg,
    "cpsl": CPSLViews,
    "usrn": USRNViews,
    "unimatch": UniMatchViews,
    "u2pl": U2PL,
    "detectron2": Detectron2,
}


def build_transform(augment: Mapping[str, Any], where: str = "augment") -> Recipe:
    """The transform of an `augment` section: its `recipe` names the pipeline, the other keys are that one's options.

    An empty section is no augmentation. ConfigError (one line) for an unknown recipe, key or type.
    """
    options = dict(augment)
    recipe = options.pop("recipe", "none")
    return typed(pick(RECIPES, recipe, f"{where}.recipe"), options, where)
