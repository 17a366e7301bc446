"""Scores of predictions that lie on the disk, whoever made them: label maps for both, sizes checked, files paired."""

import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch

from common import console
from common.config import EvalConfig, SourceConfig
from common.data import IGNORE, DatasetRow
from common.data.catalogue.layouts import Record
from common.data.catalogue.lists import IMAGE_SUFFIXES, same_form
from common.data.catalogue.row import colour_map
from common.data.dataset import SegmentationDataset, resized_label
from common.data.labels import LabelTable
from common.evaluation.identity import identity_of_labels
from common.evaluation.per_image import PerImage
from common.evaluation.pictures import in_stored_values
from common.evaluation.samples import chosen_images
from common.evaluation.sums import Sums

Values = Literal["saved", "ids", "labels"]
VALUES: tuple[str, ...] = get_args(Values)


@dataclass(frozen=True)
class FilePairs:
    """Predictions beside their labels, in the form of a data set: a record's `image` is its prediction."""

    row: DatasetRow
    source: SourceConfig
    records: Sequence[Record]
    unlabelled: int = 0  # predictions without a label, which are not scored

    def __len__(self) -> int:
        return len(self.records)


def plain_row(num_classes: int) -> DatasetRow:
    """A row of classes 0 … K−1 without names; label files hold their ids, and 255 where there is no class."""
    names = tuple(str(k) for k in range(num_classes))
    ignore = (255,) if num_classes <= 255 else (65535,)
    return DatasetRow("files", "", names, colour_map(num_classes), _no_layout, ignore=ignore)


def _no_layout(root: Path, split: str, lines: Sequence[str] | None = None) -> list[Record]:
    raise ValueError(
        f"{root}: classes without a data set have no layout; give a folder of labels"
    )


def pair_folders(
    predictions: str | Path,
    labels: str | Path,
    row: DatasetRow,
    prediction_end: str = "",
    label_end: str = "",
) -> FilePairs:
    """Predictions and labels of two folders and those in them, paired by their paths without suffix and ending.

    ValueError (one line) for a label without a prediction, and for two files of one name.
    """
    truth = _named(Path(labels), label_end, "labels")
    source = SourceConfig(dataset=row.name, split=Path(labels).name)
    return _paired(row, source, truth, Path(predictions), prediction_end)


def pair_dataset(
    predictions: str | Path,
    dataset: SegmentationDataset,
    cfg: EvalConfig,
    prediction_end: str = "",
) -> FilePairs:
    """Predictions paired with the images of a data set that `cfg` evaluates, by the names of these."""
    records = [dataset.records[i] for i in chosen_images(dataset, cfg)]
    truth = {record.name: record.label for record in records}
    return _paired(dataset.row, dataset.source, truth, Path(predictions), prediction_end)


def _paired(
    row: DatasetRow,
    source: SourceConfig,
    truth: Mapping[str, Path],
    folder: Path,
    end: str,
) -> FilePairs:
    found = _named(folder, end, "predictions")
    short = _by_stem(truth)
    alone = {stem: path for stem, path in _by_stem(found).items() if stem in short}
    files = {name: found.get(name) or alone.get(_stem(name)) for name in truth}
    missing = [name for name, path in files.items() if path is None]
    if missing:
        raise ValueError(
            f"{folder}: no prediction for {missing[0]!r} ({len(missing)} of {len(truth)} labels have none; here is "
            f"{next(iter(found))!r}); give all, or the endings in which the names differ"
        )

    records = [
        Record(_stem(name) if _stem(name) in short else name, files[name], label)
        for name, label in truth.items()
    ]
    return FilePairs(row, source, records, len(set(found.values()) - set(files.values())))


def _stem(name: str) -> str:
    """The last part of a name with folders."""
    return name.rpartition("/")[2]


def _by_stem(files: Mapping[str, Path]) -> dict[str, Path]:
    """Files by the last part of their names, where it is theirs alone: folders may be arranged otherwise."""
    count = Counter(map(_stem, files))
    return {_stem(name): path for name, path in files.items() if count[_stem(name)] == 1}


def _named(folder: Path, end: str, what: str) -> dict[str, Path]:
    """Path below the folder, without suffix and ending → file; of files that have the ending."""
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder of {what}")

    found: dict[str, Path] = {}
    for path in sorted(folder.rglob("*")):
        is_image = path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith(".")
        if not is_image or not path.stem.endswith(end):
            continue
        name = same_form(str(path.relative_to(folder).with_suffix(""))).removesuffix(end)
        if name in found:
            raise ValueError(f"{path}: {found[name]} has the same name; remove one of them")
        found[name] = path

    if not found:
        raise ValueError(
            f"{folder}: no {what} here ({', '.join(IMAGE_SUFFIXES)}{end and f', {end}'})"
        )
    return found


def score_files(
    pairs: FilePairs,
    cfg: EvalConfig | None = None,
    *,
    values: Values = "saved",
    groups: Mapping[str, Sequence[str]] | None = None,
    per_image: str | Path | None = None,
) -> dict[str, Any]:
    """What `evaluate` returns, its times apart, of predictions in files. Of `cfg` convention and boundary count.

    values: what the predictions hold. "saved": what `--save-predictions` writes (the data set's stored values; class
    ids where labels are coded by colour or a class has no value); "ids": class ids; "labels": what label files hold.
    per_image: file for the confusion matrix of every image.

    ValueError (one line) names a file of another size than its label, with a value that is none, or without a class
    where its label has one.
    """
    cfg = cfg or EvalConfig()
    if cfg.calibration:
        warnings.warn(
            "eval.calibration has no effect: files hold no probabilities", stacklevel=2
        )
        cfg = replace(cfg, calibration=False)

    sums = Sums(pairs.row, cfg)
    single = PerImage(pairs, range(len(pairs)), "cpu") if per_image else None

    for i, record in enumerate(console.bar(pairs.records, what="scoring")):
        pred, label = read_pair(pairs.row, record, values)
        counted = sums.add(torch.from_numpy(pred), torch.from_numpy(label))
        if single is not None:
            single.add(i, counted)

    if single is not None:
        single.write(Path(per_image))
    known = identity_of_labels(pairs, range(len(pairs)), cfg.convention)
    return {**sums.summary(groups), "identity": known, "images": len(pairs)}


def read_pair(row: DatasetRow, record: Record, values: Values) -> tuple[np.ndarray, np.ndarray]:
    """Predicted and true classes of one image, int16 (H, W)."""
    label = row.label_table(record.label).read(record.label)
    pred = _table(row, record.image, values).read(record.image)
    if row.resize_labels and label.shape != pred.shape:
        label = resized_label(label, pred.shape)

    if pred.shape != label.shape:
        raise ValueError(
            f"{record.image}: is {_size(pred)} pixels, but its label {record.label} is {_size(label)}; predict at the "
            "label's size"
        )

    nothing = (pred == IGNORE) & (label != IGNORE)
    if nothing.any():
        raise ValueError(
            f"{record.image}: predicts no class at {nothing.sum()} labelled pixels; predict one of the "
            f"{row.num_classes} classes everywhere"
        )

    return np.where(pred == IGNORE, np.int16(0), pred), label


def _table(row: DatasetRow, path: Path, values: Values) -> LabelTable:
    if values == "labels" or (values == "saved" and in_stored_values(row)):
        return row.label_table(path)

    ids = {k: k for k in range(row.num_classes)}
    return LabelTable(
        row.num_classes, ids, [value for value in (255, 65535) if value not in ids]
    )


def _size(label: np.ndarray) -> str:
    return f"{label.shape[1]}x{label.shape[0]}"
