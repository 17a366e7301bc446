"""Folder layouts: where a data set keeps the images and labels of a split.

A layout is a function (root, split, lines) → records, sorted by name. `lines` (of a list file) restrict the split;
where a data set keeps all its images in one folder (VOC, GTA5, SYNTHIA) they define it. A folder is found under other
capitals too, files whose names begin with a dot (macOS's `._x`, unfinished ones) are no part of a set.
"""

import os
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path, PurePath
from typing import NamedTuple

from common.data.catalogue.lists import IMAGE_SUFFIXES, pick, read_list, same_form


class Record(NamedTuple):
    """One image: its name (file stem, unique in the set), and its files."""

    name: str
    image: Path
    label: Path | None


Layout = Callable[[Path, str, Sequence[str] | None], list[Record]]


def any_case(folder: Path, name: str) -> Path:
    """`folder`/`name`, or what stands there under other capitals or in another Unicode form where that is missing.

    ValueError where several entries do.
    """
    exact = folder / name
    if exact.exists() or not folder.is_dir():
        return exact

    wanted = same_form(name).casefold()
    alike = sorted(
        entry for entry in os.listdir(folder) if same_form(entry).casefold() == wanted
    )
    if len(alike) > 1:
        raise ValueError(
            f"{exact}: missing, and {' and '.join(alike)} both resemble it; rename or link one to {name}"
        )

    return folder / alike[0] if alike else exact


def below(root: Path, relative: str) -> Path:
    """`root`/`relative`, each folder in any case."""
    path = root
    for part in PurePath(relative).parts:
        path = any_case(path, part)

    return path


def image_folder(root: Path, choices: Sequence[str]) -> Path:
    """The first of the folders below `root` that is there, in any case. ValueError names it and, where a folder of
    `root` holds the whole tree (an archive's own), that one."""
    folders = [below(root, relative) for relative in choices]
    for folder in folders:
        if folder.is_dir():
            return folder

    inner = sorted(entry for entry in root.iterdir() if entry.is_dir()) if root.is_dir() else []
    nested = [
        entry for entry in inner if any(below(entry, relative).is_dir() for relative in choices)
    ]
    advice = (
        f"it is in {nested[0]}: set `root` to that"
        if nested
        else "check the data set's root and split"
    )
    others = f" (nor is there {', '.join(choices[1:])})" if choices[1:] else ""
    raise ValueError(f"{folders[0]}: the folder of the images is missing{others}; {advice}")


def files(
    folder: Path, suffixes: Sequence[str] = IMAGE_SUFFIXES, what: str = "images"
) -> list[Path]:
    """The files of a folder (top level only), sorted. ValueError where the folder is missing or holds none."""
    if not folder.is_dir():
        raise ValueError(
            f"{folder}: the folder of the {what} is missing; check the data set's root and split"
        )

    found = visible_files(folder, suffixes)
    if not found:
        raise ValueError(f"{folder}: no {what} here ({', '.join(suffixes)})")

    return found


def visible_files(folder: Path, suffixes: Sequence[str]) -> list[Path]:
    """`files`, which may be none."""
    with os.scandir(folder) as entries:
        names = [entry.name for entry in entries if not entry.name.startswith(".")]
    return [folder / name for name in sorted(names) if name.lower().endswith(tuple(suffixes))]


class LabelFiles:
    """The label files of a folder by their stem. None and a folder that does not exist hold none: without labels a set
    is complete for `labels: false`."""

    def __init__(self, folder: Path | None, suffixes: Sequence[str] = IMAGE_SUFFIXES):
        there = folder is not None and folder.is_dir()
        self.found: dict[str, list[Path]] = defaultdict(list)

        for path in files(folder, suffixes, "labels") if there else ():
            self.found[same_form(path.stem)].append(path)

    def of(self, stem: str) -> Path | None:
        """The label with this stem, in either Unicode form. ValueError where there are several."""
        paths = self.found.get(same_form(stem), [])
        if len(paths) > 1:
            paths = [path for path in paths if path.stem == stem] or paths

        if len(paths) > 1:
            raise ValueError(
                f"{paths[0]}: {paths[1]} has the same stem; remove the one that is no label, or give the folder's "
                f"label_end with its suffix, such as {paths[0].suffix}"
            )

        return paths[0] if paths else None


