"""Damaged, unusual and huge image files: no crash, no silent garbage, one line that names the file."""

import json
import os
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from common.data.decoding import check_png
from common.data.images import Picture, read_image
from common.data.labels import read_colours, read_index
from tests.unit.data_files import chunk, classes, picture, save, save_palette, save_rgb16, write_png

ROOT = Path(__file__).resolve().parents[2]


def by_pillow(mode: str = "RGB", **options):
    def write(path: Path) -> None:
        Image.fromarray(picture(30, 40)).convert(mode).save(path, **options)

    return write


def label_by_pillow(**options):
    return lambda path: Image.fromarray(classes(30, 40, 19)).save(path, **options)


FILES = {
    "images/rgb.png": by_pillow(),
    "images/grey.png": by_pillow("L"),
    "images/palette.png": by_pillow("P"),
    "images/alpha.png": by_pillow("RGBA"),
    "images/grey16.png": lambda path: save(picture(30, 40)[..., 0].astype(np.uint16) * 257, path),
    "images/rgb16.png": lambda path: save_rgb16(picture(30, 40).astype(np.uint16) * 257, path),
    "images/baseline.jpg": by_pillow(),
    "images/progressive.jpg": by_pillow(progressive=True),
    "images/turned.jpg": lambda path: save_turned(path, 6),
    "images/raw.tif": by_pillow(),
    "images/lzw.tif": by_pillow(compression="tiff_lzw"),
    "images/deflate.tif": by_pillow(compression="tiff_adobe_deflate"),
    "images/plain.bmp": by_pillow(),
    "images/lossy.webp": by_pillow(),
    "images/lossless.webp": by_pillow(lossless=True),
    "labels/grey.png": label_by_pillow(),
    "labels/palette.png": lambda path: save_palette(classes(30, 40, 19), path),
    "labels/grey16.png": lambda path: save(classes(30, 40, 200).astype(np.uint16) + 700, path),
    "labels/rgb16.png": lambda path: save_rgb16(three(classes(30, 40, 19)).astype(np.uint16), path),
    "labels/lzw.tif": label_by_pillow(compression="tiff_lzw"),
    "labels/plain.bmp": label_by_pillow(),
    "labels/lossless.webp": lambda path: save_lossless(classes(30, 40, 19), path),
}


def three(channel: np.ndarray) -> np.ndarray:
    return np.repeat(channel[..., None], 3, axis=2)


