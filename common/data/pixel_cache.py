"""Decoded images in one file on the disk, for loaders whose time goes into decoding (`data.cache_size`).

A decoded image is a window into a file of raw bytes that all loader processes share: reading a crop costs its rows
alone, from memory once they have been read. The file is made once, named after the image files with their sizes and
dates, so that a changed image makes it anew, and holds as many images, in the order of the data set, as the limit
allows; the others are decoded as ever. The pixels are the same either way.
"""

import hashlib
import json
import os
import warnings
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from common import console
from common.data.images import Picture
from common.data.loading import parallel
from common.files import load_json, read_artifact, remove, remove_drafts, replacing, write_json

_VERSION = 1  # of the files; raise it when the same file is decoded to other pixels
PIXELS, INDEX = "pixels.u8", "index.json"
GIB = 1 << 30


class Place(NamedTuple):
    """Where an image's pixels lie."""

    offset: int  # bytes
    height: int
    width: int
    plain: bool


class CachedPicture(Picture):
    """A picture whose pixels are read from the cache, each time anew: what is made of them may be written to.

    A window has four channels where the file's has: resizing rounds otherwise with three.
    """

    plain = False

    def __init__(self, path: Path, pixels: np.ndarray, plain: bool):
        self.path = path
        self.plain = plain
        self._stored = pixels
        self._whole = False
        self.height, self.width = pixels.shape[:2]

    def pixels(self) -> np.ndarray:
        self._whole = True
        return np.array(self._stored)

    def window(self, rows: slice, columns: slice) -> np.ndarray:
        part = self._stored[rows, columns]
        if self._whole or not self.plain or not self.is_early(rows):
            return np.array(part)

        four = np.empty((*part.shape[:2], 4), np.uint8)
        four[..., :3] = part
        four[..., 3] = 0

        return four


class PixelCache:
    """The images of a folder that `write_cache` left. Another process opens the file for itself; where another run has
    removed it meanwhile, to hold another number of bytes, images are decoded."""

    def __init__(self, folder: Path):
        self.folder = folder
        index = read_artifact(folder / INDEX, load_json, f"remove {folder}")
        self.places = {path: Place(*place) for path, place in index.items()}

    @cached_property
    def _bytes(self) -> np.ndarray | None:
        try:
            return np.memmap(self.folder / PIXELS, np.uint8, mode="r")
        except FileNotFoundError:
            warnings.warn(f"{self.folder}: is gone, images are decoded instead", stacklevel=2)
            return None

    def __getstate__(self) -> Mapping[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "_bytes"}

    @property
    def size(self) -> int:
        """Bytes."""
        return sum(3 * place.height * place.width for place in self.places.values())

    def picture(self, path: Path) -> Picture:
        """The image of a file: from here where it is held, else opened."""
        place = self.places.get(str(path))
        if place is None or self._bytes is None:
            return Picture(path)

        end = place.offset + 3 * place.height * place.width
        pixels = self._bytes[place.offset : end].reshape(place.height, place.width, 3)
        return CachedPicture(path, pixels, place.plain)


def pixel_cache(
    paths: Sequence[Path], name: str, folder: Path, limit: int, workers: int = 0
) -> PixelCache | None:
    """The cache of these image files below `folder`, written first where it is not there or they have changed.

    Several ranks write none at the same time: rank 0 does, and the others decode until a later run finds it. None too
    where the disk has no room for it, with a warning.

    Args:
        name: of the data set; an older cache of the same files, or of fewer, steps aside.
        limit: bytes; of the images, in their order, those are held that fit.
    """
    family = f"pixels-{name}-{_digest([str(path.resolve()) for path in paths])}"
    target = folder / f"{family}-{_digest([_state(path) for path in paths], _VERSION, limit)}"
    if not (target / INDEX).is_file():
        if not console.first_rank():
            return None

        folder.mkdir(parents=True, exist_ok=True)
        remove_drafts(folder, idle=60)
        for older in folder.glob(f"{family}-*"):
            remove(older)

        try:
            write_cache(paths, name, target, limit, workers)
        except OSError as error:
            warnings.warn(
                f"data.cache_size: images are decoded instead ({error})", stacklevel=2
            )
            return None

    return PixelCache(target)


def write_cache(
    paths: Sequence[Path], name: str, target: Path, limit: int, workers: int = 0
) -> None:
    """Decode the files, in `workers` processes, until the next image would go beyond `limit` bytes. The folder appears
    when it is whole. ValueError names a file that cannot be decoded."""
    places: dict[str, Place] = {}
    offset = 0

    with (
        replacing(target, sync=False) as draft,
        console.bar(what=f"decoding {name}", total=len(paths)) as bar,
    ):
        draft.mkdir()
        decoded = parallel(_read, paths, workers)
        with (draft / PIXELS).open("wb") as file:
            for path, (pixels, plain) in zip(paths, decoded, strict=True):
                if offset + pixels.nbytes > limit:
                    break

                file.write(np.ascontiguousarray(pixels).data)
                places[str(path)] = Place(offset, *pixels.shape[:2], plain)
                offset += pixels.nbytes
                bar.update()

        decoded.close()
        write_json(draft / INDEX, places)


def _read(path: Path) -> tuple[np.ndarray, bool]:
    """Pixels uint8 (H, W, 3), and whether the file is such that a window is decoded alone."""
    picture = Picture(path)
    return picture.pixels(), picture.plain


def _state(path: Path) -> list[int]:
    """What a file is known by: size and date."""
    try:
        stat = os.stat(path)
    except OSError as error:
        raise ValueError(f"{path}: no such file") from error

    return [stat.st_size, stat.st_mtime_ns]


def _digest(*values: Any) -> str:
    return hashlib.sha256(json.dumps(values).encode(errors="surrogateescape")).hexdigest()[:16]
