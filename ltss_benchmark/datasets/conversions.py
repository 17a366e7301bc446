"""How the releases' label files become the benchmark's: one function a data set, each a job of `preparation.run`."""

import re
from collections import defaultdict
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageFile

from common.data.catalogue.ltss import class_table
from common.data.decoding import check_png, decoding, opened, read_bytes
from common.data.geometry import Geometry, bilinear, nearest_crop
from common.data.images import Picture
from common.data.labels import LabelTable, read_index
from ltss_benchmark.datasets.preparation import place, save

SHORT_SIDE = 512  # of ADE20K-Full: larger images are shrunk to it
_UNNAMED = 65535


def ade20k_label(job: tuple[Path, Path]) -> None:
    """0 (nothing) → 255, 1 … 150 → 0 … 149."""
    source, target = job
    if target.exists():
        return

    raw = read_index(source)
    if raw.dtype != np.uint8 or raw.max() > 150:
        raise ValueError(f"{source}: label value {raw.max()} is none of ADE20K's 0 to 150")

    save(raw - np.uint8(1), target)


def coco_stuff_label(job: tuple[Path, Path]) -> None:
    """Category id − 1 (0 … 181, 255 nothing) → train id 0 … 170, 255."""
    source, target = job
    if not target.exists():
        save(_coco_table().read(source).astype(np.uint8), target)  # −1 becomes 255


@cache
def _coco_table() -> LabelTable:
    ids = class_table("coco_stuff_lt").ids
    return LabelTable(
        len(ids), {category - 1: k for k, category in enumerate(ids)}, ignore=(255,)
    )


def ade20k_full_pair(job: tuple[Path, Path, Path, Path]) -> None:
    """Image and *_seg.png → image (jpg) and 16-bit label of train ids (tif, 65535 nothing), the short side 512 at most.

    The object index is ⌊red / 10⌋ · 256 + green. Images are shrunk bilinearly without smoothing, labels by the nearest
    pixel, both as OpenCV does; every image is encoded anew, and its EXIF orientation is not applied.
    """
    image_path, seg_path, image_target, label_target = job
    if image_target.exists() and label_target.exists():
        return

    pixels = _pixels(image_path)
    seg = _pixels(seg_path)
    if seg.ndim != 3 or seg.shape[:2] != pixels.shape[:2]:
        raise ValueError(
            f"{seg_path}: is {seg.shape}, expected a colour image of the size of {image_path.name}"
        )

    index = seg[..., 0].astype(np.int32) // 10 * 256 + seg[..., 1]
    size = ade20k_full_size(pixels.shape[:2])
    if size != pixels.shape[:2]:
        g = Geometry(*pixels.shape[:2], *size, 0, 0, 0)
        grey = pixels.ndim == 2
        picture = Picture.of(np.repeat(pixels[..., None], 3, 2) if grey else pixels)
        resized = bilinear(picture, g, size).permute(1, 2, 0).numpy()
        pixels = resized[..., 0] if grey else resized
        index = nearest_crop(index, g, size)

    save(_ade20k_full_table()[index], label_target)
    save(np.ascontiguousarray(pixels), image_target)


def ade20k_full_size(size: tuple[int, int]) -> tuple[int, int]:
    """(height, width) with the short side brought down to 512; the long side is rounded half to even."""
    height, width = size
    if min(size) <= SHORT_SIDE:
        return height, width
    if width >= height:
        return SHORT_SIDE, round(width / height * SHORT_SIDE)

    return round(height / width * SHORT_SIDE), SHORT_SIDE


@cache
def _ade20k_full_table() -> np.ndarray:
    table = np.full(26 * 256, _UNNAMED, np.uint16)
    ids = class_table("ade20k_full").ids
    table[list(ids)] = np.arange(len(ids))
    return table


def _pixels(path: Path) -> np.ndarray:
    """uint8 (H, W) or (H, W, 3), as stored."""
    data = read_bytes(path, "image")
    with decoding(path, "image"):
        check_png(data)
        with opened(data) as image:
            return np.array(image if image.mode in ("L", "RGB") else image.convert("RGB"))


def mhp_people(paths: Sequence[Path]) -> dict[str, list[Path]]:
    """Image → its parsing files (`<image>_<people>_<k>.png`), one per person, in the order of k.

    ValueError for another name, and for an image that lacks a file.
    """
    people: dict[str, dict[int, Path]] = defaultdict(dict)
    total: dict[str, int] = {}

    for path in paths:
        match = re.fullmatch(r"(.+)_(\d+)_(\d+)", path.stem)
        if not match:
            raise ValueError(
                f"{path}: is not named <image>_<people>_<k>.png as the parsing files of MHP are"
            )

        people[match[1]][int(match[3])] = path
        total[match[1]] = int(match[2])

    for image, found in people.items():
        if len(found) != total[image]:
            first = next(iter(found.values()))
            raise ValueError(
                f"{first}: image {image} has {len(found)} of its {total[image]} parsing files"
            )

    return {image: [found[k] for k in sorted(found)] for image, found in people.items()}


def mhp_label(job: tuple[Sequence[Path], Path]) -> None:
    """Parsing files, one per person → one label: background 0, later people over earlier ones."""
    people, target = job
    if target.exists():
        return

    label = None

    for path in people:
        raw = read_index(path)
        label = np.zeros(raw.shape, np.uint8) if label is None else label
        if raw.shape != label.shape:
            raise ValueError(
                f"{path}: is {raw.shape[1]}x{raw.shape[0]} pixels, {people[0].name} has another size"
            )
        if raw.max() > 58:
            raise ValueError(f"{path}: label value {raw.max()} is none of MHP's 0 to 58")

        np.copyto(label, raw.astype(np.uint8), where=raw > 0)

    save(label, target)


def mhp_image(job: tuple[Path, Path]) -> None:
    """Image → a link to it; of one that breaks off before its end a new file, the rest grey."""
    source, target = job
    if target.exists():
        return
    if _breaks_off(source):
        save(_beginning(source), target, quality=95)
        print(f"{source}: is truncated; {target} holds what there is")
    else:
        place(source, target)


def _breaks_off(path: Path) -> bool:
    """Whether an image ends before its last row. ValueError for any other damage."""
    with decoding(path, "image"):
        try:
            with Image.open(path) as image:
                image.load()
        except OSError as error:
            if not str(error).startswith("image file is truncated"):
                raise
            return True

    return False


def _beginning(path: Path) -> np.ndarray:
    """uint8 (H, W, 3) of a truncated image, grey where nothing is left."""
    before = ImageFile.LOAD_TRUNCATED_IMAGES
    ImageFile.LOAD_TRUNCATED_IMAGES = True

    try:
        with Image.open(path) as image:
            return np.array(image.convert("RGB"))
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = before
