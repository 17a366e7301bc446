"""Orders of a stream: which image a draw shows and, where an order is about classes, what its crop is to show.

Both are pure functions of the draw (and of seed and stream), so that a stream has no other state than its next draw.
"""

import warnings
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from common.config import ConfigError
from common.config.bounds import Count, NotNegative, Positive, Share
from common.data.dataset import SegmentationDataset
from common.data.focus import Focus
from common.data.reservoir import ClassPixels, class_pixels
from common.data.statistics import Statistics, class_statistics, repeat_factors

MIN_SHARE = 0.0057  # of the pixels: what DAFormer asks of a crop, 1500 of 512²


def generator(seed: int, stream: str, purpose: str, number: int) -> np.random.Generator:
    """The random generator of one purpose: `number` is a draw or an epoch."""
    return np.random.default_rng(
        (seed, zlib.crc32(stream.encode()), zlib.crc32(purpose.encode()), number)
    )


class Order:
    """draw → index of the dataset. Epoch e is a permutation of the whole set, or the set in order."""

    def __init__(self, size: int, seed: int, stream: str, shuffle: bool = True):
        self.size = size
        self.seed = seed
        self.stream = stream
        self.shuffle = shuffle
        self._epoch: tuple[int, np.ndarray] = (-1, np.empty(0, np.int64))

    def index(self, draw: int) -> int:
        """The dataset index of a draw."""
        epoch, position = self.locate(draw)
        if self._epoch[0] != epoch:
            self._epoch = (epoch, self._indices(epoch))

        return int(self._epoch[1][position])

    def focus(self, draw: int) -> Focus | None:
        """What the crop of a draw is to show; None: whatever it happens to."""
        return None

    def shares(self, images: int) -> np.ndarray:
        """The expected share of the draws that each of the set's images gets, float64 (images,); their sum is 1.

        Of whole images: what crops of them show is not in it.
        """
        return np.full(images, 1 / images)

    def locate(self, draw: int) -> tuple[int, int]:
        """Epoch of a draw, and its position there."""
        return divmod(draw, self.size)

    def _indices(self, epoch: int) -> np.ndarray:
        if not self.shuffle:
            return np.arange(self.size)
        return generator(self.seed, self.stream, "order", epoch).permutation(self.size)


class RepeatOrder(Order):
    """Repeat-factor sampling: in each epoch image i is shown ⌊r_i⌋ or ⌊r_i⌋ + 1 times, r_i on average.

    The extra showings are drawn anew for each epoch, so epochs differ in length.
    """

    def __init__(self, factors: np.ndarray, seed: int, stream: str):
        super().__init__(len(factors), seed, stream)
        self.whole = np.floor(factors).astype(np.int64)
        self.fraction = np.asarray(factors, np.float64) - self.whole
        if not factors.sum() > 0:
            raise ValueError(f"stream {stream!r}: the repeat factors of all images are 0")

        self._starts = [0]  # first draw of each epoch

    def shares(self, images: int) -> np.ndarray:
        factors = self.whole + self.fraction
        return factors / factors.sum()

    def locate(self, draw: int) -> tuple[int, int]:
        while self._starts[-1] <= draw:
            self._starts.append(
                self._starts[-1] + int(self._repeats(len(self._starts) - 1).sum())
            )

        epoch = int(np.searchsorted(self._starts, draw, side="right")) - 1
        return epoch, draw - self._starts[epoch]

    def _repeats(self, epoch: int) -> np.ndarray:
        extra = (
            generator(self.seed, self.stream, "repeat", epoch).random(self.size) < self.fraction
        )
        return self.whole + extra

    def _indices(self, epoch: int) -> np.ndarray:
        indices = np.repeat(np.arange(self.size), self._repeats(epoch))
        return generator(self.seed, self.stream, "order", epoch).permutation(indices)


