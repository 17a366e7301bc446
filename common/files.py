"""Files that appear whole or not at all, links where there may be none, and one way to read what an earlier step left.

At the bottom of the house: it imports nothing of `common`.
"""

import contextlib
import json
import os
import shutil
import tempfile
import time
import uuid
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

# the folder that holds `common`, configs and weights
PROJECT = Path(__file__).resolve().parents[1]
DRAFT = ".draft-"  # how the name of an unfinished file or folder begins
LINK = "link: "  # how a text file begins that stands for a symbolic link
MANIFEST = "manifest.json"
LONGEST_REASON = 300  # characters of a reader's message that are passed on

T = TypeVar("T")


# Writing ------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def replacing(path: str | Path, *, sync: bool = True) -> Iterator[Path]:
    """A draft for the block to write, a file or a folder; it becomes `path` when the block ends without an error.

    The draft lies beside `path` and ends as it does, so that writers which choose a format by suffix choose the same.
    `sync` waits until its bytes are on the disk; without, it is fast, and a power cut may leave an empty file.

    Raises OSError, naming `path`, where it cannot be written. Whatever is raised, the draft is removed and what stood
    at `path` before is untouched.
    """
    path = Path(path)
    draft = path.with_name(f"{DRAFT}{uuid.uuid4().hex[:8]}-{path.name}")

    try:
        yield draft
        if sync:
            _sync_all(draft)

        _rename(draft, path)
        if sync:
            _sync_folder(path.parent)
    except Exception as error:
        reason = _obstacle(error, draft)
        if reason is None:
            raise
        raise OSError(f"{path}: cannot be written: {reason}") from error
    finally:
        remove(draft)


def write_json(path: str | Path, value: Any) -> None:
    """Write JSON so that a reader never sees half of it. Raises OSError."""
    text = json.dumps(value, indent=1)
    with replacing(path) as draft:
        draft.write_text(text)


def refuse_to_overwrite(paths: Iterable[str | Path], force: bool = False) -> None:
    """Raise ValueError where one of the files to be written is there already, unless `force` says to replace it.

    It may be one that is read (an image, a checkpoint, a list), or what another call has left.
    """
    there = [] if force else [str(path) for path in paths if Path(path).exists()]
    if there:
        more = f", and {len(there) - 1} more" if len(there) > 1 else ""
        raise ValueError(
            f"{there[0]}: there already{more}; write elsewhere, or replace what is there with --force"
        )


def remove(path: Path) -> None:
    """Remove a file or a folder, if it is there and can be removed; it never raises OSError, so it hides no error."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
        return
    with contextlib.suppress(OSError):
        path.unlink(missing_ok=True)


def remove_drafts(folder: Path, *, deep: bool = False, idle: float = 0.0) -> None:
    """Remove what killed processes left unfinished in `folder` (deep: and below it).

    idle: seconds without a change after which a draft is taken for left. 0 is for folders where nobody else may be
    writing, a minute for those that processes share.
    """
    pattern = f"{DRAFT}*"
    for path in list(folder.rglob(pattern) if deep else folder.glob(pattern)):
        with contextlib.suppress(OSError):
            if time.time() - _last_change(path) >= idle:
                remove(path)


def _last_change(path: Path) -> float:
    """When a file was written last, or a folder or a file in it: a folder's own time stands while its files grow."""
    inside = path.iterdir() if path.is_dir() and not path.is_symlink() else ()
    return max(part.lstat().st_mtime for part in (path, *inside))


def _rename(draft: Path, path: Path) -> None:
    """Give the draft its name. An older folder of that name steps aside first, since folders cannot be overwritten."""
    if not (draft.is_dir() and path.is_dir()):
        os.replace(draft, path)
        return

    old = path.with_name(f"{DRAFT}{uuid.uuid4().hex[:8]}-{path.name}")
    os.rename(path, old)
    os.rename(draft, path)
    remove(old)


def _sync_all(draft: Path) -> None:
    paths = [path for path in draft.rglob("*") if path.is_file()] if draft.is_dir() else [draft]
    for path in paths:
        with path.open("r+b") as file:
            os.fsync(file.fileno())

    if draft.is_dir():
        _sync_folder(draft)


