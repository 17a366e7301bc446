"""Toy data sets: procedural long-tailed scenes on disk in the real layouts of ten data sets.

Every picture is a pure function of (seed, domain, its number, size); a folder is complete when its marker
`toy.json` is there. Programs read these folders as they read the real ones.
"""

import struct
import warnings
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from common.data.catalogue.registry import DATASETS
from common.data.toy.canvas import DOMAINS, RAW_IDS
from common.data.toy.folder import MARKER, write_once
from common.data.toy.glyphs import ADE_RANKS, ade_scene, voc_scene
from common.data.toy.people import mhp_scene
from common.data.toy.scene import street_scene
from common.files import load_json, read_artifact

VERSION = 2  # of the drawings: raise it when a picture changes
_VAL_START = 1_000_000  # number of the first validation scene
_TRAIN_RAW = tuple(RAW_IDS[name] for name in DATASETS["cityscapes"].classes)
_TRAIN_IDS = np.full(256, 255, np.uint8)  # of raw ids
_TRAIN_IDS[list(_TRAIN_RAW)] = np.arange(len(_TRAIN_RAW))
_RAW_NAMES = {raw: name for name, raw in RAW_IDS.items()}
_SYNTHIA_IDS = {  # SYNTHIA's label ids; void (0) where SYNTHIA shows no such thing
    "sky": 1, "building": 2, "road": 3, "sidewalk": 4, "fence": 5, "vegetation": 6, "pole": 7, "car": 8,
    "traffic sign": 9, "person": 10, "bicycle": 11, "motorcycle": 12, "parking": 13, "traffic light": 15, "rider": 17,
    "bus": 19, "wall": 21,
}  # fmt: skip
_COCO_NAMES = {  # of VOC's classes, where COCO has another one
    "aeroplane": "airplane", "diningtable": "dining table", "motorbike": "motorcycle", "pottedplant": "potted plant",
    "sofa": "couch", "tvmonitor": "tv",
}  # fmt: skip

Size = tuple[int, int]


def write_cityscapes(root: str | Path, train: int = 96, val: int = 32, size: Size = (128, 256), seed: int = 0,
                     domain: str = "day", train_ids: bool = False) -> Path:  # fmt: skip
    """leftImg8bit and gtFine/…_labelIds.png (uint8 raw ids); with `train_ids` also …_labelTrainIds.png (255 ignore).

    Two training cities, one validation city. Returns `root`; nothing is done where the same set lies complete.
    """
    params = _params("cityscapes", train, val, size, seed, domain) | {
        "train_ids": bool(train_ids)
    }

    def fill(base: Path, counts: Counter) -> None:
        for split, index, number in _numbers(train, val):
            city = (
                "frankfurt"
                if split == "val"
                else "aachen"
                if index < (train + 1) // 2
                else "bochum"
            )
            stem = f"{city}/{city}_{index:06d}_000019"
            scene = street_scene(seed, domain, number, size)
            _save(base / "leftImg8bit" / split / f"{stem}_leftImg8bit.png", scene.image)
            _save(base / "gtFine" / split / f"{stem}_gtFine_labelIds.png", scene.label)
            if train_ids:
                _save(
                    base / "gtFine" / split / f"{stem}_gtFine_labelTrainIds.png",
                    _TRAIN_IDS[scene.label],
                )
            _count(counts, scene.label, _RAW_NAMES)

    return write_once(root, params, fill)


def write_acdc(root: str | Path, train: int = 96, val: int = 32, size: Size = (126, 224), seed: int = 0,
               domain: str = "fog") -> Path:  # fmt: skip
    """rgb_anon/<condition>/<split>/GOPR…/*_rgb_anon.png and gt/…/*_gt_labelTrainIds.png (255 ignored).

    The four conditions take turns; all pictures are of one domain.
    """
    params = _params("acdc", train, val, size, seed, domain)

    def fill(base: Path, counts: Counter) -> None:
        for split, index, number in _numbers(train, val):
            condition = ("fog", "night", "rain", "snow")[index % 4]
            drive = f"{condition}/{split}/GOPR{400 + index % 4:04d}"
            scene = street_scene(seed, domain, number, size)
            _save_adverse(base, drive, index, scene.image, scene.label, labelled=True)
            _count(counts, scene.label, _RAW_NAMES)

    return write_once(root, params, fill)


