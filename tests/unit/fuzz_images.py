"""Reads damaged copies of image files, as a program of its own: a decoder that crashes ends this one only.

    python -m tests.unit.fuzz_images COUNT FOLDER

FOLDER holds `images` and `labels`. Each copy has some bits flipped, or is cut, by the seeds 0 … COUNT − 1. Prints one
JSON line a file: its path within FOLDER, how many copies were read, read with other pixels, and refused, and the
errors that are not one line with the file's name.
"""

import json
import sys
from pathlib import Path

import numpy as np

from common.data.images import Picture
from common.data.labels import read_index


def damaged(data: bytes, seed: int) -> bytes:
    """A third of the copies is cut, the others have one flipped bit, or now and then five."""
    rng = np.random.default_rng(seed)
    if seed % 3 == 0:
        return data[: rng.integers(len(data))]

    copy = bytearray(data)
    for _ in range(5 if seed % 10 == 1 else 1):
        copy[rng.integers(len(data))] ^= 1 << rng.integers(8)
    return bytes(copy)


def whole(path: Path) -> np.ndarray:
    return Picture(path).pixels()


def window(path: Path) -> np.ndarray:
    picture = Picture(path)
    rows, columns = slice(2, picture.height // 2), slice(1, picture.width - 1)
    return picture.window(rows, columns)[..., :3]


READERS = {"images": (whole, window), "labels": (read_index,)}


def attack(path: Path, count: int) -> dict:
    data, copy = path.read_bytes(), path.with_name(f"damaged_{path.name}")
    readers = READERS[path.parent.name]
    expected = [read(path) for read in readers]

    result = {"file": f"{path.parent.name}/{path.name}", "read": 0, "altered": 0, "refused": 0, "nameless": []}
    for seed in range(count):
        copy.write_bytes(damaged(data, seed))
        for read, pixels in zip(readers, expected, strict=True):
            try:
                got = read(copy)
            except ValueError as error:
                result["refused"] += 1
                if not str(error).startswith(f"{copy}: ") or "\n" in str(error):
                    result["nameless"].append(str(error))
            else:
                result["read"] += 1
                result["altered"] += not np.array_equal(got, pixels)
    return result


if __name__ == "__main__":
    for file in sorted(Path(sys.argv[2]).glob("*/*")):
        print(json.dumps(attack(file, int(sys.argv[1]))), flush=True)
