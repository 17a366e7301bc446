"""The six data sets of the LTSS benchmark (TMM 2024): three long-tailed ones, and their balanced references.

The tables beside this module hold one class a line, in the order of the train ids: the original id, then of the
long-tailed sets the number of training images that show the class and its pixel-level group, then its name.
"""

from functools import cache
from importlib.resources import files
from typing import NamedTuple

import numpy as np

from common.data.catalogue.layouts import Paired
from common.data.catalogue.row import DatasetRow, Published, colour_map
from common.data.imbalance import GROUPS, groups

ENV = "DETECTRON2_DATASETS"
_ADE_SPLITS = {"train": "training", "val": "validation"}
_COCO_SPLITS = {"train": "train2017", "val": "val2017"}
_ADE = Paired("images/{split}", "annotations_detectron2/{split}", splits=_ADE_SPLITS)
_ADE_FULL = Paired(
    "images_detectron2/{split}", "annotations_detectron2/{split}", splits=_ADE_SPLITS
)
_COCO = Paired("images/{split}", "annotations/{split}", splits=_COCO_SPLITS)
_MHP = Paired("images/{split}", "annotations/{split}")
# left, right
MHP_FLIP_PAIRS = ((5, 6), (7, 8), (22, 23), (24, 25), (26, 27), (28, 29), (30, 31), (32, 33))
_GROUP_LETTERS = {name[0]: name for name in GROUPS}


class ClassTable(NamedTuple):
    """A table's columns, one entry per class; `counts` and `pixel_groups` are empty for a balanced set."""

    ids: tuple[int, ...]
    counts: tuple[int, ...]
    pixel_groups: tuple[str, ...]
    names: tuple[str, ...]


@cache
def class_table(name: str) -> ClassTable:
    """The class table of a data set: `ade20k`, `ade20k_full`, `coco_stuff_lt` or `mhpv2_lt`. ADE20K-Full's table holds
    no names: its classes are `object <id>` until the prepared data set brings them."""
    lines = (
        files("common.data.catalogue")
        .joinpath("tables", f"{name}.txt")
        .read_text(encoding="utf-8")
        .splitlines()
    )
    if name == "ade20k":
        ids, names = zip(*(line.split(" ", 1) for line in lines), strict=True)
        return ClassTable(tuple(map(int, ids)), (), (), names)

    cells = [line.split(" ", 3) for line in lines]
    names = tuple(cell[3] if len(cell) > 3 else f"object {cell[0]}" for cell in cells)
    ids, counts = (tuple(int(cell[k]) for cell in cells) for k in (0, 1))

    return ClassTable(ids, counts, tuple(_GROUP_LETTERS[cell[2]] for cell in cells), names)


def coco_things() -> tuple[str, ...]:
    """COCO's 80 things, which come first among the classes of COCO-Stuff."""
    table = class_table("coco_stuff_lt")
    return tuple(name for k, name in zip(table.ids, table.names, strict=True) if k <= 90)


def _row(
    name: str, folder: str, table: str, layout: Paired, images: int | None = None, **fields
) -> DatasetRow:
    """The row of a set; `images` is the number of training images that the table's counts are of."""
    columns = class_table(table)
    if images is not None:
        rank = groups(np.array(columns.counts))
        by_image = tuple(GROUPS[k] for k in rank)
        fields["published"] = Published(images, columns.counts)
        fields["groups"] = {"image": by_image, "pixel": columns.pixel_groups}

    palette = colour_map(len(columns.names))
    return DatasetRow(name, folder, columns.names, palette, layout, env=ENV, **fields)


LTSS_ROWS = (
    _row("ade20k", "ADEChallengeData2016", "ade20k", _ADE),
    _row("ade20k_full", "ADE20K_2021_17_01", "ade20k_full", _ADE_FULL, 25574, ignore=(65535,)),
    _row("coco_stuff_118k", "coco_stuff_118k", "coco_stuff_lt", _COCO),
    _row("coco_stuff_lt_40k", "coco_stuff_lt_40k", "coco_stuff_lt", _COCO, 40679),
    _row("mhpv2_15k", "mhpv2_15k", "mhpv2_lt", _MHP, flip_pairs=MHP_FLIP_PAIRS),
    _row("mhpv2_lt_7k", "mhpv2_lt_7k", "mhpv2_lt", _MHP, 6931, flip_pairs=MHP_FLIP_PAIRS),
)