def write_dark_zurich(root: str | Path, train: int = 96, val: int = 32, size: Size = (126, 224), seed: int = 0,
                      domain: str = "dusk") -> Path:  # fmt: skip
    """rgb_anon/<split>/night/GOPR…/*_rgb_anon.png, and gt/… of `val` alone, as `train` has no labels."""
    params = _params("dark_zurich", train, val, size, seed, domain)

    def fill(base: Path, counts: Counter) -> None:
        for split, index, number in _numbers(train, val):
            drive = f"{split}/night/GOPR{351 if split == 'train' else 356:04d}"
            scene = street_scene(seed, domain, number, size)
            _save_adverse(base, drive, index, scene.image, scene.label, labelled=split == "val")
            _count(counts, scene.label, _RAW_NAMES)

    return write_once(root, params, fill)


def write_gta5(root: str | Path, train: int = 96, val: int = 0, size: Size = (128, 232), seed: int = 0,
               domain: str = "render") -> Path:  # fmt: skip
    """images/00001.png … and labels/ of the same names (palette PNG whose indices are raw ids). One split: no `val`."""
    params = _params("gta5", train, _unsplit("gta5", val), size, seed, domain)
    palette = {
        raw: colour for raw, colour in zip(_TRAIN_RAW, DATASETS["gta5"].palette, strict=True)
    }

    def fill(base: Path, counts: Counter) -> None:
        for _, index, number in _numbers(train, 0):
            scene = street_scene(seed, domain, number, size)
            _save(base / "images" / f"{index + 1:05d}.png", scene.image)
            _save_palette(base / "labels" / f"{index + 1:05d}.png", scene.label, palette)
            _count(counts, scene.label, _RAW_NAMES)

    return write_once(root, params, fill)


def write_synthia(root: str | Path, train: int = 96, val: int = 0, size: Size = (128, 216), seed: int = 0,
                  domain: str = "render") -> Path:  # fmt: skip
    """RGB/0000000.png … and GT/LABELS/ of the same names: 16-bit RGB PNG, red the class id, green the instance.

    Terrain, trucks and trains are void (0), as none occur in SYNTHIA-RAND-CITYSCAPES. One split: no `val`.
    """
    params = _params("synthia", train, _unsplit("synthia", val), size, seed, domain)
    table = np.zeros(256, np.uint16)
    for name, k in _SYNTHIA_IDS.items():
        table[RAW_IDS[name]] = k
    names = {k: name for name, k in _SYNTHIA_IDS.items()}

    def fill(base: Path, counts: Counter) -> None:
        for _, index, number in _numbers(train, 0):
            scene = street_scene(seed, domain, number, size)
            label = table[scene.label]
            _save(base / "RGB" / f"{index:07d}.png", scene.image)
            path = base / "GT" / "LABELS" / f"{index:07d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(
                encode_png16(np.stack([label, scene.instance, np.zeros_like(label)], -1))
            )
            _count(counts, label, names)

    return write_once(root, params, fill)


def write_voc(root: str | Path, train: int = 96, val: int = 32, size: Size = (128, 170), seed: int = 0,
              domain: str = "day") -> Path:  # fmt: skip
    """VOCdevkit/VOC2012: JPEGImages, SegmentationClassAug (palette PNG, outlines 255), train_aug.txt and val.txt.

    Every third picture is upright (`size` with its sides exchanged).
    """
    params = _params("voc", train, val, size, seed, domain)
    row = DATASETS["voc"]
    palette = dict(enumerate(row.palette)) | {255: (224, 224, 192)}

    def fill(base: Path, counts: Counter) -> None:
        base = base / "VOCdevkit" / "VOC2012"
        lists: dict[str, list[str]] = {"train": [], "val": []}
        for split, index, number in _numbers(train, val):
            name = f"{2008 if split == 'train' else 2007}_{index:06d}"
            scene = voc_scene(seed, domain, number, size)
            _save(base / "JPEGImages" / f"{name}.jpg", scene.image)
            _save_palette(base / "SegmentationClassAug" / f"{name}.png", scene.label, palette)
            _count(counts, scene.label, dict(enumerate(row.classes)))
            lists[split].append(name + "\n")
        (base / "ImageSets" / "Segmentation").mkdir(parents=True)
        for split, file in (("train", "train_aug.txt"), ("val", "val.txt")):
            (base / "ImageSets" / "Segmentation" / file).write_text("".join(lists[split]))

    return write_once(root, params, fill)


