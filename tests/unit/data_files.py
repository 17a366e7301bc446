"""Small data sets on disk for the tests of the data package."""

import struct
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

from common.config import SourceConfig
from common.data.images import Picture


def picture(height: int, width: int, seed: int = 0) -> np.ndarray:
    """A smooth random RGB image, uint8 (height, width, 3)."""
    rng = np.random.default_rng(seed)
    small = rng.integers(0, 256, (height // 6 + 2, width // 6 + 2, 3), dtype=np.uint8)
    return np.array(Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC))


def classes(height: int, width: int, count: int, seed: int = 0) -> np.ndarray:
    """Random class regions, uint8 (height, width)."""
    rng = np.random.default_rng(seed)
    small = rng.integers(0, count, (height // 5 + 1, width // 5 + 1), dtype=np.uint8)
    return np.kron(small, np.ones((5, 5), np.uint8))[:height, :width]


def save(array: np.ndarray, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)
    return path


def save_palette(array: np.ndarray, path: Path) -> Path:
    """A palette PNG whose indices are the values and whose colours mislead."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(array).convert("P")
    image.putdata(array.ravel().tolist())
    image.putpalette([(7 * k + 3) % 256 for k in range(768)])
    image.save(path)
    return path


def save_rgb16(planes: np.ndarray, path: Path) -> Path:
    """A 16-bit RGB PNG, which Pillow cannot write; planes uint16 (H, W, 3)."""
    return write_png(path, planes.shape[:2], 16, b"".join(b"\0" + row.astype(">u2").tobytes() for row in planes))


def chunk(kind: bytes, data: bytes) -> bytes:
    """A chunk of a PNG with its length and checksum."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def write_png(path: Path, size: tuple[int, int], depth: int, rows: bytes, interlace: int = 0) -> Path:
    """An RGB PNG of unfiltered rows (each with its leading 0)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", size[1], size[0], depth, 2, 0, 0, interlace))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b""))
    return path


def decode_png16(data: bytes) -> np.ndarray:
    """The values of a 16-bit RGB PNG each row of which is filtered by the row above, uint16 (H, W, 3)."""
    width, height = struct.unpack(">II", data[16:24])
    start, packed = 8, b""
    while start < len(data):
        (length,) = struct.unpack(">I", data[start : start + 4])
        if data[start + 4 : start + 8] == b"IDAT":
            packed += data[start + 8 : start + 8 + length]
        start += length + 12

    rows = np.frombuffer(zlib.decompress(packed), np.uint8).reshape(height, 1 + 6 * width)
    assert (rows[:, 0] == 2).all()
    values = np.cumsum(rows[:, 1:], axis=0, dtype=np.uint8).view(">u2")
    return values.reshape(height, width, 3).astype(np.uint16)


def make_folder(root: Path, images: int = 6, size: tuple[int, int] = (48, 64), count: int = 5) -> SourceConfig:
    """A `folder` data set of PNG images and labels (255 = ignore in the first row); its source."""
    for k in range(images):
        label = classes(*size, count, seed=k)
        label[0] = 255
        save(picture(*size, seed=k), root / "images" / "train" / f"im{k}.png")
        save(label, root / "labels" / "train" / f"im{k}.png")
    return SourceConfig(dataset="folder", root=str(root), folder=folder_options(count))


def folder_options(count: int = 5) -> dict:
    return {
        "images": "images/{split}",
        "labels": "labels/{split}",
        "classes": [f"class{k}" for k in range(count)],
        "tail": [f"class{count - 1}"],
    }


def opened(pixels, label=None):
    sample = {"image": Picture.of(pixels), "name": "a", "index": 0}
    return sample if label is None else {**sample, "label": label}


def pillow_resize(image, size, kernel):
    """Columns first, then rows, as Pillow did before it chose the cheaper order."""
    return image.resize((size[0], image.height), kernel).resize(size, kernel)


def assert_close(image, expected):
    """Equal but for roundings."""
    apart = np.abs(np.asarray(image).astype(int) - np.asarray(expected).astype(int))
    assert apart.max() <= 2 and (apart > 0).mean() < 0.12
