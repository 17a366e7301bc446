"""The data sets: one row each. Adding one is adding a row.

A row's root is `root` of the config, else $LTS_DATA/<folder> ($DETECTRON2_DATASETS for the sets of the LTSS
benchmark), else ./datasets/<folder>, else ./dataset/<folder>; the folder's name in any case.
"""

import os
from pathlib import Path

from common.config import SourceConfig
from common.data.catalogue import layouts
from common.data.catalogue.folder import UNNAMED, folder_row
from common.data.catalogue.layouts import Paired, any_case
from common.data.catalogue.ltss import LTSS_ROWS, coco_things
from common.data.catalogue.row import DatasetRow, colour_map
from common.data.labels import IGNORE

CITYSCAPES_CLASSES = (
    *(
        "road",
        "sidewalk",
        "building",
        "wall",
        "fence",
        "pole",
        "traffic light",
        "traffic sign",
        "vegetation",
    ),
    *(
        "terrain",
        "sky",
        "person",
        "rider",
        "car",
        "truck",
        "bus",
        "train",
        "motorcycle",
        "bicycle",
    ),
)
CITYSCAPES_PALETTE = (
    *(
        (128, 64, 128),
        (244, 35, 232),
        (70, 70, 70),
        (102, 102, 156),
        (190, 153, 153),
        (153, 153, 153),
    ),
    *(
        (250, 170, 30),
        (220, 220, 0),
        (107, 142, 35),
        (152, 251, 152),
        (70, 130, 180),
        (220, 20, 60),
        (255, 0, 0),
    ),
    *((0, 0, 142), (0, 0, 70), (0, 60, 100), (0, 80, 100), (0, 0, 230), (119, 11, 32)),
)
# DAFormer's: lights and signs, people, vehicles
CITYSCAPES_THINGS = (6, 7, 11, 12, 13, 14, 15, 16, 17, 18)
CITYSCAPES_TAIL = (3, 6, 7, 12, 14, 15, 16, 17, 18)  # the nine smallest training counts
CITYSCAPES_COUNTS = (  # gtFine train, 2975 images; 715 747 311 further pixels are void
    *(
        2036416525,
        336090793,
        1260636120,
        36199498,
        48454166,
        67789506,
        11477088,
        30448193,
        879783988,
        63949536,
    ),
    *(221979646, 67326424, 7463162, 386328286, 14772328, 12990290, 12863955, 5449152, 22861233),
)
GTA5_COUNTS = (  # all 24 966 images; 5 605 086 111 further pixels are void
    *(
        16099193283,
        4155428633,
        8478285320,
        925367586,
        317481282,
        531401266,
        67288808,
        40463971,
        3810296251,
    ),
    *(
        1074861777,
        6784666433,
        181828023,
        15321782,
        1259269812,
        564950248,
        184638969,
        32522117,
        15799033,
        2718199,
    ),
)
# of train ids 0..18
_RAW_IDS = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)
_RAW = dict.fromkeys(range(35), IGNORE) | {raw: k for k, raw in enumerate(_RAW_IDS)}
_SYNTHIA = {
    3: 0,
    4: 1,
    2: 2,
    21: 3,
    5: 4,
    7: 5,
    15: 6,
    9: 7,
    6: 8,
    16: 9,
    1: 10,
    10: 11,
    17: 12,
    8: 13,
    18: 14,
}
_SYNTHIA |= {19: 15, 20: 16, 12: 17, 11: 18}
_ALL = tuple(range(19))
# the classes that SYNTHIA shares with Cityscapes
_SIXTEEN = tuple(k for k in _ALL if k not in (9, 14, 16))
_THIRTEEN = tuple(k for k in _SIXTEEN if k not in (3, 4, 5))


def _street(
    name: str, folder: str, keep: tuple[int, ...], *, counts: tuple[int, ...] | None, **fields
) -> DatasetRow:
    """A row over the Cityscapes train ids in `keep`, renumbered in order; the others are ignored."""
    new = (
        dict.fromkeys(_ALL, IGNORE) | {old: k for k, old in enumerate(keep)} | {IGNORE: IGNORE}
    )
    maps = tuple(
        (end, {raw: new[k] for raw, k in values.items()}) for end, values in fields.pop("maps")
    )
    return DatasetRow(
        name=name,
        folder=folder,
        classes=tuple(CITYSCAPES_CLASSES[k] for k in keep),
        palette=tuple(CITYSCAPES_PALETTE[k] for k in keep),
        label_maps=maps,
        tail=tuple(new[k] for k in CITYSCAPES_TAIL if k in keep),
        things=tuple(new[k] for k in CITYSCAPES_THINGS if k in keep),
        counts=counts and tuple(counts[k] for k in keep),
        **fields,
    )


def _cityscapes(name: str, keep: tuple[int, ...]) -> DatasetRow:
    maps = (("_labelTrainIds", {k: k for k in _ALL}), ("", _RAW))
    return _street(
        name, "cityscapes", keep, counts=CITYSCAPES_COUNTS, maps=maps, layout=layouts.cityscapes
    )