def write_coco(root: str | Path, train: int = 96, val: int = 32, size: Size = (128, 170), seed: int = 0,
               domain: str = "day") -> Path:  # fmt: skip
    """train2017, val2017 (jpg) and masks (8-bit png of both): the scenes of VOC, their outlines background."""
    params = _params("coco", train, val, size, seed, domain)
    row = DATASETS["coco"]
    names = [_COCO_NAMES.get(name, name) for name in DATASETS["voc"].classes]
    table = np.zeros(256, np.uint8)
    table[: len(names)] = [row.classes.index(name) for name in names]

    def fill(base: Path, counts: Counter) -> None:
        for split, _, number in _numbers(train, val):
            scene = voc_scene(seed, domain, number, size)
            label = table[scene.label]
            _save(base / f"{split}2017" / f"{number:012d}.jpg", scene.image)
            _save(base / "masks" / f"{number:012d}.png", label)
            _count(counts, label, dict(enumerate(row.classes)))

    return write_once(root, params, fill)


def write_ade20k_full(root: str | Path, train: int = 96, val: int = 32, size: Size = (128, 170), seed: int = 0,
                      domain: str = "day") -> Path:  # fmt: skip
    """images_detectron2 (jpg) and annotations_detectron2 (uint16 tif, 65535 unlabelled), training and validation.

    64 of the 847 classes occur, among them 255; every third picture is upright.
    """
    params = _params("ade20k_full", train, val, size, seed, domain)

    def fill(base: Path, counts: Counter) -> None:
        for split, index, number in _numbers(train, val):
            folder = {"train": "training", "val": "validation"}[split]
            name = f"ADE_{split}_{index + 1:08d}"
            scene = ade_scene(seed, domain, number, size)
            _save(base / "images_detectron2" / folder / f"{name}.jpg", scene.image)
            _save(base / "annotations_detectron2" / folder / f"{name}.tif", scene.label)
            _count(counts, scene.label, {k: f"class {k}" for k in range(847)})

    return write_once(root, params, fill)


def write_coco_stuff_lt(root: str | Path, train: int = 96, val: int = 32, size: Size = (128, 170), seed: int = 0,
                        domain: str = "day") -> Path:  # fmt: skip
    """images (jpg) and annotations (8-bit png, 255 unlabelled), train2017 and val2017.

    The scenes of ADE20K-Full; 64 of the 171 classes occur, in the order of the published counts.
    """
    params = _params("coco_stuff_lt", train, val, size, seed, domain)
    row = DATASETS["coco_stuff_lt_40k"]
    by_count = np.argsort(-np.array(row.published.image_count), kind="stable")
    table = np.full(1 << 16, 255, np.uint8)
    table[list(ADE_RANKS)] = by_count[
        np.round(np.linspace(0, row.num_classes - 1, len(ADE_RANKS))).astype(int)
    ]

    def fill(base: Path, counts: Counter) -> None:
        for split, _, number in _numbers(train, val):
            scene = ade_scene(seed, domain, number, size)
            label = table[scene.label]
            _save(base / "images" / f"{split}2017" / f"{number:012d}.jpg", scene.image)
            _save(base / "annotations" / f"{split}2017" / f"{number:012d}.png", label)
            _count(counts, label, dict(enumerate(row.classes)))

    return write_once(root, params, fill)


def write_mhpv2_lt(root: str | Path, train: int = 96, val: int = 32, size: Size = (128, 170), seed: int = 0,
                   domain: str = "day") -> Path:  # fmt: skip
    """images (jpg) and annotations (8-bit png; of every second image with three equal channels), train and val."""
    params = _params("mhpv2_lt", train, val, size, seed, domain)
    names = dict(enumerate(DATASETS["mhpv2_lt_7k"].classes))

    def fill(base: Path, counts: Counter) -> None:
        for split, index, number in _numbers(train, val):
            scene = mhp_scene(seed, domain, number, size)
            label = np.repeat(scene.label[..., None], 3, 2) if index % 2 else scene.label
            _save(base / "images" / split / f"{number}.jpg", scene.image)
            _save(base / "annotations" / split / f"{number}.png", label)
            _count(counts, scene.label, names)

    return write_once(root, params, fill)


LAYOUTS: dict[str, Callable[..., Path]] = {
    "cityscapes": write_cityscapes,
    "gta5": write_gta5,
    "synthia": write_synthia,
    "acdc": write_acdc,
    "dark_zurich": write_dark_zurich,
    "voc": write_voc,
    "coco": write_coco,
    "ade20k_full": write_ade20k_full,
    "coco_stuff_lt": write_coco_stuff_lt,
    "mhpv2_lt": write_mhpv2_lt,
}


