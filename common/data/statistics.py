"""Class frequencies of a dataset, and what the long-tail methods derive from them."""

import hashlib
import json
import os
import warnings
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Literal

import numpy as np
from torch.utils.data import Dataset

from common import console
from common.data.dataset import SegmentationDataset
from common.data.labels import IGNORE
from common.data.loading import batches
from common.files import read_artifact, remove_drafts, replacing

_VERSION = 1  # of the cached files; raise it when their meaning changes

Level = Literal["image", "pixel"]
Mode = Literal["max", "mean", "sum"]


@dataclass(frozen=True)
class Statistics:
    """Pixels of each class in each image: `pixels` int32 (N, K), `ignored` int32 (N,), in the dataset's order."""

    pixels: np.ndarray
    ignored: np.ndarray

    @property
    def num_images(self) -> int:
        return len(self.pixels)

    @cached_property
    def presence(self) -> np.ndarray:
        """bool (N, K): the image shows the class."""
        return self.pixels > 0

    @cached_property
    def image_count(self) -> np.ndarray:
        """int64 (K,): images that show the class."""
        return self.presence.sum(0)

    @cached_property
    def pixel_count(self) -> np.ndarray:
        """int64 (K,): pixels of the class in the whole set."""
        return self.pixels.sum(0, dtype=np.int64)

    @cached_property
    def area(self) -> np.ndarray:
        """float64 (K,): the class's share of the image (ignored pixels included in the whole), summed over images."""
        total = self.pixels.sum(1, dtype=np.int64) + self.ignored
        return (self.pixels / np.maximum(total, 1)[:, None]).sum(0)

    def count(self, level: Level) -> np.ndarray:
        """Class counts as the LTSS benchmark has them: images that show the class, or summed image shares."""
        return self.image_count if level == "image" else self.area

    def frequency(self, level: Level) -> np.ndarray:
        """`count` over the number of images, float64 (K,)."""
        return self.count(level) / self.num_images


def placeholder(classes: int) -> Statistics:
    """Those of one image with a pixel of every class: for a method that is only built to see whether it can be."""
    return Statistics(np.ones((1, classes), np.int32), np.zeros(1, np.int32))


def class_statistics(
    dataset: SegmentationDataset, workers: int = 0, cache: str | Path | None = None
) -> Statistics:
    """Count the labels of a dataset (un-augmented), in `workers` processes; a progress bar runs on a terminal.

    With a `cache` folder the result is kept in a file named after everything it depends on: the label files, their
    sizes and dates, the label map and the classes. Two processes may count at the same time; the file is written whole
    or not at all.
    """
    path = (
        Path(cache) / f"statistics-{dataset.row.name}-{labels_key(dataset)}.npz"
        if cache is not None
        else None
    )
    if path is not None:
        remove_drafts(path.parent, idle=60)
        stored = _load(path, dataset)
        if stored is not None:
            return stored

    rows: list[np.ndarray] = []

    with console.bar(what=f"counting {dataset.row.name}", total=len(dataset)) as bar:
        for batch in batches(_Counts(dataset), list, workers, batch_size=8):
            rows += batch
            bar.update(len(batch))

    counts = np.stack(rows).astype(np.int32)
    statistics = Statistics(counts[:, 1:], counts[:, 0])
    if path is not None:
        _save(path, statistics)

    return statistics


class _Counts(Dataset):
    """Pixels of each class, int64 (1 + K,), the ignored ones first, of each label."""

    def __init__(self, dataset: SegmentationDataset):
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> np.ndarray:
        label = self.dataset.label(index)
        return np.bincount((label - IGNORE).ravel(), minlength=self.dataset.row.num_classes + 1)


def labels_key(dataset: SegmentationDataset) -> str:
    """A name for all that figures of the labels depend on: the files, their sizes and dates, label map and classes."""
    digest = hashlib.sha256()
    digest.update(json.dumps([_VERSION, *dataset.row.meaning]).encode())

    for record in dataset.records:
        if record.label is None:
            raise ValueError(
                f"{record.image}: no label file for this image; class statistics need labels"
            )
        stat = os.stat(record.label)
        digest.update(
            f"{record.label.resolve()} {stat.st_size} {stat.st_mtime_ns}\n".encode(
                errors="surrogateescape"
            )
        )

    return digest.hexdigest()[:16]


def _load(path: Path, dataset: SegmentationDataset) -> Statistics | None:
    if not path.is_file():
        return None
    shape = (len(dataset), dataset.row.num_classes)

    try:
        return read_artifact(path, partial(_parse, shape=shape))
    except ValueError as error:
        warnings.warn(
            f"the cached class statistics cannot be read, counting again ({error})",
            stacklevel=3,
        )
        return None


def _parse(path: Path, shape: tuple[int, int]) -> Statistics:
    with np.load(path, allow_pickle=False) as data:
        pixels = data["pixels"]
        ignored = data["ignored"]

    for name, array, expected in (("pixels", pixels, shape), ("ignored", ignored, shape[:1])):
        if array.shape != expected or array.dtype != np.int32 or array.min(initial=0) < 0:
            raise ValueError(
                f"{name}: {array.dtype} {array.shape}, expected counts int32 {expected}"
            )

    return Statistics(pixels, ignored)


def _save(path: Path, statistics: Statistics) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as draft:
        np.savez_compressed(draft, pixels=statistics.pixels, ignored=statistics.ignored)


def repeat_factors(
    statistics: Statistics, threshold: float, level: Level = "image", mode: Mode = "max"
) -> np.ndarray:
    """Repeat factor of each image, float32 (N,): the max, mean or sum of r_c over the classes that it shows.

    r_c = max(1, sqrt(threshold / f_c)), f_c the class's frequency at the level. An image without labels has factor 1
    (max, mean) or 0 (sum: it is never shown).
    """
    return image_factors(statistics.presence, statistics.frequency(level), threshold, mode)


def image_factors(
    presence: np.ndarray, frequency: np.ndarray, threshold: float, mode: Mode
) -> np.ndarray:
    """`repeat_factors` of a presence matrix (N, K) and class frequencies (K,)."""
    factors = np.sqrt(threshold / np.maximum(frequency, np.finfo(np.float64).tiny)).clip(min=1)
    factors = np.where(frequency > 0, factors, 1.0)  # shown by no image
    if mode == "max":
        result = np.where(presence, factors, 1.0).max(1)
    else:
        result = presence @ factors
        if mode == "mean":
            shown = presence.sum(1)
            result = np.where(shown > 0, result / np.maximum(shown, 1), 1.0)

    return result.astype(np.float32)
