"""The folder of a toy set: the old set or the new one, never half of either, whatever stops the writer."""

import glob
import json
import os
import re
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from common.files import load_json, read_artifact

MARKER = "toy.json"

Fill = Callable[[Path, Counter], None]


def _complete(root: Path, params: dict) -> bool:
    """Whether `root` holds exactly this set. ValueError where it holds files that are no toy set."""
    marker = root / MARKER
    if marker.is_file():
        found = read_artifact(
            marker, lambda path: load_json(path)["params"], "remove the folder to write it anew"
        )
        return found == params
    if root.exists() and (not root.is_dir() or any(root.iterdir())):
        raise ValueError(
            f"{root}: holds something that is no toy set ({MARKER} is missing); choose another root"
        )
    return False


def write_once(root: str | Path, params: dict, fill: Fill) -> Path:
    """Fills a folder beside `root` and renames it, so that `root` is the old set or the new one, never half of it."""
    root = Path(root).absolute()
    _remove_leftovers(root)
    if _complete(root, params):
        return root
    part, old = (root.parent / f".{root.name}.{os.getpid()}.{end}" for end in ("part", "old"))
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    try:
        counts: Counter = Counter()
        fill(part, counts)
        (part / MARKER).write_text(
            json.dumps({"params": params, "pixels": counts}, indent=1) + "\n"
        )
        if _complete(root, params):  # another process was faster
            return root
        if root.exists():
            root.rename(old)
        part.rename(root)
    finally:
        shutil.rmtree(part, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)
    return root


def _remove_leftovers(root: Path) -> None:
    """Remove what killed processes left beside `root`; the number in such a folder's name is its process."""
    for path in root.parent.glob(f".{glob.escape(root.name)}.*"):
        match = re.fullmatch(
            r"\.(\d{1,9})\.(part|old)", path.name.removeprefix(f".{root.name}")
        )
        if match and not _is_running(int(match[1])):
            shutil.rmtree(path, ignore_errors=True)


def _is_running(process: int) -> bool:
    """Whether there is such a process; true where the system cannot be asked."""
    if os.name != "posix":
        return True
    try:
        os.kill(process, 0)  # no signal, only the check
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True
