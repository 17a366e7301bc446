"""Some pixels of each class in each image, for samplers that place a crop on a class."""

import warnings
from functools import partial
from pathlib import Path

import numpy as np
from torch.utils.data import Dataset

from common import console
from common.data.dataset import SegmentationDataset
from common.data.labels import IGNORE
from common.data.loading import batches
from common.data.statistics import Statistics, labels_key
from common.files import read_artifact, replacing

PIXELS = 64  # that are kept of a class in an image


class ClassPixels:
    """At most PIXELS pixels of each class in each image, drawn without replacement.

    pixels: float32 (P, 2), in shares of the label's height and width, pixel centres; by image, then by class.
    counts: int (N, K), pixels of each class in each image (`Statistics.pixels`).
    """

    def __init__(self, pixels: np.ndarray, counts: np.ndarray):
        self.pixels = pixels
        self._kept = np.minimum(counts, PIXELS)
        self._ends = np.cumsum(self._kept.ravel(), dtype=np.int64).reshape(counts.shape)

    def of(self, index: int, class_id: int) -> np.ndarray:
        """Those of a class in an image, float32 (n, 2)."""
        end = self._ends[index, class_id]
        return self.pixels[end - self._kept[index, class_id] : end]


def class_pixels(
    dataset: SegmentationDataset,
    statistics: Statistics,
    workers: int = 0,
    cache: str | Path | None = None,
) -> ClassPixels:
    """The pixels of a dataset's labels, the same for the same files; kept in `cache` as its `statistics` are."""
    expected = int(np.minimum(statistics.pixels, PIXELS).sum(dtype=np.int64))
    path = (
        Path(cache) / f"pixels-{dataset.row.name}-{labels_key(dataset)}.npy"
        if cache is not None
        else None
    )
    if path is not None and path.is_file():
        try:
            return ClassPixels(
                read_artifact(path, partial(_parse, count=expected)), statistics.pixels
            )
        except ValueError as error:
            warnings.warn(
                f"the cached pixels cannot be read, drawing them again ({error})", stacklevel=2
            )

    drawn: list[np.ndarray] = []

    with console.bar(what=f"drawing pixels of {dataset.row.name}", total=len(dataset)) as bar:
        for batch in batches(_Drawn(dataset), list, workers, batch_size=8):
            drawn += batch
            bar.update(len(batch))

    pixels = np.concatenate(drawn)

    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as draft, draft.open("wb") as file:
            np.save(file, pixels)

    return ClassPixels(pixels, statistics.pixels)


class _Drawn(Dataset):
    """The pixels of each label, float32 (n, 2), by class."""

    def __init__(self, dataset: SegmentationDataset):
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> np.ndarray:
        return draw_pixels(self.dataset.label(index), np.random.default_rng(index))


def draw_pixels(label: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """At most PIXELS pixels of each class of a label (H, W), float32 (n, 2) in shares of its size, by class."""
    order = np.argsort(label, axis=None, kind="stable")
    classes, starts = np.unique(label.ravel()[order], return_index=True)
    ends = [*starts[1:], label.size]

    chosen = [np.empty(0, np.int64)]
    for class_id, start, end in zip(classes.tolist(), starts, ends, strict=True):
        if class_id == IGNORE:
            continue
        count = min(end - start, PIXELS)
        chosen.append(rng.choice(order[start:end], count, replace=False))

    height, width = label.shape
    rows, columns = np.divmod(np.concatenate(chosen), width)
    down = (rows + 0.5) / height
    across = (columns + 0.5) / width
    return np.stack([down, across], axis=1).astype(np.float32)


def _parse(path: Path, count: int) -> np.ndarray:
    pixels = np.load(path, allow_pickle=False)
    if pixels.shape != (count, 2) or pixels.dtype != np.float32:
        raise ValueError(
            f"{pixels.dtype} {pixels.shape}, expected positions float32 {(count, 2)}"
        )
    return pixels
