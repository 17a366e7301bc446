"""One dataset class over the rows of `datasets.py`."""

import os
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch

from common.config import SourceConfig
from common.data.catalogue.layouts import Record
from common.data.catalogue.lists import read_list
from common.data.catalogue.registry import resolve
from common.data.focus import Focus
from common.data.images import Picture
from common.data.labels import IGNORE, MOST_CLASSES, read_index
from common.data.pixel_cache import PixelCache
from common.files import load_array, read_artifact

Transform = Callable[
    [dict[str, Any], np.random.Generator, "SegmentationDataset", int], dict[str, Any]
]


class SegmentationDataset:
    """Images, labels and further maps of one source.

    `sample(index, rng)` is a pure function of its arguments: all randomness comes from `rng`. Errors in the files are
    ValueErrors of one line that name the file, the value and the fix. With `labels: false` no label file is needed.

    Further maps (`maps`: sample key → folder) are files of an earlier step, named after the image's stem:
    `.png` holds labels (8-bit with 255 ignored, 16-bit with 65535 ignored) and has the image's size; `.npy` holds any
    array (H, W) or (C, H, W), at the image's size or at a stride of its own. A value that contains `{name}` is the
    file itself, e.g. `pseudo/{name}_conf.npy`.
    """

    def __init__(self, source: SourceConfig, transform: Transform | None = None):
        self.source = source
        self.row, self.root = resolve(source)
        lines = read_list(Path(source.list)) if source.list else None
        self.records: list[Record] = self.row.layout(self.root, source.split, lines)
        self.names: list[str] = [record.name for record in self.records]
        self.transform = transform
        self.cache: PixelCache | None = None  # decoded images; None: files are decoded
        if source.labels:
            self._require_labels()

    def __len__(self) -> int:
        return len(self.records)

    def _require_labels(self) -> None:
        missing = [record for record in self.records if record.label is None]
        if missing:
            raise ValueError(
                f"{missing[0].image}: no label file for this image ({len(missing)} of {len(self)} have none); "
                "add the labels, restrict the split by a `list`, or set `labels: false`"
            )

    def open(self, index: int) -> dict[str, Any]:
        """The raw sample, its pixels still encoded: `image` Picture, `label` int16 (H, W), maps, `name`, `index`."""
        record = self.records[index]
        opened = Picture if self.cache is None else self.cache.picture
        sample = {"image": opened(record.image), "name": record.name, "index": index}
        if self.source.labels:
            sample["label"] = self._label(record, sample["image"].size)

        for key, folder in self.source.maps.items():
            sample[key] = self._map(map_path(folder, record.name), record, sample["image"].size)

        return sample

    def load(self, index: int) -> dict[str, Any]:
        """The raw sample: `image` uint8 (H, W, 3), `label` int16 (H, W), further maps, `name`, `index`."""
        sample = self.open(index)
        return {**sample, "image": sample["image"].pixels()}

    def label(self, index: int) -> np.ndarray:
        """The label alone, int16 (H, W); the image is not opened."""
        record = self.records[index]
        return self.row.label_table(record.label).read(record.label)

    def sample(
        self, index: int, rng: np.random.Generator, focus: Focus | None = None
    ) -> dict[str, Any]:
        """The sample as training sees it: `image` uint8 (3, H, W), `label` int16 (H, W), maps, `name`, `index`,
        `geometry` int32 (7,) = original height, width, resized height, width, crop row, column, mirrored.

        focus: what the crop is meant to show; without a transform the whole image is.
        """
        if self.transform is not None:
            opened = self.open(index)
            return self.transform(
                opened if focus is None else {**opened, "focus": focus}, rng, self, index
            )

        sample = self.load(index)
        height, width = sample["image"].shape[:2]
        sample["geometry"] = np.array([height, width, height, width, 0, 0, 0], np.int32)

        return tensors(sample)

    def _label(self, record: Record, size: tuple[int, int]) -> np.ndarray:
        label = self.row.label_table(record.label).read(record.label)
        if label.shape != size:
            if self.row.resize_labels:
                return resized_label(label, size)
            raise ValueError(_mismatch(record.label, label.shape, record.image, size))

        return label

    def _map(self, path: Path, record: Record, size: tuple[int, int]) -> np.ndarray:
        if path.suffix != ".png":
            return read_artifact(
                path, load_array, f"run the step that writes the array of {record.name} again"
            )
        if not path.is_file():
            raise ValueError(
                f"{path}: no such map for {record.image}; run the step that writes it first"
            )

        raw = read_index(path)
        if raw.shape != size:
            raise ValueError(_mismatch(path, raw.shape, record.image, size))

        return _ids(raw, path)


def map_path(folder: str, name: str) -> Path:
    """The file of an earlier step for the image `name`: the pattern, else <folder>/<name>.npy or .png."""
    if "{name}" in folder:
        return Path(folder.replace("{name}", name))
    array = Path(folder) / f"{name}.npy"
    return array if array.is_file() else Path(folder) / f"{name}.png"


def _ids(raw: np.ndarray, path: Path) -> np.ndarray:
    """The stored values of a map as int16, with IGNORE for the highest that its depth holds. ValueError for values that
    int16 does not hold."""
    if raw.dtype == np.uint8:
        label = raw.astype(np.int16)
        label[raw == 255] = IGNORE
        return label

    label = np.where(raw == 65535, IGNORE, raw.astype(np.int32))
    highest = label.max(initial=0)
    if highest >= MOST_CLASSES:
        raise ValueError(
            f"{path}: value {highest} is no label; give {MOST_CLASSES - 1} at most, or 65535 for none"
        )

    return label.astype(np.int16)


def resized_label(label: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """A label brought to (height, width) by its nearest pixels, rounding down."""
    rows = _nearest(size[0], label.shape[0])
    columns = _nearest(size[1], label.shape[1])
    return label[rows][:, columns]


def _nearest(size: int, stored: int) -> np.ndarray:
    return np.arange(size) * stored // size


def _mismatch(path: Path, shape: tuple[int, ...], image: Path, size: tuple[int, int]) -> str:
    return f"{path}: is {shape[1]}x{shape[0]} pixels, but its image {image.name} is {size[1]}x{size[0]}; re-create it"


def tensors(sample: Mapping[str, Any]) -> dict[str, Any]:
    """A raw sample with its arrays as tensors; the image becomes (3, H, W)."""
    result = {
        key: torch.from_numpy(v) if isinstance(v, np.ndarray) else v
        for key, v in sample.items()
    }
    result["image"] = result["image"].permute(2, 0, 1).contiguous()
    return result


def check(dataset: SegmentationDataset, workers: int = 8) -> None:
    """Every file that training will open exists and is not empty; nothing is decoded. ValueError names the first."""
    paths: list[Path] = []
    for record in dataset.records:
        paths.append(record.image)
        paths += [record.label] if dataset.source.labels else []
        paths += [map_path(folder, record.name) for folder in dataset.source.maps.values()]

    with ThreadPoolExecutor(max(1, workers)) as pool:
        sizes = list(pool.map(_size, paths, chunksize=256))

    for path, size in zip(paths, sizes, strict=True):
        if not size:
            raise ValueError(f"{path}: {'the file is empty' if size == 0 else 'no such file'}")


def _size(path: Path) -> int | None:
    try:
        return os.stat(path).st_size
    except OSError:
        return None
