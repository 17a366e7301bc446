"""The augmentations of detectron2's semantic mapper, as the LTSS benchmark (TMM 2024) trains Mask2Former and
DeepLabV3+ with it, and its Copy-Paste."""

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import numpy as np
import torch
from PIL import Image

from common.config.bounds import AtLeast, Share, Side, Size
from common.data.catalogue.row import DatasetRow
from common.data.colour import photometric_distortion
from common.data.dataset import SegmentationDataset
from common.data.focus import draw_until_shown, point_of, take_focus
from common.data.geometry import (
    Geometry,
    cut_maps,
    draw_offset,
    nearest_crop,
    pad,
    pillow_exact,
    torch_nearest_index,
)
from common.data.imbalance import GROUPS, groups
from common.data.labels import IGNORE, is_varied
from common.data.recipes.copy_paste import choose_random, choose_rare, classes_of, paste
from common.data.recipes.recipe import Recipe
from common.data.statistics import class_statistics

_GREY = (128, 128, 128)


@dataclass(frozen=True)
class Detectron2(Recipe):
    """Resize by the short side, crop, colour, mirror, pad; then perhaps Copy-Paste.

    crop: height, width. short_edges: the sizes that the short side is drawn from; empty: int(0.1 · x · c), x = 5 … 20,
    c the crop's shorter side. max_size: the longest side after resizing. category_limit: below 1, up to ten crops are
    drawn until one has several classes and none with this share or more of the labelled pixels.
    Images are resized with Pillow's bilinear filter, labels with torch's nearest rule. A mirrored label exchanges the
    row's `flip_pairs`. Padding is grey, at the bottom and the right, after the mirror.
    copy_paste: paste classes of a second image, drawn from the whole set and augmented by itself: `random` ones, at
    most copy_paste_max − 1 and never all of its crop, or all `rare` ones: those of rare_classes, else the rare classes
    of the row at image level, else those by the set's own image counts. `for_dataset` has to choose these first.
    """

    crop: Size
    short_edges: tuple[Side, ...] = ()
    max_size: Side = 1333
    category_limit: Share = 1.0
    colour: bool = True
    flip: Share = 0.5
    copy_paste: Literal["none", "random", "rare"] = "none"
    copy_paste_max: Annotated[int, AtLeast(2)] = 100  # of 1, nothing would ever be pasted
    rare_classes: tuple[int, ...] = ()

    def for_dataset(
        self,
        dataset: SegmentationDataset,
        workers: int = 0,
        cache: Path | None = None,
        where: str = "augment",
    ) -> Self:
        """The recipe with the rare classes of its Copy-Paste chosen; labels are counted (see `class_statistics`) only
        where neither the config nor the row names them. ValueError for a set without labels or without such classes."""
        row = dataset.row
        if self.copy_paste != "none" and not dataset.source.labels:
            raise ValueError(
                f"{where}.copy_paste {self.copy_paste!r} needs labels, but this stream of data set {row.name!r} has "
                "`labels: false`; set copy_paste to none"
            )

        wrong = [k for k in self.rare_classes if not 0 <= k < row.num_classes]
        if wrong:
            raise ValueError(
                f"{where}.rare_classes: {wrong[0]} is none of the {row.num_classes} classes of data set {row.name!r}, "
                "whose ids count from 0; correct it"
            )
        if self.copy_paste != "rare" or self.rare_classes:
            return self

        if row.groups is not None:
            rare = [group == "rare" for group in row.groups["image"]]
        else:
            count = class_statistics(dataset, workers, cache).image_count
            rare = groups(count) == GROUPS.index("rare")

        if not any(rare):
            raise ValueError(
                f"{where}.copy_paste 'rare': no class that data set {row.name!r} shows is rare by its image counts; "
                "give rare_classes (ids)"
            )

        return replace(self, rare_classes=tuple(np.flatnonzero(rare).tolist()))

    def __call__(
        self,
        sample: dict[str, Any],
        rng: np.random.Generator,
        dataset: SegmentationDataset,
        index: int,
    ) -> dict[str, Any]:
        focus = sample.get("focus")
        (child,) = rng.spawn(1)  # the target is augmented alike with and without Copy-Paste
        target = self._augment(sample, rng, dataset.row)
        if self.copy_paste == "none":
            return target

        source = self._augment(
            dataset.open(int(child.integers(len(dataset)))), child, dataset.row
        )

        chosen = self._chosen(classes_of(source["label"]), child)
        # what the sampler drew the crop for stays in it
        spared = () if focus is None else with_partners(focus.class_id, dataset.row.flip_pairs)
        return paste(target, source, chosen, spared)

    def _augment(
        self, sample: dict[str, Any], rng: np.random.Generator, row: DatasetRow
    ) -> dict[str, Any]:
        picture = sample["image"]
        label = sample.get("label")
        focus = take_focus(sample)
        draw = partial(self.draw, picture.size, label, rng, point_of(focus))
        g = draw_until_shown(draw, focus, label, self.crop, torch_nearest_index)
        image = pillow_exact(picture, g, self.crop, Image.Resampling.BILINEAR)
        if self.colour:
            image = photometric_distortion(image, rng, hue_high=18)

        g = g._replace(flip=int(rng.random() < self.flip))
        result = cut_maps(sample, g, self.crop, torch_nearest_index)
        if g.flip:
            image = image.flip(-1)
            if row.flip_pairs and "label" in result:
                result["label"] = exchanged(result["label"], row.flip_pairs, row.num_classes)

        return {**result, "image": pad(image, self.crop, _GREY)}

    def draw(
        self,
        size: tuple[int, int],
        label: np.ndarray | None,
        rng: np.random.Generator,
        near: tuple[float, float] | None = None,
    ) -> Geometry:
        """Size and crop, not yet the mirror. near: see `draw_offset`."""
        height, width = self.resized(size, int(rng.choice(self.choices)))
        g = Geometry(*size, height, width, 0, 0, 0)
        checked = label is not None and self.category_limit < 1

        for _ in range(10 if checked else 1):
            y, x = draw_offset((height, width), self.crop, rng, near)
            g = g._replace(y=y, x=x)
            if checked and is_varied(
                nearest_crop(label, g, self.crop, torch_nearest_index), self.category_limit
            ):
                break

        return g

    @property
    def choices(self) -> tuple[int, ...]:
        """The sizes that the short side is drawn from."""
        return self.short_edges or tuple(int(0.1 * x * min(self.crop)) for x in range(5, 21))

    def resized(self, size: tuple[int, int], short: int) -> tuple[int, int]:
        """Height and width: the short side becomes `short`, or less where the long side would exceed `max_size`; each
        is rounded half up once at the end."""
        scale = short / min(size)
        height, width = (
            (short, scale * size[1]) if size[0] < size[1] else (scale * size[0], short)
        )
        shrink = min(1.0, self.max_size / max(height, width))
        return int(height * shrink + 0.5), int(width * shrink + 0.5)

    def _chosen(self, present: list[int], rng: np.random.Generator) -> list[int]:
        """Which of the classes of the source crop are pasted."""
        if self.copy_paste == "random":
            return choose_random(present, self.copy_paste_max, rng)
        assert self.rare_classes, "for_dataset has to choose the rare classes first"
        return choose_rare(present, self.rare_classes)


def with_partners(klass: int, pairs: tuple[tuple[int, int], ...]) -> tuple[int, ...]:
    """A class, and the one that it becomes where an image is mirrored."""
    return (
        klass,
        *(other for pair in pairs if klass in pair for other in pair if other != klass),
    )


def exchanged(
    label: torch.Tensor, pairs: tuple[tuple[int, int], ...], num_classes: int
) -> torch.Tensor:
    """`label` (H, W) with the two classes of each pair in each other's place; IGNORE stays."""
    table = torch.arange(num_classes + 1, dtype=label.dtype)
    table[num_classes] = IGNORE  # the last entry, where the index -1 leads

    for left, right in pairs:
        table[left] = right
        table[right] = left

    return table[label.long()]