class RareClassOrder(Order):
    """Rare-class sampling (DAFormer, CVPR 2022): each draw is of a class, drawn by its rarity, and shows an image that
    has enough of it; its crop is drawn again while it shows too little.

    probabilities: (K,), see `rare_class_probabilities`. images: class → the images to show for it, one list a class.
    pixels, share: of the crop, see `Focus`.
    """

    def __init__(
        self,
        probabilities: np.ndarray,
        images: Sequence[np.ndarray],
        seed: int,
        stream: str,
        pixels: float = 0,
        share: float = 0,
    ):
        super().__init__(len(probabilities), seed, stream)
        self.probabilities = probabilities
        self.images = images
        self.pixels = pixels
        self.share = share

    def index(self, draw: int) -> int:
        return self._drawn(draw)[1]

    def focus(self, draw: int) -> Focus:
        class_id, _ = self._drawn(draw)
        return Focus(class_id, pixels=self.pixels, share=self.share)

    def shares(self, images: int) -> np.ndarray:
        return _shares_of_classes(self.probabilities, self.images, images)

    def _drawn(self, draw: int) -> tuple[int, int]:
        """Class and image."""
        rng = generator(self.seed, self.stream, "rare", draw)
        class_id = int(rng.choice(len(self.probabilities), p=self.probabilities))
        return class_id, int(rng.choice(self.images[class_id]))


