"""What a data set is, apart from where it lies."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Literal

from common.data.catalogue.layouts import Layout
from common.data.catalogue.lists import read_text
from common.data.labels import Colour, LabelTable

NAMES_FILE = "class_names.txt"


@dataclass(frozen=True)
class Published:
    """Class counts of a training split as its authors publish them.

    images: number of training images; image_count (K,): how many of them show each class.
    """

    images: int
    image_count: tuple[int, ...]

    @property
    def frequency(self) -> tuple[float, ...]:
        """Share of the training images that show each class, (K,)."""
        return tuple(count / self.images for count in self.image_count)


@dataclass(frozen=True)
class DatasetRow:
    """What a data set is. Nothing here depends on where it lies.

    label_maps: (ending of the label file's stem, stored value → class id or IGNORE) pairs; the first ending that fits
    applies. Empty: stored values are class ids. `ignore` are stored values without a class; a value listed nowhere is
    an error, or ignored where that is the data set's convention (`unlisted`).
    tail: class ids of mIoU(tail). things: class ids of what can be counted (lights, people, vehicles). counts: pixels
    of each class in the training split, where they are published.
    resize_labels: some labels of the release are smaller than their image and are brought to its size (nearest).
    flip_pairs: (left, right) classes that change places in a mirrored image.
    published: image counts of the training split. groups: level ("image", "pixel") → "rare", "common" or "frequent" of
    each class, by the authors' training counts.
    """

    name: str
    folder: str
    classes: tuple[str, ...]
    palette: tuple[Colour, ...]
    layout: Layout
    label_maps: tuple[tuple[str, Mapping[int, int]], ...] = ()
    ignore: tuple[int, ...] = (255,)
    unlisted: Literal["error", "ignore"] = "error"
    encoding: Literal["index", "rgb"] = "index"
    tail: tuple[int, ...] = ()
    things: tuple[int, ...] = ()
    counts: tuple[int, ...] | None = None
    resize_labels: bool = False
    env: str = "LTS_DATA"
    flip_pairs: tuple[tuple[int, int], ...] = ()
    published: Published | None = None
    groups: Mapping[str, tuple[str, ...]] | None = None

    @property
    def num_classes(self) -> int:
        return len(self.classes)

    @property
    def meaning(self) -> list:
        """Classes and what stored label values stand for, as JSON can hold it: whatever is counted depends on it."""
        maps = [[end, sorted(values.items())] for end, values in self.label_maps]
        return [self.classes, maps, self.ignore, self.unlisted, self.encoding]

    @cached_property
    def _tables(self) -> tuple[tuple[str, LabelTable], ...]:
        maps = self.label_maps or (("", {k: k for k in range(self.num_classes)}),)
        n = self.num_classes
        return tuple(
            (end, LabelTable(n, values, self.ignore, self.unlisted, self.encoding))
            for end, values in maps
        )

    def label_table(self, path: Path) -> LabelTable:
        """The table that decodes the label file `path`."""
        return next(table for end, table in self._tables if path.stem.endswith(end))

    def named(self, root: Path) -> "DatasetRow":
        """The row with the class names of `root`/class_names.txt, where that file is: one name per line, in the order
        of the class ids. ValueError where it does not name every class."""
        path = root / NAMES_FILE
        if not path.is_file():
            return self

        names = tuple(line.strip() for line in read_text(path, "class names").splitlines())
        if len(names) != self.num_classes or not all(names):
            raise ValueError(
                f"{path}: has {sum(map(bool, names))} names in {len(names)} lines, but {self.name} has "
                f"{self.num_classes} classes; write one name per line, or remove the file"
            )

        return replace(self, classes=names)


def colour_map(n: int) -> tuple[Colour, ...]:
    """The VOC colours: bits 0, 1, 2 of the class id are the highest bits of red, green, blue, bits 3-5 the next."""
    return tuple(
        tuple(
            sum((k >> (3 * bit + channel) & 1) << (7 - bit) for bit in range(8))
            for channel in range(3)
        )
        for k in range(n)
    )
