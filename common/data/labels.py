"""Label files to class ids: reading the stored values, and the table that maps them.

A loaded label is int16 (H, W) with class ids from 0 and IGNORE (-1) everywhere else, whatever the file holds.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image

from common.data.decoding import Refused, bits, check_png, decoding, opened, read_bytes

IGNORE = -1
MOST_CLASSES = 1 << 15  # ids that an int16 label holds
_UNKNOWN = -2

Colour = tuple[int, int, int]


def read_index(path: Path) -> np.ndarray:
    """The stored values of an index label (H, W): uint8, or uint16 / int32 where the file is deeper.

    Palette files give their indices, never colours. Of a file with several channels the first (red) holds the
    class, as in SYNTHIA (16-bit, instance in another channel) and in MHP (three equal channels).

    ValueError names a damaged file, and one whose values cannot be had as they were: a lossy format, floats, 16 bits
    with alpha.
    """
    data = read_bytes(path, "label")
    with decoding(path, "label"):
        check_png(data)
        with opened(data) as image:
            return _index(image, data)


def read_colours(path: Path) -> np.ndarray:
    """The colours of a colour-coded label as int32 (H, W): red·65536 + green·256 + blue. ValueError as `read_index`."""
    data = read_bytes(path, "label")
    with decoding(path, "label"):
        check_png(data)
        with opened(data) as image:
            _require_exact(image, data)
            if bits(image, data) > 8:
                raise Refused(
                    f"a colour label of {bits(image, data)} bits a channel; store it with 8"
                )
            rgb = np.array(image.convert("RGB")).astype(np.int32)

    return (rgb[..., 0] << 16) | (rgb[..., 1] << 8) | rgb[..., 2]


# modes that keep stored values
_EXACT = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "I", "I;16", "I;16B", "I;16L")


def _require_exact(image: Image.Image, data: bytes) -> None:
    """Refuse what may have changed values since they were drawn, or changes them when read."""
    kind = image.format
    how = image.info.get("compression")
    advice = "store the label as PNG, made anew from where it was drawn"

    if kind == "WEBP":
        exact = data[12:16] == b"VP8L"  # the lossless form
    elif kind == "TIFF":
        exact = how not in ("jpeg", "tiff_jpeg", "webp")
    else:
        exact = kind in ("PNG", "BMP")

    if not exact:
        name = f"{kind} ({how})" if kind == "TIFF" else kind
        raise Refused(
            f"is {name}, a lossy format, so that values at class borders are wrong; {advice}"
        )

    if image.mode not in _EXACT:
        kind_of_values = "float" if image.mode == "F" else image.mode
        raise Refused(
            f"label values are {kind_of_values}, expected whole numbers, one channel or RGB; {advice}"
        )

    # PhotometricInterpretation: Pillow inverts the values
    if kind == "TIFF" and image.tag_v2.get(262) == 0:
        raise Refused(f"a TIFF whose value 0 is white, which is read inverted; {advice}")


def _index(image: Image.Image, data: bytes) -> np.ndarray:
    _require_exact(image, data)
    depth = bits(image, data)
    channels = len(image.getbands())
    if depth == 16 and channels > 1:
        if image.format == "PNG" and image.mode == "RGB":
            return _red(data)
        raise Refused(
            f"16 bits a channel with {'alpha' if image.mode.endswith('A') else 'RGB'} as {image.format} are not read; "
            "store the label as grey PNG of 8 or 16 bits"
        )

    raw = np.array(image)
    if raw.dtype == bool:
        return raw.astype(np.uint8)

    if depth in (2, 4) and image.mode == "L":  # Pillow stretches grey of few bits to 0–255
        raw = raw // (255 // (2**depth - 1))

    return raw[..., 0] if raw.ndim == 3 else raw


def _red(data: bytes) -> np.ndarray:
    """The red channel of a 16-bit RGB PNG, uint16 (H, W).

    Pillow keeps one byte of each value: the upper one, or the lower one if it takes the file for little-endian.
    """
    upper = _bytes(data, "RGB;16B")
    lower = _bytes(data, "RGB;16L")
    return upper.astype(np.uint16) << 8 | lower


def _bytes(data: bytes, layout: str) -> np.ndarray:
    with opened(data) as image:
        image.tile = [tile._replace(args=layout) for tile in image.tile]
        return np.array(image)[..., 0]


class LabelTable:
    """Maps stored values to class ids by one look-up table.

    mapping: stored value → class id or IGNORE; ignore: further values that become IGNORE; unlisted: what any other
    value is. Values may be 8-bit, 16-bit, or 24-bit colours (`encoding="rgb"`, as `read_colours` gives them).
    """

    def __init__(
        self,
        num_classes: int,
        mapping: Mapping[int, int],
        ignore: Iterable[int] = (),
        unlisted: Literal["error", "ignore"] = "error",
        encoding: Literal["index", "rgb"] = "index",
    ):
        if num_classes > MOST_CLASSES:
            raise ValueError(
                f"{num_classes} classes are more than a label holds; give {MOST_CLASSES} at most"
            )

        self.num_classes = num_classes
        self.encoding = encoding
        self.entries = {**dict.fromkeys(ignore, IGNORE), **mapping}
        self.unlisted = unlisted
        self._tables: dict[int, np.ndarray] = {}

        for value, index in mapping.items():
            if not IGNORE <= index < num_classes:
                raise ValueError(
                    f"label map sends value {value} to class {index}, but there are {num_classes} classes"
                )

    def __getstate__(self):
        # a table of 2^24 entries is rebuilt faster than it is sent
        return {**self.__dict__, "_tables": {}}

    def _table(self, bits: int) -> np.ndarray:
        if bits not in self._tables:
            table = np.full(
                1 << bits, IGNORE if self.unlisted == "ignore" else _UNKNOWN, np.int16
            )
            for value, index in self.entries.items():
                if 0 <= value < 1 << bits:
                    table[value] = index

            self._tables[bits] = table

        return self._tables[bits]

    def read(self, path: Path) -> np.ndarray:
        """The label of a file: int16 (H, W), class ids and IGNORE. ValueError names the file and the value."""
        return self.decode(self.stored(path), path)

    def stored(self, path: Path) -> np.ndarray:
        """The stored values of a file (H, W), as `read_index` or `read_colours` gives them."""
        return read_colours(path) if self.encoding == "rgb" else read_index(path)

    def decode(self, raw: np.ndarray, path: Path) -> np.ndarray:
        """The label (H, W) of the stored values of the file `path`."""
        bits = 24 if self.encoding == "rgb" else 8 if raw.dtype == np.uint8 else 16
        if raw.dtype.itemsize > 2 and raw.size and not 0 <= raw.min() <= raw.max() < 1 << bits:
            raise ValueError(
                f"{path}: label value {raw.max() if raw.max() >= 1 << bits else raw.min()} is no class id"
            )

        if bits == 8 and self.num_classes < 127:  # a table of bytes is the fastest
            table = self._table(8).astype(np.int8).tobytes()
            label = (
                np.frombuffer(raw.tobytes().translate(table), np.int8)
                .reshape(raw.shape)
                .astype(np.int16)
            )
        else:
            label = np.take(self._table(bits), raw)

        if label.size and label.min() == _UNKNOWN:
            raise ValueError(self._complaint(raw, label, path))

        return label

    def _complaint(self, raw: np.ndarray, label: np.ndarray, path: Path) -> str:
        value = int(raw[label == _UNKNOWN][0])
        keys = (
            ("palette", "ignore_colours") if self.encoding == "rgb" else ("label_map", "ignore")
        )
        return (
            f"{path}: label {self.describe(value)} is none of the {self.num_classes} classes; add it to the label map "
            f"or to the ignored values (`{keys[0]}` or `{keys[1]}` of a folder), or check the number of classes"
        )

    def describe(self, value: int) -> str:
        """A stored value as messages name it."""
        if self.encoding == "rgb":
            return f"colour {(value >> 16, value >> 8 & 255, value & 255)}"
        return f"value {value}"


def colour_codes(palette: Sequence[Colour]) -> list[int]:
    """The palette's colours as `read_colours` codes them."""
    return [(r << 16) | (g << 8) | b for r, g, b in palette]


def is_varied(label: np.ndarray, limit: float) -> bool:
    """Whether a label has more than one class, and none with `limit` or more of the labelled pixels."""
    counts = np.bincount((label - IGNORE).ravel())[1:]
    return np.count_nonzero(counts) > 1 and counts.max() < limit * counts.sum()