class ClassUniformOrder(Order):
    """Class-uniform sampling (NVIDIA semantic segmentation): every second draw is one of a class, all classes equally
    often, and its crop contains a pixel of it; the draws between them go through the set as `Order` does.

    The release centres such crops on the centroid of the class in a tile, which between two poles shows neither.
    """

    def __init__(self, presence: np.ndarray, pixels: ClassPixels, seed: int, stream: str):
        super().__init__(len(presence), seed, stream)
        self.presence = presence
        self.pixels = pixels
        self.lots = Order(int(presence.any(0).sum()), seed, f"{stream}: classes")
        self.classes = np.flatnonzero(presence.any(0))

    def index(self, draw: int) -> int:
        number, of_class = divmod(draw, 2)
        return self._drawn(draw)[0] if of_class else super().index(number)

    def focus(self, draw: int) -> Focus | None:
        if draw % 2 == 0:
            return None
        _, class_id, point = self._drawn(draw)
        return Focus(class_id, near=point)

    def shares(self, images: int) -> np.ndarray:
        shown = [np.flatnonzero(column) for column in self.presence.T]
        lots = self.presence.any(0) / len(self.classes)
        return (super().shares(images) + _shares_of_classes(lots, shown, images)) / 2

    def _drawn(self, draw: int) -> tuple[int, int, tuple[float, float]]:
        """Image, class and a pixel of it."""
        rng = generator(self.seed, self.stream, "class", draw)
        class_id = int(self.classes[self.lots.index(draw // 2)])
        index = int(rng.choice(np.flatnonzero(self.presence[:, class_id])))
        row, column = rng.choice(self.pixels.of(index, class_id))

        return index, class_id, (float(row), float(column))


def _shares_of_classes(
    probabilities: np.ndarray, images: Sequence[np.ndarray], count: int
) -> np.ndarray:
    """Shares (count,) of draws that take a class by its probability, and one of its images by chance."""
    shares = np.zeros(count)
    for class_id in np.flatnonzero(probabilities):
        chosen = images[class_id]
        shares[chosen] += probabilities[class_id] / len(chosen)

    return shares


# From a config ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SamplerConfig:
    """The `sampler` section of a stream.

    threshold, level, mode: those of repeat_factor. temperature, min_share or min_pixels, min_crop_ratio: those of
    rare_class. An image stands for a class that has more than min_share of its pixels, or more than min_pixels; a crop
    shows enough of it with more than min_crop_ratio times as much (0: any crop does). DAFormer's are min_pixels 3000
    and min_crop_ratio 0.5; without either, min_share is MIN_SHARE.
    """

    order: Literal["shuffle", "sequential", "repeat_factor", "rare_class", "class_uniform"] = (
        "shuffle"
    )
    threshold: Positive = 0.001
    level: Literal["image", "pixel"] = "image"
    mode: Literal["max", "mean", "sum"] = "max"
    temperature: Positive = 0.01
    min_share: Share | None = None
    min_pixels: Count | None = None
    min_crop_ratio: NotNegative = 1.0

    def __post_init__(self):
        if self.min_share is not None and self.min_pixels is not None:
            raise ValueError(
                f"min_pixels: {self.min_pixels} beside min_share: {self.min_share}; remove one of them"
            )

    @property
    def share(self) -> float:
        """The share of its pixels that a class has to exceed; 0 where pixels are asked for."""
        if self.min_pixels is not None:
            return 0.0
        return MIN_SHARE if self.min_share is None else self.min_share


ORDER_OPTIONS = {
    "repeat_factor": ("threshold", "level", "mode"),
    "rare_class": ("temperature", "min_share", "min_pixels", "min_crop_ratio"),
}


def ignored_options(section: Mapping[str, Any]) -> str | None:
    """What a `sampler` section sets for another order than its own, in words; None where there is nothing.

    Where it says `shuffle` or `sequential` itself, the order of a config below is switched off, and nothing forgotten.
    """
    order = section.get("order", SamplerConfig.order)
    if "order" in section and order not in ORDER_OPTIONS and order != "class_uniform":
        return None

    parts = []
    for used, options in ORDER_OPTIONS.items():
        given = [option for option in options if section.get(option) is not None]
        if given and used != order:
            parts.append(f"{', '.join(given)}: ignored where order is {order}, not {used}")

    return "; ".join(parts) or None


def make_order(
    sampler: SamplerConfig,
    dataset: SegmentationDataset,
    seed: int,
    stream: str,
    workers: int = 0,
    cache: Path | None = None,
    statistics: Statistics | None = None,
) -> Order:
    """The order of a stream; labels are counted where it depends on classes (see `class_statistics`), unless they have
    been, in `statistics`.

    ValueError (one line) for an order that the labels do not allow; warns of one that changes nothing.
    """
    if sampler.order in ("shuffle", "sequential"):
        return Order(len(dataset), seed, stream, shuffle=sampler.order == "shuffle")

    where = f"data.streams.{stream}.sampler"
    if sampler.order != "repeat_factor" and not dataset.source.labels:
        raise ConfigError(
            f"{where}.order: {sampler.order} needs labels, but the stream has `labels: false`"
        )

    if statistics is None:
        statistics = class_statistics(dataset, workers, cache)

    if sampler.order == "repeat_factor":
        factors = repeat_factors(statistics, sampler.threshold, sampler.level, sampler.mode)
        if (factors == factors[0]).all():
            text = f"every image has the repeat factor {factors[0]:g}, none is shown more often than another"
            warnings.warn(
                f"{where}.order: repeat_factor changes nothing here: {text}", stacklevel=3
            )

        return RepeatOrder(factors, seed, stream)

    if not statistics.presence.any():
        raise ValueError(
            f"{where}.order: {sampler.order}: the labels show no class; correct the labels"
        )

    if sampler.order == "class_uniform":
        pixels = class_pixels(dataset, statistics, workers, cache)
        return ClassUniformOrder(statistics.presence, pixels, seed, stream)

    return _rare_class_order(sampler, dataset, statistics, seed, stream)


def _rare_class_order(
    sampler: SamplerConfig,
    dataset: SegmentationDataset,
    statistics: Statistics,
    seed: int,
    stream: str,
) -> RareClassOrder:
    """ValueError where a class that may be drawn has no image to show."""
    probabilities = rare_class_probabilities(statistics.pixel_count, sampler.temperature)
    images = images_of_classes(statistics, sampler)

    empty = [k for k in np.flatnonzero(probabilities) if not len(images[k])]
    if empty:
        given = (
            f"min_pixels: {sampler.min_pixels}"
            if sampler.min_pixels
            else f"min_share: {sampler.share:g}"
        )
        raise ValueError(
            f"data.streams.{stream}.sampler.{given}: no image shows that much of class {empty[0]} "
            f"({dataset.row.classes[empty[0]]}); lower it"
        )

    ratio = sampler.min_crop_ratio

    return RareClassOrder(
        probabilities,
        images,
        seed,
        stream,
        pixels=ratio * (sampler.min_pixels or 0),
        share=ratio * sampler.share,
    )


def rare_class_probabilities(pixels: np.ndarray, temperature: float) -> np.ndarray:
    """P(c) ∝ exp((1 − f_c) / T) of pixel counts (K,), f their shares; 0 for a class without pixels. float64 (K,)."""
    pixels = np.asarray(pixels, np.float64)
    frequency = pixels / pixels.sum()
    scores = np.where(pixels > 0, (1 - frequency) / temperature, -np.inf)
    weights = np.exp(scores - scores.max())

    return weights / weights.sum()


def images_of_classes(statistics: Statistics, sampler: SamplerConfig) -> list[np.ndarray]:
    """Class → the images with enough of it, one ascending list a class."""
    pixels = statistics.pixels
    total = pixels.sum(1, dtype=np.int64) + statistics.ignored
    least = np.maximum(sampler.min_pixels or 0, sampler.share * total)
    enough = pixels > least[:, None]

    return [np.flatnonzero(enough[:, k]) for k in range(pixels.shape[1])]
