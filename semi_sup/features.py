"""Features of the labelled images from the trained baseline: what clustering reads.

Whole images at their own size, without augmentation, one after the other in the order of the list: the decoder's maps
(what the classifier reads), resized from stride 4 to stride 8. All are rows of one memory-mapped array.

    features.npy   float16 (cells of all images, channels), the cells of an image row by row
    index.json     names and sizes of the images
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import Dataset

from common import console
from common.data import SegmentationDataset
from common.data.loading import batches, only
from common.files import load_array, load_json, read_artifact, write_json

STRIDE = 8
ROWS = "features.npy"
INDEX = "index.json"
REMEDY = "main.py --save_feature --resume <the baseline's checkpoint> writes them"


def grid(size: tuple[int, int]) -> tuple[int, int]:
    """Cells of an image: its sides over 8, rounded up, as the network pads it."""
    return -(-size[0] // STRIDE), -(-size[1] // STRIDE)


@dataclass(frozen=True)
class Features:
    """The features of a list of images.

    rows: float16 (N, D), memory-mapped; names; sizes: height and width of each image in pixels; starts: int64
    (images + 1,), first row of each image, and N.
    """

    rows: np.ndarray
    names: list[str]
    sizes: list[tuple[int, int]]
    starts: np.ndarray

    def image(self, index: int) -> np.ndarray:
        """(h, w, D) of one image."""
        return self.rows[self.starts[index] : self.starts[index + 1]].reshape(
            *grid(self.sizes[index]), -1
        )


def starts_of(sizes: Sequence[tuple[int, int]]) -> np.ndarray:
    return np.cumsum([0, *(h * w for h, w in map(grid, sizes))])


class _Images(Dataset):
    """Whole images uint8 (3, H, W)."""

    def __init__(self, dataset: SegmentationDataset):
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> torch.Tensor:
        pixels = self.dataset.open(index)["image"].pixels()
        return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()


@torch.no_grad()
def export(
    model: nn.Module,
    dataset: SegmentationDataset,
    folder: Path,
    device: torch.device,
    workers: int,
    source: Mapping[str, Any],
) -> Features:
    """Write the features of all images of `dataset` by `model` (evaluation mode). Returns them.

    source: which checkpoint the model is of; it stands in the index. Half precision overflows at 65504: ValueError.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / INDEX).unlink(missing_ok=True)  # what lies there is no longer whole
    sizes = [dataset.open(i)["image"].size for i in range(len(dataset))]
    starts = starts_of(sizes)
    rows = None
    images = batches(_Images(dataset), only, min(workers, len(dataset)))

    for i, image in enumerate(console.bar(images, what="features", total=len(dataset))):
        cells = cell_features(model, image[None].to(device))
        if not torch.isfinite(cells).all():
            raise ValueError(
                f"{dataset.names[i]}: features beyond half precision; is the checkpoint sound?"
            )

        if rows is None:
            shape = (int(starts[-1]), cells.shape[1])
            rows = np.lib.format.open_memmap(
                folder / ROWS, mode="w+", dtype=np.float16, shape=shape
            )

        rows[starts[i] : starts[i + 1]] = cells.cpu().numpy()

    rows.flush()

    return _finish(folder, dataset.names, sizes, source)


def cell_features(model: nn.Module, image: torch.Tensor) -> torch.Tensor:
    """Rows float16 (cells, D) of one image (1, 3, H, W) in 0–255."""
    features, _ = model.encode(model.normalise(image), subclasses=False)
    size = [side // 2 for side in features.shape[-2:]]
    halved = F.interpolate(features.float(), size, mode="bilinear", align_corners=True)
    return halved[0].flatten(1).T.half()


def _finish(
    folder: Path, names: Sequence[str], sizes: Sequence[tuple[int, int]], source: Any
) -> Features:
    index = {
        "stride": STRIDE,
        "source": source,
        "names": list(names),
        "sizes": [list(size) for size in sizes],
    }
    write_json(folder / INDEX, index)
    return open_features(folder, names)


def open_features(folder: Path, names: Sequence[str]) -> Features:
    """The features of exactly the images `names`. ValueError where they are missing or of another list."""
    if not (folder / INDEX).is_file():
        raise ValueError(f"{folder}: no features there; {REMEDY}")

    stored, sizes = read_artifact(folder / INDEX, _index, REMEDY)
    if sorted(stored) != sorted(names):
        raise ValueError(
            f"{folder}: features of {len(stored)} images, not of the {len(names)} of data.streams.labeled; {REMEDY}"
        )

    starts = starts_of(sizes)
    rows = read_artifact(folder / ROWS, partial(_rows, cells=int(starts[-1])), REMEDY)

    return Features(rows, stored, sizes, starts)


def _index(path: Path) -> tuple[list[str], list[tuple[int, int]]]:
    """Names and sizes of the images."""
    index = load_json(path)
    names = index["names"]
    sizes = [(int(height), int(width)) for height, width in index["sizes"]]
    if len(names) != len(sizes) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"{len(names)} names of images for {len(sizes)} sizes")
    if min(map(min, sizes), default=1) < 1:
        raise ValueError("an image without pixels")

    return names, sizes


def _rows(path: Path, cells: int) -> np.ndarray:
    rows = np.load(path, mmap_mode="r")
    if rows.ndim != 2 or rows.dtype != np.float16 or len(rows) != cells:
        raise ValueError(f"{rows.dtype} {rows.shape} for {cells} cells")
    return rows


def adopt(folder: Path, dataset: SegmentationDataset) -> bool:
    """Gather features of the release's layout (`<name>.npy`, float16 (D, h, w) of each image) into ours.

    False where the folder is not of that layout. ValueError for a map of another size than its image has.
    """
    paths = [folder / f"{name}.npy" for name in dataset.names]
    if (folder / INDEX).exists() or not paths or not all(path.is_file() for path in paths):
        return False

    sizes = [dataset.open(i)["image"].size for i in range(len(dataset))]
    starts = starts_of(sizes)
    shape = (int(starts[-1]), len(np.load(paths[0], mmap_mode="r")))
    rows = np.lib.format.open_memmap(folder / ROWS, mode="w+", dtype=np.float16, shape=shape)

    for i, path in enumerate(paths):
        cells = read_artifact(path, load_array, REMEDY)
        if cells.shape != (shape[1], *grid(sizes[i])):
            raise ValueError(
                f"{path}: features {cells.shape}, expected {(shape[1], *grid(sizes[i]))}; {REMEDY}"
            )
        rows[starts[i] : starts[i + 1]] = cells.reshape(shape[1], -1).T

    rows.flush()
    _finish(folder, dataset.names, sizes, "files of the release's layout")

    return True