def make(layout: str, root: str | Path, train: int | None = None, val: int | None = None, size: Size | None = None,
         seed: int = 0, domain: str | None = None, **options) -> Path:  # fmt: skip
    """Writes the toy set of a layout below `root` unless it lies there; None: the layout's default.

    Returns `root`. ValueError for an unknown layout or domain, an impossible size or number, and a root that holds
    something else.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"toy data: layout {layout!r} is unknown; known: {', '.join(LAYOUTS)}")
    given = {"train": train, "val": val, "size": size, "seed": seed, "domain": domain} | options
    return LAYOUTS[layout](
        root, **{key: value for key, value in given.items() if value is not None}
    )


def shares(root: str | Path) -> dict[str, float]:
    """Share of the pixels by class name, largest first, of the toy set at `root` (void and unlabelled: `void`)."""
    path = Path(root) / MARKER
    if not path.is_file():
        raise ValueError(
            f"{path}: no complete toy set lies here; write one with scripts/make_toy.py"
        )
    pixels = read_artifact(path, lambda path: dict(load_json(path)["pixels"]))
    total = sum(pixels.values())
    return {name: n / total for name, n in sorted(pixels.items(), key=lambda item: -item[1])}


def encode_png16(image: np.ndarray) -> bytes:
    """A 16-bit RGB PNG of a uint16 (H,W,3) array (which Pillow does not write; PNG specification, ISO/IEC 15948)."""
    if image.dtype != np.uint16 or image.ndim != 3 or image.shape[2] != 3:
        raise ValueError(f"16-bit PNG: needs uint16 (H,W,3), got {image.dtype} {image.shape}")
    height, width, _ = image.shape
    rows = image.astype(">u2").view(np.uint8).reshape(height, -1)
    # filter 2: each byte less the one above it
    rows = np.diff(rows, axis=0, prepend=np.zeros_like(rows[:1]))
    data = np.concatenate([np.full((height, 1), 2, np.uint8), rows], 1).tobytes()

    def chunk(kind: bytes, body: bytes) -> bytes:
        return (
            struct.pack(">I", len(body))
            + kind
            + body
            + struct.pack(">I", zlib.crc32(kind + body))
        )

    header = struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(data, 3))
        + chunk(b"IEND", b"")
    )


def _params(layout: str, train: int, val: int, size: Size, seed: int, domain: str) -> dict:
    """What a toy set is, as the marker keeps it. ValueError for what cannot be drawn."""
    if domain not in DOMAINS:
        raise ValueError(f"toy data: domain {domain!r} is unknown; known: {', '.join(DOMAINS)}")
    if len(size) != 2 or min(size) < 32 or max(size) > 8 * min(size):
        raise ValueError(
            f"toy data: size {tuple(size)} must be (height, width), 32 pixels at least, at most 1:8"
        )
    if not 1 <= train <= _VAL_START:
        raise ValueError(f"toy data: train = {train} images; give 1 to {_VAL_START}")
    if val < 0 or seed < 0:
        raise ValueError(f"toy data: val = {val} and seed = {seed} must not be negative")
    return {"version": VERSION, "layout": layout, "train": train, "val": val, "size": list(size), "seed": seed,
            "domain": domain}  # fmt: skip


def _unsplit(layout: str, val: int) -> int:
    if val:
        warnings.warn(f"toy data: {layout} has one split; val = {val} is ignored", stacklevel=3)
    return 0


def _numbers(train: int, val: int) -> Iterator[tuple[str, int, int]]:
    """(split, index in the split, number of the scene) of every picture."""
    yield from (("train", i, i) for i in range(train))
    yield from (("val", i, _VAL_START + i) for i in range(val))


def _count(counts: Counter, label: np.ndarray, names: dict[int, str]) -> None:
    for k, n in zip(*np.unique(label, return_counts=True), strict=True):
        counts[names.get(int(k), "void")] += int(n)


def _save(path: Path, array: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    options = {".png": {"compress_level": 1}, ".jpg": {"quality": 92}, ".tif": {}}[path.suffix]
    Image.fromarray(array).save(path, **options)


def _save_adverse(
    base: Path, drive: str, index: int, image: np.ndarray, label: np.ndarray, labelled: bool
) -> None:
    """An image of ACDC or Dark Zurich in the folder `drive`, and its raw ids as train ids."""
    stem = f"{drive}/{Path(drive).name}_frame_{index + 1:06d}"
    _save(base / "rgb_anon" / f"{stem}_rgb_anon.png", image)
    if labelled:
        _save(base / "gt" / f"{stem}_gt_labelTrainIds.png", _TRAIN_IDS[label])


def _save_palette(
    path: Path, label: np.ndarray, palette: dict[int, tuple[int, int, int]]
) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.frombytes("P", label.shape[::-1], label.tobytes())
    image.putpalette([channel for k in range(256) for channel in palette.get(k, (0, 0, 0))])
    image.save(path)
