"""Image files: one reader for all, with the size known before the pixels are decoded.

EXIF orientation is applied to JPEG images, so that they stand as viewers and annotation tools show them; labels are
taken as stored, and a label drawn on the unrotated pixels is reported as a size mismatch.
"""

import io
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torchvision.io import ImageReadMode, decode_jpeg, decode_png

_PNG, _JPEG = b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff"


class Picture:
    """An opened image file whose pixels are decoded on demand. `height` and `width` cost only the header."""

    def __init__(self, path: Path):
        self.path = path
        self._pixels: np.ndarray | None = None
        try:
            self._data = path.read_bytes()
        except OSError as error:
            raise ValueError(f"{path}: cannot read the image ({error.strerror})") from error
        if self._data[:8] == _PNG and len(self._data) > 24:
            self.width = int.from_bytes(self._data[16:20], "big")
            self.height = int.from_bytes(self._data[20:24], "big")
        else:
            self.height, self.width = self.pixels().shape[:2]

    @classmethod
    def of(cls, pixels: np.ndarray) -> "Picture":
        """A picture whose pixels uint8 (H, W, 3) are already at hand."""
        picture = cls.__new__(cls)
        picture.path, picture._data, picture._pixels = Path(), b"", pixels
        picture.height, picture.width = pixels.shape[:2]
        return picture

    @property
    def size(self) -> tuple[int, int]:
        """Height and width."""
        return self.height, self.width

    def pixels(self) -> np.ndarray:
        """RGB, uint8 (H, W, 3). ValueError names a file that cannot be decoded."""
        if self._pixels is None:
            self._pixels = self._guarded(_decode, self._data)
        return self._pixels

    def window(self, rows: slice, columns: slice) -> np.ndarray:
        """The pixels of a window, uint8 (h, w, 3) or (h, w, 4) with a meaningless fourth channel.

        Of a PNG only the rows down to the window's end are decoded, unless that is nearly all of them (the decoder
        that can stop is slower by a row).
        """
        early = rows.stop < 0.9 * self.height and self._data[24:26] == b"\x08\x02"  # 8-bit RGB
        if self._pixels is None and early and self._data[:8] == _PNG:
            return self._guarded(_decode_window, self._data, rows, columns)
        return self.pixels()[rows, columns]

    def _guarded(self, decode: Callable[..., np.ndarray], *arguments) -> np.ndarray:
        try:
            return decode(*arguments)
        except (OSError, RuntimeError, SyntaxError, ValueError, struct.error) as error:
            reason = str(error).splitlines()[0].rsplit(", ", 1)[-1] if self._data else "the file is empty"
            raise ValueError(f"{self.path}: cannot decode the image ({reason}); the file is damaged") from error


def _decode_window(data: bytes, rows: slice, columns: slice) -> np.ndarray:
    with Image.open(io.BytesIO(data)) as image:
        if len(image.tile) == 1 and not image.info.get("interlace"):
            image.tile = [image.tile[0]._replace(extents=(0, 0, image.width, rows.stop))]
            image._size = (image.width, rows.stop)
        part = image.crop((columns.start, rows.start, columns.stop, rows.stop))
    return np.frombuffer(part.tobytes("raw", "RGBX"), np.uint8).reshape(part.height, part.width, 4)


def _decode(data: bytes) -> np.ndarray:
    buffer = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    if data[:3] == _JPEG:
        image = decode_jpeg(buffer, mode=ImageReadMode.RGB, apply_exif_orientation=True)
    elif data[:8] == _PNG:
        image = decode_png(buffer, mode=ImageReadMode.RGB)
    else:
        with Image.open(io.BytesIO(data)) as opened:
            return np.array(opened.convert("RGB"))
    pixels = np.ascontiguousarray(image.permute(1, 2, 0).numpy())
    return (pixels >> 8).astype(np.uint8) if pixels.dtype == np.uint16 else pixels


def read_image(path: Path) -> np.ndarray:
    """RGB, uint8 (H, W, 3)."""
    return Picture(path).pixels()
