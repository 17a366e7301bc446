"""The augmentation of U2PL (CVPR 2022), which is the same for labelled and unlabelled images."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from common.config.bounds import Interval, Share, Size, Whole
from common.data.dataset import SegmentationDataset
from common.data.focus import draw_until_shown, point_of, take_focus
from common.data.geometry import MEAN_COLOUR, Geometry, bilinear, cut_maps, draw_offset
from common.data.labels import IGNORE
from common.data.recipes.recipe import Recipe


@dataclass(frozen=True)
class U2PL(Recipe):
    """Resize, mirror, pad around with the mean colour, crop.

    crop: height, width. ratio: one time in two the image shrinks, by a factor between `ratio[0]` and 1, else it grows,
    by one up to `ratio[1]`. padded_label: the class of padding; None: it has none (the release: 0, which is road or
    background). `shown`, bool (*crop), tells the image from padding.
    """

    crop: Size
    ratio: Interval = (0.5, 2.0)
    flip: Share = 0.5
    padded_label: Whole | None = None

    def __post_init__(self):
        low, high = self.ratio
        if not low <= 1 <= high:
            raise ValueError(f"ratio: [{low}, {high}] does not hold 1; give one that does")

    @property
    def gives(self) -> frozenset[str]:
        return frozenset({"image", "shown"})

    def for_dataset(
        self,
        dataset: SegmentationDataset,
        workers: int = 0,
        cache: Path | None = None,
        where: str = "augment",
    ) -> Self:
        """`Recipe.for_dataset`; ValueError for padding of a class that the set does not have."""
        if self.padded_label is not None and self.padded_label >= dataset.row.num_classes:
            raise ValueError(
                f"{where}.padded_label: {self.padded_label}, but {dataset.row.name!r} has classes 0 to "
                f"{dataset.row.num_classes - 1}"
            )
        return super().for_dataset(dataset, workers, cache, where)

    def __call__(
        self,
        sample: dict[str, Any],
        rng: np.random.Generator,
        dataset: SegmentationDataset,
        index: int,
    ) -> dict[str, Any]:
        focus = take_focus(sample)
        draw = partial(self.draw, sample["image"].size, rng, point_of(focus))
        g = draw_until_shown(draw, focus, sample.get("label"), self.crop)
        extent = g.extent(self.crop)

        label = IGNORE if self.padded_label is None else self.padded_label
        result = cut_maps(sample, g, extent)
        for key, value in result.items():
            if isinstance(value, Tensor) and tuple(value.shape[-2:]) == extent:
                result[key] = centred(value, self.crop, label if key == "label" else IGNORE)

        image = bilinear(sample["image"], g, extent)
        mean = torch.tensor(MEAN_COLOUR, dtype=torch.uint8)[:, None, None]
        shown = torch.ones(extent, dtype=torch.bool)

        return {
            **result,
            "image": centred(image, self.crop, mean),
            "shown": centred(shown, self.crop, False),
        }

    def draw(
        self,
        size: tuple[int, int],
        rng: np.random.Generator,
        near: tuple[float, float] | None = None,
    ) -> Geometry:
        """Size, crop and mirror. near: see `draw_offset`."""
        low, high = self.ratio
        factor = rng.uniform(low, 1) if rng.random() < 0.5 else rng.uniform(1, high)
        resized = tuple(max(int(side * factor), 1) for side in size)
        offset = draw_offset(resized, self.crop, rng, near)

        return Geometry(*size, *resized, *offset, int(rng.random() < self.flip))


def centred(values: Tensor, size: tuple[int, int], fill: Tensor | float) -> Tensor:
    """Maps (…, h, w) in the middle of maps (…, *size) of `fill`; an odd row or column is at the bottom or the right."""
    height, width = values.shape[-2:]
    if (height, width) == tuple(size):
        return values

    padded = values.new_empty((*values.shape[:-2], *size))
    padded[...] = fill
    top = (size[0] - height) // 2
    left = (size[1] - width) // 2
    padded[..., top : top + height, left : left + width] = values

    return padded