def _sync_folder(folder: Path) -> None:
    """Flush a folder's entries, where the system can: Windows and some network drives cannot."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _obstacle(error: Exception, draft: Path) -> str | None:
    """Why the draft could not be written, where files are the reason; None for an error of another kind."""
    folder = draft.parent
    if not folder.is_dir():
        return f"the folder {folder} is not there (was it removed?)"

    if isinstance(error, OSError):
        elsewhere = error.filename is not None and DRAFT not in str(error.filename)
        return None if elsewhere else error.strerror or str(error)

    return _refusal(folder)


def _refusal(folder: Path) -> str | None:
    """What the system says to one more MiB in `folder`: torch and safetensors report a full disk without saying so."""
    try:
        with tempfile.TemporaryFile(dir=folder) as probe:
            probe.write(bytes(1 << 20))
            probe.flush()
            os.fsync(probe.fileno())
    except OSError as error:
        return error.strerror

    return None


# Links --------------------------------------------------------------------------------------------------------------


def link(path: Path, target: Path) -> None:
    """Point `path` at its sibling `target`, in one step: a symbolic link, or a text file where there are none.

    Network drives, exFAT and Windows without developer mode have no symbolic links.
    """
    with replacing(path, sync=False) as draft:
        try:
            os.symlink(target.name, draft)
        except (OSError, NotImplementedError):
            draft.write_text(f"{LINK}{target.name}\n")


def follow(path: str | Path) -> Path:
    """Where `path` points if it is a text file that stands for a link (see `link`); else `path` itself."""
    path = Path(path)
    if not path.is_file():
        return path

    with path.open("rb") as file:
        start = file.read(256)

    if not start.startswith(LINK.encode()):
        return path

    name = start.decode(errors="replace").removeprefix(LINK).strip()

    return path.with_name(Path(name).name)


# Reading ------------------------------------------------------------------------------------------------------------


def read_artifact(path: str | Path, parse: Callable[[Path], T], remedy: str = "") -> T:
    """`parse(path)`, the one way to read what an earlier step left: whatever fails is one ValueError that names `path`.

    parse: opens the file, and checks what it finds (shape, finite, real); a ValueError of its own says what is wrong.
    remedy: what to do about it, in a few words.
    """
    path = Path(path)
    try:
        return parse(path)
    except OSError as error:
        reason = _spoken(error, path)
        cause = error
    except ValueError as error:
        reason = str(error)
        cause = error
    except (
        Exception
    ) as error:  # damage surfaces as zlib.error, KeyError, RecursionError, MemoryError, …
        reason = f"damaged file ({type(error).__name__}: {error})"
        cause = error

    line = " ".join(reason.split()).removeprefix(f"{path}: ")
    line = line if len(line) <= LONGEST_REASON else f"{line[:LONGEST_REASON]}…"
    raise ValueError(f"{path}: {line}" + (f"; {remedy}" if remedy else "")) from cause


def _spoken(error: OSError, path: Path) -> str:
    """The system's words; with the file's name where it is another than `path`."""
    reason = (
        "not there" if isinstance(error, FileNotFoundError) else error.strerror or str(error)
    )
    other = error.filename is not None and Path(error.filename) != path
    return f"{error.filename}: {reason}" if other else reason


def read_json(path: str | Path, remedy: str = "") -> Any:
    """What a JSON file holds; errors as `read_artifact` has them."""
    return read_artifact(path, load_json, remedy)


def load_json(path: Path) -> Any:
    """For `read_artifact`: what the file holds."""
    text = path.read_text(encoding="utf-8")
    try:
        return json.loads(text)
    except ValueError as error:
        raise ValueError(f"not valid JSON ({error})") from error


def load_array(path: Path) -> np.ndarray:
    """For `read_artifact`: the array in a file of numpy.save, and nothing after it."""
    with path.open("rb") as file:
        array = np.load(file, allow_pickle=False)
        if not isinstance(array, np.ndarray):
            raise ValueError(f"holds a {type(array).__name__}, not an array")
        if file.read(1):
            raise ValueError(f"has bytes after the array of shape {array.shape}")

    return array


# Sealed folders -----------------------------------------------------------------------------------------------------


def seal(folder: Path, facts: Mapping[str, Any]) -> None:
    """Write the folder's manifest: `facts`, and size and checksum of each file in it."""
    sums = {path.name: _sum(path) for path in sorted(folder.iterdir()) if path.name != MANIFEST}
    (folder / MANIFEST).write_text(json.dumps({**facts, "files": sums}))


def damage(folder: Path, names: Sequence[str] = ()) -> str | None:
    """What a sealed folder's manifest says otherwise, in a line; None where all is there, the files `names` too."""

    def parse(path: Path) -> str | None:
        sums = load_json(path)["files"]
        wrong = [name for name in (*names, *sums) if _sum(folder / name) != sums[name]]
        return (
            f"{folder / wrong[0]}: size or checksum is not what was written" if wrong else None
        )

    try:
        return read_artifact(folder / MANIFEST, parse)
    except ValueError as error:
        return str(error)


def _sum(path: Path) -> list[int]:
    """Size and CRC-32 of a file."""
    value = 0
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            value = zlib.crc32(block, value)

    return [path.stat().st_size, value]
