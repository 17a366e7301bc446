"""The PNG files of an evaluation: predictions in a data set's own values, and the panels of the report."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from common.config import EvalConfig
from common.data import IGNORE
from common.evaluation.samples import chosen_images


def prediction_files(folder: str | Path | None, dataset: Any, cfg: EvalConfig) -> list[Path]:
    """What `save_prediction` is going to write to `folder` of the images that are evaluated; nothing without one."""
    if folder is None:
        return []
    return [Path(folder) / f"{dataset.names[i]}.png" for i in chosen_images(dataset, cfg)]


def save_prediction(folder: Path, name: str, pred: Tensor, row: Any) -> None:
    """`<folder>/<name>.png` in the data set's stored values, so that its own tools read it."""
    values = stored_values(row)
    colours = dict(zip(values.tolist(), row.palette, strict=True))
    write_label(folder / f"{name}.png", values[pred.cpu().numpy()], colours)


def stored_values(row: Any) -> np.ndarray:
    """The value that stands for each class in the data set's own label files (K,); of several the lowest.

    Where labels are coded by colour, or a class has no value of its own, these are the class ids.
    """
    ids = np.arange(len(row.classes))
    if not in_stored_values(row):
        return ids

    lowest = {k: value for value, k in sorted(_general_form(row).items(), reverse=True)}
    return np.array([lowest[k] for k in ids])


def in_stored_values(row: Any) -> bool:
    """Whether `save_prediction` writes the values of the data set's label files, and not class ids."""
    if not row.label_maps or row.encoding == "rgb":
        return False
    return set(range(len(row.classes))) <= set(_general_form(row).values())


def _general_form(row: Any) -> Mapping[int, int]:
    """Stored value → class id in those label files whose names have no ending of their own: the last entry."""
    return row.label_maps[-1][1]


def save_panel(folder: Path, sample: dict[str, Any], pred: Tensor, row: Any) -> None:
    """`<index>_{image,truth,prediction}.png`; labels as class ids, 255 (65535 in 16 bits) where ignored."""
    stem = f"{sample['index']:05d}"
    colours = dict(enumerate(row.palette))
    folder.mkdir(parents=True, exist_ok=True)

    pixels = sample["image"].permute(1, 2, 0).numpy()
    Image.fromarray(pixels).save(folder / f"{stem}_image.png")

    truth = sample["label"].numpy()
    write_label(folder / f"{stem}_truth.png", truth, colours)

    predicted = pred.cpu().numpy()
    write_label(folder / f"{stem}_prediction.png", predicted, colours)


def write_label(path: Path, values: np.ndarray, colours: Mapping[int, Sequence[int]]) -> None:
    """Write values (H, W) as an 8-bit palette PNG, or 16-bit grey where they need it; IGNORE becomes the highest."""
    path.parent.mkdir(parents=True, exist_ok=True)
    deep = max(colours) > 254
    kind = np.dtype(np.uint16 if deep else np.uint8)
    stored = values.astype(kind)
    stored[values == IGNORE] = np.iinfo(kind).max
    image = Image.fromarray(stored)

    if not deep:
        palette = np.zeros((256, 3), np.uint8)
        palette[255] = 255
        palette[list(colours)] = list(colours.values())
        image.putpalette(palette.tobytes())

    image.save(path)
