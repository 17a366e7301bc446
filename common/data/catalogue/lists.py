"""List files: one image per line, which says what images of a folder a split has.

A line is an image's file name or stem, with or without folders before it. Further words may follow an image path, such
as the path of its label. A name that this grammar would break (spaces, quotes, backslashes) is written in double
quotes, escaped as in JSON, and then stands for itself.
"""

import codecs
import json
import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from common.files import replacing

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp")
_SLASH = re.compile(r"[/\\]")
_FRAGILE = re.compile(r'[\s"\\\x00-\x1f]')  # what a name in a plain line cannot hold
_MARKS = {
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}


def read_text(path: Path, what: str) -> str:
    """The text of a file in UTF-8, or in UTF-16 with a byte order mark. `what` the file is begins the errors.

    ValueError names the file where it cannot be read or is in another encoding.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ValueError(f"{path}: cannot read the {what} ({error.strerror})") from error

    encoding = next((name for mark, name in _MARKS.items() if data.startswith(mark)), "utf-8")

    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path}: the {what} is not {encoding} (byte {error.start}); save it as UTF-8"
        ) from error

    if "\0" in text:
        raise ValueError(
            f"{path}: the {what} holds zero bytes, as UTF-16 or UTF-32 does; save it as UTF-8"
        )

    return text


def read_list(path: Path) -> list[str]:
    """The lines of a list file, for `pick`. Empty lines are skipped. ValueError where it cannot be read or is empty."""
    lines = [line.strip() for line in re.split(r"\r\n?|\n", read_text(path, "list of images"))]
    lines = [line for line in lines if line]
    if not lines:
        raise ValueError(f"{path}: the list names no image")

    return lines


def write_list(path: Path, names: Iterable[str]) -> None:
    """Write names (stems, or file names with their suffix) so that `read_list` and `pick` find exactly these."""
    text = "".join(f"{_quoted(name)}\n" for name in names)
    try:
        data = text.encode()
    except UnicodeEncodeError as error:
        line = text[: error.start].split("\n")[-1]
        raise ValueError(
            f"{path}: {line!r}… begins a file name that is not UTF-8; rename the file"
        ) from error

    path.parent.mkdir(parents=True, exist_ok=True)

    with replacing(path) as draft:
        draft.write_bytes(data)


def listed(image: Path) -> str:
    """What stands for an image in a list: its stem, or the file name where the stem looks like another file's name."""
    return image.stem if without_suffix(image.stem) == image.stem else image.name


def _quoted(name: str) -> str:
    return json.dumps(name, ensure_ascii=False) if _FRAGILE.search(name) else name


def pick(
    images: Sequence[Path], lines: Sequence[str] | None, where: Path, end: str = ""
) -> list[Path]:
    """The images that the lines of a list name, in the list's order; without a list all, sorted by stem.

    end: an ending of every stem that lines may leave out. ValueError (beginning with `where`) for a line that names no
    image or several, and for two files of one stem: they would share a label, and all that is written of them.
    """
    if lines is None:
        chosen = sorted(images, key=lambda path: path.stem)
        _check_unique(chosen, where)
        return chosen

    finder = _Finder(images, end, where)
    found = [finder(line) for line in lines]
    missing = [line for line, path in zip(lines, found, strict=True) if path is None]
    if missing:
        raise ValueError(
            f"{where}: no image named {missing[0]!r} ({len(missing)} of {len(lines)} listed are missing)"
        )

    chosen = [path for path in found if path is not None]
    _check_unique(chosen, where)

    return chosen


def _check_unique(images: Sequence[Path], where: Path) -> None:
    first: dict[str, Path] = {}
    for path in images:
        other = first.setdefault(path.stem, path)
        if other != path:
            raise ValueError(
                f"{where}: {_both(other, path)} have one stem; rename one, or choose by a `list` of file names or by "
                f"the folder's image_end (such as {other.suffix})"
            )


def _both(one: Path, other: Path) -> str:
    """Two files as an error names them: with their folders, where these differ."""
    if one.parent == other.parent:
        return f"{one.name!r} and {other.name!r}"
    return f"{one.parent.name}/{one.name} and {other.parent.name}/{other.name}"


class _Finder:
    """The image that a line names. An exact file name wins over a stem, a stem over a name with another suffix."""

    def __init__(self, images: Sequence[Path], end: str, where: Path):
        self.end = end
        self.where = where
        self.by_name: dict[str, list[Path]] = defaultdict(list)
        self.by_stem: dict[str, list[Path]] = defaultdict(list)

        for path in images:
            self.by_name[same_form(path.name)].append(path)
            self.by_stem[same_form(path.stem)].append(path)

    def __call__(self, line: str) -> Path | None:
        for name in _readings(line):
            path = self._named(name)
            if path is not None:
                return path

        return None

    def _named(self, name: str) -> Path | None:
        stem = without_suffix(name)
        tries = (
            (self.by_name, name),
            (self.by_stem, name),
            (self.by_stem, name + self.end),
            (self.by_stem, stem),
            (self.by_stem, stem + self.end),
        )

        for table, key in tries:
            found = table.get(same_form(key))
            if found:
                return self._only(found, key)

        return None

    def _only(self, found: list[Path], key: str) -> Path:
        """The one of several files; where they differ in their Unicode form, that of the same characters."""
        if len(found) > 1:
            found = [path for path in found if key in (path.name, path.stem)] or found

        if len(found) > 1:
            both = _both(found[0], found[1])
            raise ValueError(
                f"{self.where}: the list's {key!r} names both {both}; write the file name with its suffix"
            )

        return found[0]


def _readings(line: str) -> Iterator[str]:
    """What a line can name, the exact reading first."""
    if line.startswith('"'):
        quoted = _unquoted(line)
        if quoted is not None:
            yield quoted
            return

    yield line
    first = line.split()[0]
    rest = line[len(first) :]
    is_pair = without_suffix(first) != first or bool(
        _SLASH.search(first) and _SLASH.search(rest)
    )
    if is_pair or not rest:
        yield _SLASH.split(first)[-1]
    elif not _SLASH.search(rest):  # one path: the spaces are those of its last part
        yield _SLASH.split(line)[-1]


def _unquoted(line: str) -> str | None:
    """The name in double quotes that begins a line; None where these are no JSON string."""
    try:
        name, _ = json.JSONDecoder().raw_decode(line)
    except ValueError:
        return None

    return name


def without_suffix(name: str) -> str:
    """A file name less the suffix of an image; dots of any other kind are part of the name."""
    suffix = next((suffix for suffix in IMAGE_SUFFIXES if name.lower().endswith(suffix)), "")
    return name[: len(name) - len(suffix)]


def same_form(name: str) -> str:
    """One Unicode form (NFC) of a name: macOS writes NFD where others write NFC, and they look alike."""
    return unicodedata.normalize("NFC", name)
