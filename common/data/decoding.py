"""Bytes of an image file to stored values: what images and labels share.

Pillow decodes: torchvision's decoders are deprecated, and the one for PNG ends the whole process (SIGSEGV) at whatever
libpng calls an error. Pillow in turn reads over damage of a PNG, so that its checksums are compared first: that takes
0.4 ms a MB, decoding 25.
"""

import contextlib
import io
import zlib
from collections.abc import Iterator
from pathlib import Path

from PIL import Image

# Pillow's own bound: what is larger may be a small file that fills the memory
MOST_PIXELS = 178_956_970

PNG = b"\x89PNG\r\n\x1a\n"
JPEG = b"\xff\xd8\xff"


class Refused(ValueError):
    """A sound file of a kind that is not read. The message says what it is and what to do."""


def read_bytes(path: Path, what: str) -> bytes:
    """The file of an image or a label (`what`). ValueError names a file that cannot be read or is empty."""
    try:
        data = path.read_bytes()
    except FileNotFoundError as error:
        raise ValueError(f"{path}: no such file") from error
    except OSError as error:
        raise ValueError(f"{path}: cannot read the {what} ({error.strerror})") from error

    if not data:
        raise ValueError(
            f"{path}: cannot decode the {what} (the file is empty); the file is damaged"
        )
    return data


@contextlib.contextmanager
def decoding(path: Path, what: str) -> Iterator[None]:
    """Whatever a decoder raises becomes a ValueError of one line that names the file."""
    try:
        yield
    except Refused as error:
        raise ValueError(f"{path}: {error}") from error
    except Image.DecompressionBombError as error:
        raise ValueError(
            f"{path}: the {what} has more than the {MOST_PIXELS} pixels that are read; cut it"
        ) from error
    except MemoryError as error:
        raise ValueError(
            f"{path}: cannot decode the {what}, the memory does not suffice"
        ) from error
    except (
        Exception
    ) as error:  # of damaged bytes: OSError, SyntaxError, IndexError, KeyError, struct.error, …
        raise ValueError(
            f"{path}: cannot decode the {what} ({_reason(error)}); the file is damaged"
        ) from error


def _reason(error: Exception) -> str:
    """The first line of the message, else the error's name."""
    return next(iter(str(error).splitlines()), type(error).__name__)


def check_png(data: bytes) -> None:
    """Every chunk of a PNG has its checksum, and the last one is there; ValueError else. Other files pass."""
    if not data.startswith(PNG):
        return

    if data[12:16] != b"IHDR":
        raise ValueError("it has no header")

    view = memoryview(data)
    start = len(PNG)

    while start + 12 <= len(data):
        length = int.from_bytes(view[start : start + 4], "big")
        kind = view[start + 4 : start + 8]
        end = start + 8 + length
        stored = int.from_bytes(view[end : end + 4], "big")

        if end + 4 > len(data):
            break
        if zlib.crc32(view[start + 4 : end]) != stored:
            raise ValueError(f"wrong checksum of the part at byte {start}")
        if kind == b"IEND":
            return

        start = end + 4

    raise ValueError("the file breaks off")


def png_size(data: bytes) -> tuple[int, int]:
    """Height and width of a PNG whose checksums are right."""
    width = int.from_bytes(data[16:20], "big")
    height = int.from_bytes(data[20:24], "big")
    check_size(height, width)
    return height, width


def check_size(height: int, width: int) -> None:
    """Refuse what is larger than MOST_PIXELS, before any memory is taken."""
    if height * width > MOST_PIXELS:
        raise Refused(
            f"{width}×{height} pixels are more than the {MOST_PIXELS} that are read; cut it into tiles"
        )


@contextlib.contextmanager
def opened(data: bytes) -> Iterator[Image.Image]:
    """The file opened by Pillow, its size checked and its pixels not yet decoded."""
    with Image.open(io.BytesIO(data)) as image:
        check_size(image.height, image.width)
        yield image


def bits(image: Image.Image, data: bytes) -> int:
    """Bits of a stored channel. Pillow does not say: it stretches or cuts what it has no mode for."""
    if image.format == "PNG":
        return data[24]
    if image.format == "TIFF":
        return image.tag_v2.get(258, (1,))[0]  # BitsPerSample
    return 16 if image.mode.startswith("I") else 8
