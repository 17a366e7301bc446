"""Reading ADE20K's `index_ade20k.pkl` without running what is in it (see `common.pickles`)."""

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from common import pickles
from common.files import read_artifact

COLUMNS = ("folder", "filename", "objectnames")


def read_index(path: Path) -> dict[str, list[str]]:
    """The columns `folder`, `filename` and `objectnames` of the index, as lists of text.

    Raises ValueError for a missing or damaged file, one without these columns, and one that names anything but plain
    values and arrays.
    """
    return read_artifact(path, _parse)


def _parse(path: Path) -> dict[str, list[str]]:
    try:
        index = pickles.plain(pickles.load(path.read_bytes()))
    except OSError as error:
        raise ValueError(f"cannot read the index of ADE20K ({error.strerror})") from error
    except pickles.Refused as error:
        raise ValueError(f"holds {error}, which is no plain value or array; refused") from error
    except pickle.UnpicklingError as error:
        raise ValueError(f"damaged file ({error})") from error

    missing = [key for key in COLUMNS if not isinstance(index, Mapping) or key not in index]
    if missing:
        raise ValueError(
            f"has no {missing[0]!r}; this is not the index of the release 2021_17_01"
        )

    columns = {key: _texts(index[key], key) for key in COLUMNS}
    if len(columns["folder"]) != len(columns["filename"]):
        raise ValueError(
            f"names {len(columns['folder'])} folders for {len(columns['filename'])} files"
        )

    return columns


def _texts(column: Any, key: str) -> list[str]:
    items = list(column)
    wrong = [type(item).__name__ for item in items if not isinstance(item, str)]
    if wrong:
        raise ValueError(f"column {key!r} holds a {wrong[0]} in place of a text")

    return [str(item) for item in items]