@dataclass(frozen=True)
class Paired:
    """Images and labels in two folders (`{split}` allowed in the paths), paired by stem less their endings.

    An ending may include the suffix (`_rgb.png`, `.jpg`), so that images and labels can share a folder; in one folder,
    what ends as labels do is no image.
    unsplit: the folders hold the whole set (GTA5, SYNTHIA); `train` and `all` are everything, other splits need a list.
    splits: split → what stands for it in the paths, where that is another word (ADE20K: training, validation).
    """

    images: str
    labels: str | None
    image_end: str = ""
    label_end: str = ""
    unsplit: bool = False
    splits: Mapping[str, str] = field(default_factory=dict)

    def __call__(
        self, root: Path, split: str, lines: Sequence[str] | None = None
    ) -> list[Record]:
        if self.unsplit and lines is None and split not in ("train", "all"):
            raise ValueError(
                f"{root}: this data set has no split {split!r}; use train, or give a `list` of its images"
            )

        split = self.splits.get(split, split)
        folder = image_folder(root, [self.images.replace("{split}", split)])
        label_folder = (
            below(root, self.labels.replace("{split}", split)) if self.labels else None
        )
        image_end, image_suffixes = split_end(self.image_end)
        label_end, label_suffixes = split_end(self.label_end)

        images = [
            path for path in files(folder, image_suffixes) if path.stem.endswith(image_end)
        ]
        if label_folder == folder and label_end and label_end.endswith(image_end):
            images = [path for path in images if not path.stem.endswith(label_end)]

        labels = LabelFiles(label_folder, label_suffixes)

        def record(path: Path) -> Record:
            return Record(
                path.stem, path, labels.of(path.stem.removesuffix(image_end) + label_end)
            )

        return [record(path) for path in pick(images, lines, folder, image_end)]


def split_end(end: str) -> tuple[str, tuple[str, ...]]:
    """The ending of the stems, and the suffixes that files with it have: `_rgb.png` → `_rgb`, (`.png`,)."""
    for suffix in IMAGE_SUFFIXES:
        if end.lower().endswith(suffix):
            return end[: len(end) - len(suffix)], (suffix,)
    return end, IMAGE_SUFFIXES


CITYSCAPES_IMAGES = ("leftImg8bit", "leftImg8bit_sequence", "images")
CITYSCAPES_LABELS = ("gtFine", "segmentation", "annotations")


def cityscapes(root: Path, split: str, lines: Sequence[str] | None = None) -> list[Record]:
    """leftImg8bit/<split>/<city>/*_leftImg8bit.png and gtFine/<split>/<city>/*_gtFine_label{TrainIds,Ids}.png.

    The trees that other releases ask for are read too: images in leftImg8bit_sequence or images, labels in segmentation
    or annotations, with or without the folders of the cities. Train-id labels are preferred; raw ids are mapped when
    loaded.
    """
    folder = image_folder(root, [f"{name}/{split}" for name in CITYSCAPES_IMAGES])
    images = [
        path for place in _with_cities(folder) for path in visible_files(place, (".png",))
    ]
    if not images:
        raise ValueError(f"{folder}: no images here (<city>/*_leftImg8bit.png)")

    label_folders = [below(root, f"{name}/{split}") for name in CITYSCAPES_LABELS]
    labels = next((path for path in label_folders if path.is_dir()), None)
    label_of = {
        path.stem: path
        for place in _with_cities(labels)
        for path in visible_files(place, (".png",))
    }

    def record(path: Path) -> Record:
        key = path.stem.removesuffix("_leftImg8bit") + "_gtFine_label"
        return Record(
            path.stem, path, label_of.get(key + "TrainIds") or label_of.get(key + "Ids")
        )

    return [record(path) for path in pick(images, lines, folder, "_leftImg8bit")]


