"""Label files to class ids: reading the stored values, and the table that maps them.

A loaded label is int16 (H, W) with class ids from 0 and IGNORE (-1) everywhere else, whatever the file holds.
"""

import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image
from torchvision.io import decode_png

IGNORE = -1
MOST_CLASSES = 1 << 15  # ids that an int16 label holds
_UNKNOWN = -2

Colour = tuple[int, int, int]


def read_index(path: Path) -> np.ndarray:
    """The stored values of an index label (H, W): uint8, or uint16 / int32 where the file is deeper.

    Palette files give their indices, never colours. Of a file with several channels the first (red) holds the
    class, as in SYNTHIA (16-bit, instance in another channel) and in MHP (three equal channels).
    """
    try:
        data = path.read_bytes()
        depth, kind = (data[24], data[25]) if data[1:4] == b"PNG" and len(data) > 25 else (8, 0)
        if depth in (8, 16) and kind in (0, 2, 6) and data[1:4] == b"PNG":  # PIL cuts 16-bit RGB to 8 bits
            return decode_png(torch.frombuffer(bytearray(data), dtype=torch.uint8))[0].numpy()
        with Image.open(io.BytesIO(data)) as image:
            raw = np.array(image)
    except (OSError, RuntimeError, SyntaxError) as error:
        raise _undecodable(path, error) from error
    if raw.dtype == bool:
        return raw.astype(np.uint8)
    if depth in (2, 4) and kind == 0:  # PIL stretches grey of few bits to 0–255
        raw = raw // (255 // (2**depth - 1))
    raw = raw[..., 0] if raw.ndim == 3 else raw
    if raw.dtype.kind not in "ui":
        raise ValueError(f"{path}: label values are {raw.dtype}, expected whole numbers")
    return raw


def read_colours(path: Path) -> np.ndarray:
    """The colours of a colour-coded label as int32 (H, W): red·65536 + green·256 + blue."""
    try:
        with Image.open(path) as image:
            rgb = np.array(image.convert("RGB"))
    except (OSError, SyntaxError) as error:
        raise _undecodable(path, error) from error
    return (rgb[..., 0].astype(np.int32) << 16) | (rgb[..., 1].astype(np.int32) << 8) | rgb[..., 2]


def _undecodable(path: Path, error: Exception) -> ValueError:
    missing = isinstance(error, FileNotFoundError)
    reason = "no such file" if missing else f"cannot decode the label ({str(error).splitlines()[0]}); it is damaged"
    return ValueError(f"{path}: {reason}")


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
            raise ValueError(f"{num_classes} classes are more than a label holds; give {MOST_CLASSES} at most")
        self.num_classes = num_classes
        self.encoding = encoding
        self.entries = {**dict.fromkeys(ignore, IGNORE), **mapping}
        self.unlisted = unlisted
        self._tables: dict[int, np.ndarray] = {}
        for value, index in mapping.items():
            if not IGNORE <= index < num_classes:
                raise ValueError(f"label map sends value {value} to class {index}, but there are {num_classes} classes")

    def __getstate__(self):
        return {**self.__dict__, "_tables": {}}  # a table of 2^24 entries is rebuilt faster than it is sent

    def _table(self, bits: int) -> np.ndarray:
        if bits not in self._tables:
            table = np.full(1 << bits, IGNORE if self.unlisted == "ignore" else _UNKNOWN, np.int16)
            for value, index in self.entries.items():
                if 0 <= value < 1 << bits:
                    table[value] = index
            self._tables[bits] = table
        return self._tables[bits]

    def read(self, path: Path) -> np.ndarray:
        """The label of a file: int16 (H, W), class ids and IGNORE. ValueError names the file and the value."""
        if self.encoding == "rgb":
            return self.decode(read_colours(path), path, 24)
        raw = read_index(path)
        return self.decode(raw, path, 8 if raw.dtype == np.uint8 else 16)

    def decode(self, raw: np.ndarray, path: Path, bits: int) -> np.ndarray:
        """`raw` (H, W) through the table of 2^bits entries."""
        if raw.dtype.itemsize > 2 and raw.size and not 0 <= raw.min() <= raw.max() < 1 << bits:
            raise ValueError(f"{path}: label value {raw.max() if raw.max() >= 1 << bits else raw.min()} is no class id")
        if bits == 8 and self.num_classes < 127:  # a table of bytes is the fastest
            table = self._table(8).astype(np.int8).tobytes()
            label = np.frombuffer(raw.tobytes().translate(table), np.int8).reshape(raw.shape).astype(np.int16)
        else:
            label = np.take(self._table(bits), raw)
        if label.size and label.min() == _UNKNOWN:
            raise ValueError(self._complaint(raw, label, path))
        return label

    def _complaint(self, raw: np.ndarray, label: np.ndarray, path: Path) -> str:
        value = int(raw[label == _UNKNOWN][0])
        name = f"colour {(value >> 16, value >> 8 & 255, value & 255)}" if self.encoding == "rgb" else f"value {value}"
        return (
            f"{path}: label {name} is none of the {self.num_classes} classes; "
            "add it to the label map or to the ignored values, or check the number of classes"
        )


def colour_codes(palette: Sequence[Colour]) -> list[int]:
    """The palette's colours as `read_colours` codes them."""
    return [(r << 16) | (g << 8) | b for r, g, b in palette]


def is_varied(label: np.ndarray, limit: float) -> bool:
    """Whether a label has more than one class, and none with `limit` or more of the labelled pixels."""
    counts = np.bincount((label - IGNORE).ravel())[1:]
    return np.count_nonzero(counts) > 1 and counts.max() < limit * counts.sum()