def save_turned(path: Path, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(picture(30, 40)).save(path, exif=exif)


def save_lossless(label: np.ndarray, path: Path) -> None:
    Image.fromarray(three(label)).save(path, lossless=True)


@pytest.fixture(scope="module")
def attacked(tmp_path_factory) -> dict[str, dict]:
    """What a process of its own found of 300 damaged copies of each file; a crash leaves the rest out."""
    folder = tmp_path_factory.mktemp("attacked")
    for name, write in FILES.items():
        (folder / name).parent.mkdir(exist_ok=True)
        write(folder / name)
    words = [sys.executable, "-m", "tests.unit.fuzz_images", "300", str(folder)]
    done = subprocess.run(words, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    results = [json.loads(line) for line in done.stdout.splitlines()]
    return {"exit code": done.returncode, "errors": done.stderr[-800:]} | {found["file"]: found for found in results}


@pytest.mark.parametrize("name", FILES)
def test_damaged_copies(attacked, name):
    assert name in attacked, f"the process ended ({attacked['exit code']}): {attacked['errors']}"
    found = attacked[name]
    assert found["refused"] > 50 and not found["nameless"]
    if name.endswith(".png"):
        assert found["altered"] == 0


def test_a_png_with_right_checksums_and_broken_pixels_is_refused(tmp_path):
    """What libpng calls an error, and a decoder of torchvision answers with a crash."""
    path = tmp_path / "a.png"
    rows = b"".join(b"\7" + row.tobytes() for row in picture(20, 30))  # there is no filter 7
    write_png(path, (20, 30), 8, rows)
    with pytest.raises(ValueError, match=r"a\.png: cannot decode the image"):
        read_image(path)
    write_png(path, (20, 30), 8, rows[:900])
    with pytest.raises(ValueError, match=r"a\.png: cannot decode the image"):
        read_image(path)
    with pytest.raises(ValueError, match=r"a\.png: cannot decode the label"):
        read_index(path)


def test_what_is_wrong_with_a_png_is_said(tmp_path):
    path = save(picture(20, 30), tmp_path / "a.png")
    data = path.read_bytes()
    check_png(data + b"whatever follows the end")
    for position in range(8, len(data)):
        with pytest.raises(ValueError, match=r"wrong checksum of the part at byte \d+|breaks off|no header"):
            check_png(data[:position] + bytes([data[position] ^ 4]) + data[position + 1 :])
    with pytest.raises(ValueError, match="breaks off"):
        check_png(data[:-1])
    path.write_bytes(data[:60] + b"\0" + data[61:])
    with pytest.raises(ValueError, match=r"a\.png: cannot decode the image \(wrong checksum of the part at byte 33\)"):
        Picture(path)


@pytest.mark.parametrize("orientation", range(10))
def test_every_orientation_against_pillow(tmp_path, orientation):
    save_turned(tmp_path / "a.jpg", orientation)
    with Image.open(tmp_path / "a.jpg") as image:
        expected = np.array(ImageOps.exif_transpose(image))
    assert np.array_equal(read_image(tmp_path / "a.jpg"), expected)
    assert Picture(tmp_path / "a.jpg").size == expected.shape[:2]


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_sixteen_bits_of_grey_are_scaled_alike(tmp_path, suffix):
    deep = np.arange(0, 65536, 32, dtype=np.uint16).reshape(32, 64)
    path = save(deep, tmp_path / f"a.{suffix}")
    assert np.array_equal(read_image(path), three(deep >> 8))
    window = Picture(path).window(slice(2, 9), slice(4, 25))
    assert np.array_equal(window[..., 0], deep[2:9, 4:25] >> 8)


def write_tiff(path: Path, values: np.ndarray, depth: int, kind: int, pack=None, black_is: int = 0) -> Path:
    """A TIFF of one channel, one strip, little-endian. kind: 1 unsigned, 2 signed, 3 float."""
    data = values.tobytes() if pack is None else pack(values)
    entries = (
        (256, values.shape[1]), (257, values.shape[0]), (258, depth), (259, 1), (262, 0 if black_is else 1),
        (273, 8), (277, 1), (278, values.shape[0]), (279, len(data)), (339, kind),
    )  # fmt: skip
    table = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in entries)
    head = b"II*\0" + struct.pack("<I", 8 + len(data))
    path.write_bytes(head + data + struct.pack("<H", len(entries)) + table + bytes(4))
    return path


def twelve_bits(values: np.ndarray) -> bytes:
    """Two values in three bytes."""
    first, second = values.reshape(-1, 2).astype(int).T
    return np.stack((first >> 4, (first & 15) << 4 | second >> 8, second & 255), 1).astype(np.uint8).tobytes()


LEVELS = np.random.default_rng(0).integers(0, 256, (12, 20))


@pytest.mark.parametrize(
    ("stored", "depth", "kind", "pack"),
    [
        (LEVELS.astype(np.uint8), 8, 1, None),
        (LEVELS * 16 + 5, 12, 1, twelve_bits),
        ((LEVELS * 256 + 99).astype(np.uint16), 16, 1, None),
        ((LEVELS * 128 + 99).astype(np.int16), 16, 2, None),
        ((LEVELS * 2**24 + 99).astype(np.uint32), 32, 1, None),
        ((LEVELS * 2**23 + 99).astype(np.int32), 32, 2, None),
        ((LEVELS / 255).astype(np.float32), 32, 3, None),
    ],
    ids=["uint8", "12 bits", "uint16", "int16", "uint32", "int32", "float"],
)
def test_any_depth_is_scaled_by_its_range(tmp_path, stored, depth, kind, pack):
    path = write_tiff(tmp_path / "a.tif", stored, depth, kind, pack)
    assert np.array_equal(read_image(path), three(LEVELS))


@pytest.mark.parametrize(
    ("stored", "message"),
    [
        (LEVELS.astype(np.float32), "float values from 0 to 255, only 0 to 1 is read"),
        (np.full((4, 4), np.nan, np.float32), "float values from nan to nan"),
        (LEVELS.astype(np.int16) - 1, r"holds negative values \(-1\)"),
        (LEVELS.astype(np.int32), "its 32-bit values end at 255, so that all would be black"),
    ],
    ids=["beyond 1", "nan", "negative", "black"],
)
def test_depths_without_a_range_are_refused(tmp_path, stored, message):
    path = write_tiff(tmp_path / "a.tif", stored, 8 * stored.itemsize, 3 if stored.dtype.kind == "f" else 2)
    with pytest.raises(ValueError, match=rf"a\.tif: {message}.*; store it with 8 or 16 bits"):
        read_image(path)


def write_deep(path: Path, planes: np.ndarray) -> Path:
    """A 16-bit PNG of uint16 (H, W, channels): 2 grey with alpha, 3 RGB, 4 with alpha."""
    height, width, channels = planes.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in planes)
    header = struct.pack(">IIBBBBB", width, height, 16, {2: 4, 3: 2, 4: 6}[channels], 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + body)
    return path


