"""A data set that a config describes by itself (`dataset: folder`), and what may not contradict itself in it."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import Any, Literal

from common.config import ConfigError, shown, typed
from common.data.catalogue.layouts import Paired, Record, below
from common.data.catalogue.lists import read_list
from common.data.catalogue.row import DatasetRow, colour_map
from common.data.labels import IGNORE, MOST_CLASSES, Colour, colour_codes

WHERE = "data.folder"  # how errors name the section
UNNAMED = "folder"  # what a set is called that gives itself no name
UNLABELLED = 255  # the value without a class, unless the section gives it one or names others


@dataclass(frozen=True)
class FolderConfig:
    """A data set described wholly in the config (`dataset: folder`); paths are relative to `root`.

    name: what tables, reports and results call it; a set with a name is also found without `root`, as a row is.
    images, labels: folders, `{split}` stands for the split. lists: split → file of image names (else all images).
    image_end, label_end: endings of the names that differ (`_leftImg8bit`, `_gtFine_labelIds`), with or without suffix.
    encoding: `index` (8- or 16-bit, grey or palette) or `rgb` (a colour is a class, by `palette`).
    ignore: stored values without a class (None: 255, unless that is a class); ignore_colours: the same of colour-coded
    labels. label_map: stored value → class id or -1, where they differ. tail: names of the tail classes.
    flip_pairs: (left, right) class ids that change places in a mirrored image.
    """

    images: str
    classes: tuple[str, ...]
    labels: str | None = None
    lists: Mapping[str, str] = field(default_factory=dict)
    image_end: str = ""
    label_end: str = ""
    encoding: Literal["index", "rgb"] = "index"
    palette: tuple[Colour, ...] = ()
    ignore: tuple[int, ...] | None = None
    ignore_colours: tuple[Colour, ...] = ()
    unlisted: Literal["error", "ignore"] = "error"
    label_map: Mapping[str, int] = field(default_factory=dict)
    tail: tuple[str, ...] = ()
    counts: tuple[int, ...] | None = None
    flip_pairs: tuple[tuple[int, int], ...] = ()
    name: str = UNNAMED


def folder_row(options: Mapping[str, Any]) -> DatasetRow:
    """The row that a `folder` section describes. ConfigError for what contradicts itself."""
    config = typed(FolderConfig, options, WHERE)
    _check_name(config.name)
    _check_paths(config)
    _check_classes(config)
    _check_pairs(config.flip_pairs, len(config.classes))
    values, ignore = _coloured(config) if config.encoding == "rgb" else _indexed(config)

    return DatasetRow(
        name=config.name,
        folder=config.name,
        classes=config.classes,
        palette=config.palette or colour_map(len(config.classes)),
        layout=_Listed(
            Paired(config.images, config.labels, config.image_end, config.label_end),
            config.lists,
        ),
        label_maps=(("", values),),
        ignore=ignore,
        unlisted=config.unlisted,
        encoding=config.encoding,
        tail=tuple(config.classes.index(c) for c in config.tail),
        counts=config.counts,
        flip_pairs=config.flip_pairs,
    )


@dataclass(frozen=True)
class _Listed:
    """A layout whose splits are list files."""

    inner: Paired
    lists: Mapping[str, str]

    def __call__(
        self, root: Path, split: str, lines: Sequence[str] | None = None
    ) -> list[Record]:
        if lines is None and split in self.lists:
            lines = read_list(below(root, self.lists[split]))
        return self.inner(root, split, lines)


def _indexed(config: FolderConfig) -> tuple[dict[int, int], tuple[int, ...]]:
    """Stored value → class id, and the values without a class."""
    if config.ignore_colours:
        raise ConfigError(
            f"{WHERE}: ignore_colours is for encoding: rgb; index labels have `ignore`"
        )

    place = "label_map" if config.label_map else "classes"
    values = _stored_values(config) or {k: k for k in range(len(config.classes))}

    for value in config.ignore or ():
        if values.get(value, IGNORE) != IGNORE:
            raise ConfigError(
                f"{WHERE}: ignore lists the value {value}, but by {place} it is class {values[value]} "
                f"{_name(config, values[value])}; take it out of one of them"
            )

    default = () if UNLABELLED in values else (UNLABELLED,)

    return values, default if config.ignore is None else config.ignore


def _coloured(config: FolderConfig) -> tuple[dict[int, int], tuple[int, ...]]:
    """`_indexed` of colour-coded labels; colours as `read_colours` codes them."""
    if not config.palette:
        raise ConfigError(f"{WHERE}: encoding rgb needs a palette, one colour per class")

    for key in ("ignore", "label_map"):
        if getattr(config, key):
            raise ConfigError(
                f"{WHERE}: {key} is for encoding: index; colour-coded labels have palette, ignore_colours"
            )

    twice = _repeated(config.palette)
    if twice:
        first, second = twice
        raise ConfigError(
            f"{WHERE}: palette gives classes {first} {_name(config, first)} and {second} {_name(config, second)} one "
            f"colour {list(config.palette[first])}, by which labels tell them apart; change one"
        )

    for colour in config.ignore_colours:
        if colour in config.palette:
            k = config.palette.index(colour)
            raise ConfigError(
                f"{WHERE}: ignore_colours lists {list(colour)}, but by palette it is class {k} {_name(config, k)}; "
                "take it out of one of them"
            )

    values = {code: k for k, code in enumerate(colour_codes(config.palette))}

    return values, tuple(colour_codes(config.ignore_colours))


def _stored_values(config: FolderConfig) -> dict[int, int]:
    """`label_map` with whole numbers as keys."""
    n = len(config.classes)
    values: dict[int, int] = {}

    for key, k in config.label_map.items():
        if not re.fullmatch(r"[0-9]{1,9}", key):
            raise ConfigError(
                f"{WHERE}: label_map key {key!r} is no stored value (a whole number)"
            )
        if not IGNORE <= k < n:
            raise ConfigError(
                f"{WHERE}: label_map sends the value {key} to class {k}, but there are {n} classes"
            )

        if values.setdefault(int(key), k) != k:
            raise ConfigError(
                f"{WHERE}: label_map sends the value {int(key)} to classes {values[int(key)]} and {k}"
            )

    return values


def _name(config: FolderConfig, k: int) -> str:
    return f"({config.classes[k]})"


def _check_name(name: str) -> None:
    """A name that files of the cache can have, too."""
    if not re.fullmatch(r"\w[\w .-]{0,79}", name):
        raise ConfigError(
            f"{WHERE}: name: {shown(name)} is no name; give letters, digits, blanks and _ . - (80 at most)"
        )


def _check_paths(config: FolderConfig) -> None:
    """Placeholders that are none, and labels that are the images themselves."""
    for key in ("images", "labels"):
        wrong = [
            word
            for word in re.findall(r"\{.*?\}", getattr(config, key) or "")
            if word != "{split}"
        ]
        if wrong:
            raise ConfigError(f"{WHERE}: {key}: {wrong[0]} stands for nothing; write {{split}}")

    if config.labels is None or PurePath(config.labels) != PurePath(config.images):
        return
    if config.image_end == config.label_end:
        raise ConfigError(
            f"{WHERE}: images and labels are one folder, {config.images!r}; tell their files apart by image_end and "
            "label_end, such as .jpg and .png, or _rgb.png and _mask.png"
        )


def _check_classes(config: FolderConfig) -> None:
    """The class list, and what is given once a class."""
    n = len(config.classes)
    if not 0 < n <= MOST_CLASSES:
        raise ConfigError(
            f"{WHERE}: classes names {n} classes; give 1 to {MOST_CLASSES}, as many as a label can hold"
        )

    twice = _repeated(config.classes)
    if twice:
        raise ConfigError(
            f"{WHERE}: classes {twice[0]} and {twice[1]} have one name, {config.classes[twice[0]]!r}; rename one, or "
            "merge them by label_map"
        )

    for key in ("palette", "counts"):
        given = getattr(config, key)
        if given and len(given) != n:
            unit = "colours" if key == "palette" else "values"
            raise ConfigError(f"{WHERE}: {key} has {len(given)} {unit} for {n} classes")

    for colour in (*config.palette, *config.ignore_colours):
        if not 0 <= min(colour) <= max(colour) <= 255:
            raise ConfigError(
                f"{WHERE}: {list(colour)} is no colour; give red, green, blue from 0 to 255"
            )

    if config.counts is not None and min(config.counts, default=0) < 0:
        raise ConfigError(f"{WHERE}: counts: {min(config.counts)} is no number of pixels")

    for name in config.tail:
        if name not in config.classes:
            raise ConfigError(
                f"{WHERE}: tail class {name!r} is none of the classes {', '.join(config.classes)}"
            )

    if _repeated(config.tail):
        raise ConfigError(
            f"{WHERE}: tail names {config.tail[_repeated(config.tail)[0]]!r} twice"
        )


def _repeated(items: Iterable[Any]) -> tuple[int, int] | None:
    """The places of the first item that comes again, and of its repetition."""
    first: dict[Any, int] = {}
    for k, item in enumerate(items):
        if item in first:
            return first[item], k
        first[item] = k

    return None


def _check_pairs(pairs: tuple[tuple[int, int], ...], num_classes: int) -> None:
    """A pair that names a class that is none, or one that is in a pair already."""
    seen: set[int] = set()
    for pair in pairs:
        for k in pair:
            if not 0 <= k < num_classes:
                wrong = f"{k} is none of the {num_classes} classes; give ids from 0 to {num_classes - 1}"
                raise ConfigError(f"{WHERE}: flip_pairs {list(pair)}: {wrong}")

            if k in seen:
                raise ConfigError(
                    f"{WHERE}: flip_pairs {list(pair)}: class {k} is named twice; give it one partner"
                )
            seen.add(k)
