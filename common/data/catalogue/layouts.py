"""Folder layouts: where a data set keeps the images and labels of a split.

A layout is a function (root, split, names) → records, sorted by name. `names` (from a list file) restricts the split;
where a data set keeps all its images in one folder (VOC, GTA5, SYNTHIA) it defines the split.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp")


class Record(NamedTuple):
    """One image: its name (file stem, unique in the set), and its files."""

    name: str
    image: Path
    label: Path | None


Layout = Callable[[Path, str, Sequence[str] | None], list[Record]]


def read_list(path: Path) -> list[str]:
    """Image names of a list file: the first word of each line, without folders and suffix. Empty lines are skipped."""
    try:
        lines = path.read_text().splitlines()
    except OSError as error:
        raise ValueError(f"{path}: cannot read the list of images ({error.strerror})") from error
    names = [Path(line.split()[0]).name.split(".")[0] for line in lines if line.strip()]
    if not names:
        raise ValueError(f"{path}: the list names no image")
    return names


def files(folder: Path, suffixes: Sequence[str] = IMAGE_SUFFIXES, what: str = "images") -> dict[str, Path]:
    """Stem → file of a folder (top level only). ValueError where the folder is missing or holds none."""
    if not folder.is_dir():
        raise ValueError(f"{folder}: the folder of the {what} is missing; check the data set's root and split")
    with os.scandir(folder) as entries:
        names = [entry.name for entry in entries if entry.name.lower().endswith(tuple(suffixes))]
    if not names:
        raise ValueError(f"{folder}: no {what} here ({', '.join(suffixes)})")
    return {Path(name).stem: folder / name for name in sorted(names)}


def optional_files(folder: Path | None, suffixes: Sequence[str] = IMAGE_SUFFIXES) -> dict[str, Path]:
    """`files`, but empty where there is no such folder: a set without labels is complete for `labels: false`."""
    return files(folder, suffixes, "labels") if folder is not None and folder.is_dir() else {}


def pick(records: dict[str, Record], names: Sequence[str] | None, where: Path) -> list[Record]:
    """The named records in the list's order, or all sorted by name."""
    if names is None:
        return [records[name] for name in sorted(records)]
    missing = [name for name in names if name not in records]
    if missing:
        raise ValueError(f"{where}: no image named {missing[0]!r} ({len(missing)} of {len(names)} listed are missing)")
    return [records[name] for name in names]


@dataclass(frozen=True)
class Paired:
    """Images and labels in two folders (`{split}` allowed in the paths), paired by stem less their endings.

    unsplit: the folders hold the whole set (GTA5, SYNTHIA); `train` and `all` are everything, other splits need a list.
    splits: split → what stands for it in the paths, where that is another word (ADE20K: training, validation).
    """

    images: str
    labels: str | None
    image_end: str = ""
    label_end: str = ""
    unsplit: bool = False
    splits: Mapping[str, str] = field(default_factory=dict)

    def __call__(self, root: Path, split: str, names: Sequence[str] | None = None) -> list[Record]:
        if self.unsplit and names is None and split not in ("train", "all"):
            raise ValueError(f"{root}: this data set has no split {split!r}; use train, or give a `list` of its images")
        split = self.splits.get(split, split)
        folder = root / self.images.format(split=split)
        labels = optional_files(root / self.labels.format(split=split) if self.labels else None)
        records = {}
        for stem, path in files(folder).items():
            if stem.endswith(self.image_end):
                key = stem.removesuffix(self.image_end) + self.label_end
                records[stem] = Record(stem, path, labels.get(key))
        return pick(records, _complete(names, self.image_end), folder)


def _complete(names: Sequence[str] | None, end: str) -> list[str] | None:
    return None if names is None else [name if name.endswith(end) else name + end for name in names]


def cityscapes(root: Path, split: str, names: Sequence[str] | None = None) -> list[Record]:
    """leftImg8bit/<split>/<city>/*_leftImg8bit.png and gtFine/<split>/<city>/*_gtFine_label{TrainIds,Ids}.png.

    Sorted by city and name. Train-id labels are preferred; raw ids are mapped when loaded.
    """
    folder = root / "leftImg8bit" / split
    if not folder.is_dir():
        raise ValueError(f"{folder}: the folder of the images is missing; check the data set's root and split")
    records: dict[str, Record] = {}
    for city in sorted(entry.name for entry in os.scandir(folder) if entry.is_dir()):
        label_files = optional_files(root / "gtFine" / split / city, (".png",))
        for stem, path in files(folder / city, (".png",)).items():
            key = stem.removesuffix("_leftImg8bit") + "_gtFine_label"
            records[stem] = Record(stem, path, label_files.get(key + "TrainIds") or label_files.get(key + "Ids"))
    if not records:
        raise ValueError(f"{folder}: no images here (<city>/*_leftImg8bit.png)")
    return pick(records, _complete(names, "_leftImg8bit"), folder)


def voc(root: Path, split: str, names: Sequence[str] | None = None) -> list[Record]:
    """VOCdevkit/VOC2012 (or VOC2012 itself): JPEGImages, labels of SegmentationClassAug, else SegmentationClass.

    The names come from `list`, else from ImageSets/Segmentation/<split>.txt.
    """
    base = root / "VOCdevkit" / "VOC2012"
    base = base if base.is_dir() else root
    if names is None:
        path = base / "ImageSets" / "Segmentation" / f"{split}.txt"
        if not path.is_file():
            known = sorted(other.stem for other in path.parent.glob("*.txt"))
            raise ValueError(f"{path}: no such split; here are {', '.join(known) or 'none'}; or give a `list`")
        names = read_list(path)
    images = files(base / "JPEGImages", (".jpg",))
    label_files = optional_files(base / "SegmentationClass", (".png",))
    label_files |= optional_files(base / "SegmentationClassAug", (".png",))
    records = {stem: Record(stem, path, label_files.get(stem)) for stem, path in images.items()}
    return pick(records, names, base / "JPEGImages")