@pytest.mark.parametrize("channels", [2, 3, 4])
def test_deep_pngs_with_alpha(tmp_path, channels):
    planes = np.random.default_rng(channels).integers(0, 65536, (9, 14, channels), dtype=np.uint16)
    path = write_deep(tmp_path / "a.png", planes)
    colours = planes[..., :1].repeat(3, 2) if channels == 2 else planes[..., :3]
    assert np.array_equal(read_image(path), colours >> 8)
    if channels == 3:
        assert np.array_equal(read_index(path), planes[..., 0])
    else:
        with pytest.raises(ValueError, match=r"a\.png: 16 bits a channel with alpha as PNG are not read; store the"):
            read_index(path)
    with pytest.raises(ValueError, match=r"a\.png: a colour label of 16 bits a channel; store it with 8"):
        read_colours(path)


@pytest.mark.parametrize("read", [read_index, read_colours])
def test_lossy_labels_are_refused(tmp_path, read):
    image = Image.fromarray(picture(20, 30))
    lossy = {
        "a.jpg": {}, "b.webp": {}, "c.jp2": {}, "d.tif": {"compression": "jpeg"}, "e.png": {"format": "JPEG"},
    }  # fmt: skip
    for name, options in lossy.items():
        image.save(tmp_path / name, **options)
        with pytest.raises(ValueError, match=rf"{name}: is \w+.*, a lossy format.* store the label as PNG") as error:
            read(tmp_path / name)
        assert "\n" not in str(error.value)


def test_lossless_labels_are_read(tmp_path):
    label = classes(20, 30, 19)
    save_lossless(label, tmp_path / "a.webp")
    assert np.array_equal(read_index(tmp_path / "a.webp"), label)
    for name in ("packbits", "tiff_lzw", "tiff_adobe_deflate"):
        Image.fromarray(label).save(tmp_path / "a.tif", compression=name)
        assert np.array_equal(read_index(tmp_path / "a.tif"), label)


def test_labels_of_few_bits_are_not_stretched(tmp_path):
    label = classes(8, 16, 4)
    packed = (label.reshape(-1, 4) << np.array([6, 4, 2, 0])).sum(1).astype(np.uint8)
    path = write_tiff(tmp_path / "a.tif", label, 2, 1, lambda _: packed.tobytes())
    assert np.array_equal(read_index(path), label)


def test_other_labels_whose_values_would_change(tmp_path):
    label = classes(20, 30, 19)
    path = write_tiff(tmp_path / "white.tif", label, 8, 1, black_is=255)
    with pytest.raises(ValueError, match=r"white\.tif: a TIFF whose value 0 is white"):
        read_index(path)
    path = write_tiff(tmp_path / "float.tif", label.astype(np.float32), 32, 3)
    with pytest.raises(ValueError, match=r"float\.tif: label values are float, expected whole numbers"):
        read_index(path)
    Image.fromarray(picture(20, 30)).convert("CMYK").save(tmp_path / "ink.tif")
    with pytest.raises(ValueError, match=r"ink\.tif: label values are CMYK"):
        read_index(tmp_path / "ink.tif")


@pytest.mark.parametrize("suffix", ["png", "jpg", "bmp", "tif"])
def test_a_huge_image_is_one_line(tmp_path, suffix):
    """Small files whose headers promise 400 million pixels; one that is read takes gigabytes."""
    path = save(picture(16, 16), tmp_path / f"a.{suffix}")
    data = path.read_bytes()
    if suffix == "png":
        header = chunk(b"IHDR", struct.pack(">II", 20000, 20000) + data[24:29])
        data = data[:8] + header + data[33:]
    elif suffix == "jpg":
        start = data.index(b"\xff\xc0") + 5
        data = data[:start] + struct.pack(">HH", 20000, 20000) + data[start + 4 :]
    elif suffix == "bmp":
        data = data[:18] + struct.pack("<II", 20000, 20000) + data[26:]
    else:
        for tag in (256, 257):
            start = data.index(struct.pack("<HHI", tag, 4 if struct.pack("<HHI", tag, 4, 1) in data else 3, 1)) + 8
            data = data[:start] + struct.pack("<H", 20000) + data[start + 2 :]
    path.write_bytes(data)
    for read in (read_image, read_index, read_colours):
        with pytest.raises(ValueError, match=rf"a\.{suffix}: .* more than the 178956970") as error:
            read(path)
        assert "\n" not in str(error.value)