def _with_cities(folder: Path | None) -> list[Path]:
    """A folder and those in it, sorted; none where there is no such folder."""
    if folder is None:
        return []
    return [
        folder,
        *sorted(entry for entry in folder.iterdir() if entry.is_dir() and entry.name[0] != "."),
    ]


@dataclass(frozen=True)
class Adverse:
    """rgb_anon/…/*_rgb_anon.png and gt/…/*_gt_label{TrainIds,Ids}.png: ACDC and Dark Zurich.

    A split lies in <condition>/<split> as ACDC comes, in <split>/<condition> as Dark Zurich comes, with or without the
    folders of the drives, or in <split> alone, where its files were brought together. The first of these that is there
    is read. Splits without a folder below gt have no labels.
    conditions: which of them the set has; others in the same tree are left out.
    """

    conditions: tuple[str, ...]

    def __call__(
        self, root: Path, split: str, lines: Sequence[str] | None = None
    ) -> list[Record]:
        image_folder(root, list(chain(*self._places("rgb_anon", split))))
        folder = below(root, "rgb_anon")
        images = self._pngs(root, "rgb_anon", split)
        if not images:
            raise ValueError(f"{folder}: no images of split {split!r} here (*_rgb_anon.png)")

        label_of = {path.stem: path for path in self._pngs(root, "gt", split)}

        def record(path: Path) -> Record:
            key = path.stem.removesuffix("_rgb_anon") + "_gt_label"
            return Record(
                path.stem, path, label_of.get(key + "TrainIds") or label_of.get(key + "Ids")
            )

        return [record(path) for path in pick(images, lines, folder, "_rgb_anon")]

    def _places(self, kind: str, split: str) -> tuple[list[str], ...]:
        """The three arrangements, each the folders of a split below the root."""
        return (
            [f"{kind}/{condition}/{split}" for condition in self.conditions],
            [f"{kind}/{split}/{condition}" for condition in self.conditions],
            [f"{kind}/{split}"],
        )

    def _pngs(self, root: Path, kind: str, split: str) -> list[Path]:
        """The files of the first arrangement that is there."""
        for places in self._places(kind, split):
            folders = [below(root, place) for place in places]
            folders = [folder for folder in folders if folder.is_dir()]
            if folders:
                inner = [place for folder in folders for place in _with_cities(folder)]
                return [path for place in inner for path in visible_files(place, (".png",))]

        return []


def coco(root: Path, split: str, lines: Sequence[str] | None = None) -> list[Record]:
    """train2017 and val2017 (here or below images/) and masks of the same names: of both in masks/, or of each in a
    folder there."""
    part = f"{split}2017"
    folder = image_folder(root, [part, f"images/{part}"])
    own = below(root, f"masks/{part}")
    masks = LabelFiles(own if own.is_dir() else below(root, "masks"), (".png",))

    return [
        Record(path.stem, path, masks.of(path.stem))
        for path in pick(files(folder, (".jpg",)), lines, folder)
    ]


def voc(root: Path, split: str, lines: Sequence[str] | None = None) -> list[Record]:
    """VOCdevkit/VOC2012 (or VOC2012, or the root itself): JPEGImages, labels of SegmentationClassAug, else
    SegmentationClass.

    The images are those of `list`, else of ImageSets/Segmentation/<split>.txt.
    """
    choices = (below(root, "VOCdevkit/VOC2012"), below(root, "VOC2012"))
    base = next((path for path in choices if path.is_dir()), root)
    if lines is None:
        path = base / "ImageSets" / "Segmentation" / f"{split}.txt"
        if not path.is_file():
            known = sorted(other.stem for other in path.parent.glob("*.txt"))
            raise ValueError(
                f"{path}: no such split; here are {', '.join(known) or 'none'}; or give a `list`"
            )

        lines = read_list(path)

    folder = base / "JPEGImages"
    images = pick(files(folder, (".jpg",)), lines, folder)
    augmented = LabelFiles(base / "SegmentationClassAug", (".png",))
    plain = LabelFiles(base / "SegmentationClass", (".png",))

    return [
        Record(path.stem, path, augmented.of(path.stem) or plain.of(path.stem))
        for path in images
    ]
