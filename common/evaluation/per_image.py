"""The confusion matrix of every image of an evaluation in a small file, so that any statistic can be made later."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from common import distributed
from common.files import read_artifact, replacing

FILE = "per_image.npz"  # in a run's folder, beside evaluation.json
LARGEST = 1 << 27  # numbers: one GiB


def fits(images: int, classes: int) -> bool:
    """Whether the matrices of so many images are few enough numbers to be kept."""
    return images * classes**2 <= LARGEST


class PerImage:
    """The matrices of the images `chosen` of a data set, of which this rank adds its own; int64 (N, K, K)."""

    def __init__(self, dataset: Any, chosen: Sequence[int], device: torch.device | str):
        count = len(chosen)
        classes = len(dataset.row.classes)
        if not fits(count, classes):
            raise ValueError(
                f"eval.per_image: {count} images × {classes}² numbers are too many; set it to false"
            )

        self.names = [dataset.records[index].name for index in chosen]
        self.places = {index: place for place, index in enumerate(chosen)}
        self.matrices = torch.zeros(count, classes, classes, dtype=torch.int64, device=device)

    def add(self, index: int, matrix: Tensor) -> None:
        """The matrix (K, K) of the image `index` of the data set, rows truth."""
        self.matrices[self.places[index]] = matrix

    def write(self, path: Path) -> None:
        """Leave those of all ranks in `path` (rank 0): mostly zeros, so the file is small."""
        total = distributed.all_sum(self.matrices).cpu().numpy()
        if distributed.rank() != 0:
            return

        path.parent.mkdir(parents=True, exist_ok=True)

        with replacing(path) as draft:
            np.savez_compressed(draft, names=np.array(self.names), matrices=total)


@dataclass(frozen=True)
class Matrices:
    """What such a file holds: names of N images, matrices int64 (N, K, K)."""

    names: list[str]
    matrices: np.ndarray


def read_per_image(path: str | Path) -> Matrices:
    """Read such a file. ValueError names it where it is not there, damaged or of another kind."""

    def parse(path: Path) -> Matrices:
        with np.load(path, allow_pickle=False) as file:
            names = file["names"].tolist()
            matrices = file["matrices"]

        if (
            matrices.ndim != 3
            or matrices.shape[1] != matrices.shape[2]
            or len(names) != len(matrices)
        ):
            raise ValueError(f"{len(names)} names and matrices of shape {matrices.shape}")
        return Matrices(names, matrices)

    return read_artifact(path, parse, "evaluate again with eval.per_image=true")
