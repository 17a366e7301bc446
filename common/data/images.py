"""Image files: one reader for all, with the size known before the pixels are decoded.

Every depth becomes 8 bits by one rule, whatever the format: whole numbers are scaled by the range of their kind (a
12-bit channel by 4095, a 16-bit one by 65535, a signed one by its positive half), floats are read from 0 to 1.

EXIF orientation is applied to JPEG images, so that they stand as viewers and annotation tools show them; labels are
taken as stored, and a label drawn on the unrotated pixels is reported as a size mismatch.
"""

import struct
from pathlib import Path

import numpy as np
from PIL import Image

from common.data.decoding import (
    JPEG,
    PNG,
    Refused,
    bits,
    check_png,
    decoding,
    opened,
    png_size,
    read_bytes,
)


class Picture:
    """An opened image file whose pixels are decoded on demand.

    `height` and `width` cost the header alone, and of a PNG its checksums. ValueError names a file that is damaged,
    too large, or of a kind that is not read; each method may find it so.
    """

    def __init__(self, path: Path):
        self.path = path
        self._pixels: np.ndarray | None = None
        self._data = read_bytes(path, "image")
        if self._data.startswith(PNG):
            with decoding(path, "image"):
                check_png(self._data)
                self.height, self.width = png_size(self._data)
        else:
            self.height, self.width = self.pixels().shape[:2]

    @classmethod
    def of(cls, pixels: np.ndarray) -> "Picture":
        """A picture whose pixels uint8 (H, W, 3) are already at hand."""
        picture = cls.__new__(cls)
        picture.path = Path()
        picture._data = b""
        picture._pixels = pixels
        picture.height, picture.width = pixels.shape[:2]

        return picture

    @property
    def size(self) -> tuple[int, int]:
        """Height and width."""
        return self.height, self.width

    @property
    def plain(self) -> bool:
        """Whether this is a PNG of 8-bit RGB, of which a window is decoded alone."""
        return self._data.startswith(PNG) and self._data[24:26] == b"\x08\x02"

    def is_early(self, rows: slice) -> bool:
        """Whether the rows down to a window's end are much less than all."""
        return rows.stop < 0.9 * self.height

    def pixels(self) -> np.ndarray:
        """RGB, uint8 (H, W, 3)."""
        if self._pixels is None:
            with decoding(self.path, "image"):
                self._pixels = _decode(self._data)
        return self._pixels

    def window(self, rows: slice, columns: slice) -> np.ndarray:
        """The pixels of a window, uint8 (h, w, 3) or (h, w, 4) with a meaningless fourth channel.

        Of a PNG only the rows down to the window's end are decoded, unless that is nearly all of them.
        """
        if self._pixels is None and self.plain and self.is_early(rows):
            with decoding(self.path, "image"):
                return _decode_window(self._data, rows, columns)

        return self.pixels()[rows, columns]


def _decode_window(data: bytes, rows: slice, columns: slice) -> np.ndarray:
    with opened(data) as image:
        if len(image.tile) == 1 and not image.info.get("interlace"):
            image.tile = [image.tile[0]._replace(extents=(0, 0, image.width, rows.stop))]
            image._size = (image.width, rows.stop)
        part = image.crop((columns.start, rows.start, columns.stop, rows.stop))

    return np.frombuffer(part.tobytes("raw", "RGBX"), np.uint8).reshape(
        part.height, part.width, 4
    )


def _decode(data: bytes) -> np.ndarray:
    """RGB, uint8 (H, W, 3)."""
    with opened(data) as image:
        if image.mode == "F":
            return _grey(_from_unit(np.array(image)))
        if image.mode.startswith("I"):
            return _grey(_from_range(image, bits(image, data)))

        # of 16 bits a channel Pillow keeps the upper 8
        rgb = image if image.mode == "RGB" else image.convert("RGB")
        turn = TURNS.get(_orientation(image)) if data.startswith(JPEG) else None

        return np.array(rgb if turn is None else rgb.transpose(turn))


TURNS = {  # EXIF orientation → what makes the picture upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation, 1 (upright) where there is none, or the block is broken: the pixels are sound then."""
    try:
        return image.getexif().get(0x0112, 1)
    except (OSError, SyntaxError, ValueError, KeyError, TypeError, struct.error):
        return 1


def _grey(levels: np.ndarray) -> np.ndarray:
    return np.repeat(levels.astype(np.uint8)[..., None], 3, axis=2)


def _from_unit(values: np.ndarray) -> np.ndarray:
    """Floats of 0–1 to 0–255."""
    low = values.min()
    high = values.max()
    if not (low >= 0 and high <= 1):  # so also NaN
        raise Refused(
            f"float values from {low:g} to {high:g}, only 0 to 1 is read; store it with 8 or 16 bits"
        )

    return values * 255 + 0.5


def _from_range(image: Image.Image, depth: int) -> np.ndarray:
    """Whole numbers of `depth` bits, in one of Pillow's deep modes, to 0–255."""
    values = np.array(image)
    signed = image.format == "TIFF" and image.tag_v2.get(339, (1,))[0] == 2  # SampleFormat
    if depth == 32 and not signed:
        values = values.view(np.uint32)

    if values.min() < 0:
        raise Refused(
            f"holds negative values ({values.min()}); store it with 8 or 16 bits, 0 as black"
        )

    levels = values >> (depth - signed - 8)
    if depth == 32 and values.any() and not levels.any():
        raise Refused(
            f"its {depth}-bit values end at {values.max()}, so that all would be black; store it with 8 or 16 bits"
        )

    return levels


def read_image(path: Path) -> np.ndarray:
    """RGB, uint8 (H, W, 3)."""
    return Picture(path).pixels()