def _adverse(name: str, conditions: tuple[str, ...]) -> DatasetRow:
    """ACDC and Dark Zurich, labelled as Cityscapes; training counts are not published."""
    maps = (("_labelTrainIds", {k: k for k in _ALL}), ("", _RAW))
    layout = layouts.Adverse(conditions)
    return _street(name, name, _ALL, counts=None, maps=maps, layout=layout)


def _synthia(name: str, keep: tuple[int, ...]) -> DatasetRow:
    layout = Paired("RGB", "GT/LABELS", unsplit=True)
    maps = (("", _SYNTHIA),)
    return _street(
        name,
        "synthia",
        keep,
        counts=None,
        maps=maps,
        layout=layout,
        ignore=(),
        unlisted="ignore",
    )


VOC_CLASSES = (
    *(
        "background",
        "aeroplane",
        "bicycle",
        "bird",
        "boat",
        "bottle",
        "bus",
        "car",
        "cat",
        "chair",
        "cow",
    ),
    *(
        "diningtable",
        "dog",
        "horse",
        "motorbike",
        "person",
        "pottedplant",
        "sheep",
        "sofa",
        "train",
        "tvmonitor",
    ),
)
# what is no thing is a class too: it is trained and counted
COCO_CLASSES = ("background", *coco_things())
CAMVID_CLASSES = (
    *("sky", "building", "pole", "road", "pavement", "tree"),
    *("sign", "fence", "car", "pedestrian", "bicyclist"),
)
CAMVID_PALETTE = (
    *(
        (128, 128, 128),
        (128, 0, 0),
        (192, 192, 128),
        (128, 64, 128),
        (60, 40, 222),
        (128, 128, 0),
    ),
    *((192, 128, 128), (64, 64, 128), (64, 0, 128), (64, 64, 0), (0, 128, 192)),
)

_ROWS = (
    _cityscapes("cityscapes", _ALL),
    _cityscapes("cityscapes16", _SIXTEEN),
    _cityscapes("cityscapes13", _THIRTEEN),
    _street(
        "gta5",
        "gta5",
        _ALL,
        counts=GTA5_COUNTS,
        maps=(("", _RAW),),
        layout=Paired("images", "labels", unsplit=True),
        resize_labels=True,
    ),
    _synthia("synthia", _SIXTEEN),
    _synthia("synthia13", _THIRTEEN),
    _synthia("synthia19", _ALL),
    _adverse("acdc", ("fog", "night", "rain", "snow")),
    _adverse("dark_zurich", ("night",)),
    DatasetRow("voc", "voc", VOC_CLASSES, colour_map(21), layouts.voc),
    DatasetRow("coco", "coco", COCO_CLASSES, colour_map(81), layouts.coco),
    DatasetRow(
        "camvid",
        "camvid",
        CAMVID_CLASSES,
        CAMVID_PALETTE,
        Paired("images/{split}", "labels/{split}"),
        tail=(2, 6, 7, 9, 10),
        things=(6, 8, 9, 10),
    ),
    *LTSS_ROWS,
)
DATASETS: dict[str, DatasetRow] = {row.name: row for row in _ROWS}


def resolve(source: SourceConfig) -> tuple[DatasetRow, Path]:
    """The row and the root folder of a source. ValueError says what was looked for and how to set it."""
    row = row_of(source)
    if source.root is None and row.name == UNNAMED:
        raise ValueError("dataset: folder needs `root`, or a `name` in its `folder` section")

    root, origin = (
        (Path(source.root).expanduser(), "`root` of the config") if source.root else home(row)
    )
    if not root.is_dir():
        ways = f"set `root`, or {row.env} to the folder that holds {row.folder}/, or link it: ln -s WHERE_IT_IS {root}"
        if root.name.startswith("toy"):
            ways = "scripts/make_toy.py makes toy sets, as do scripts/demo.sh and `main.sh toy` (docs/datasets.md)"
        raise ValueError(f"data set {row.name!r}: no folder {root} ({origin}); {ways}")

    return row.named(root), root


def row_of(source: SourceConfig) -> DatasetRow:
    """The row that a source names, or that it describes; no file is looked at. ValueError where it does neither."""
    if source.dataset in DATASETS:
        return DATASETS[source.dataset]

    if source.dataset != "folder":
        raise ValueError(
            f"dataset {source.dataset!r} is unknown; known: {', '.join(DATASETS)}, folder"
        )
    if source.folder is None:
        raise ValueError("dataset: folder needs a `folder` section that describes it")

    return folder_row(source.folder)


def home(row: DatasetRow) -> tuple[Path, str]:
    """Where a row's files lie or belong, and what says so: $LTS_DATA/<folder>, else ./datasets/<folder> or, where only
    that is there, ./dataset/<folder>; each in any case."""
    value = os.environ.get(row.env)
    if value:
        return any_case(Path(value).expanduser(), row.folder), f"${row.env}"

    places = [any_case(Path(base), row.folder) for base in ("datasets", "dataset")]
    found = next((place for place in places if place.is_dir()), places[0])

    return found, f"${row.env} is not set"
