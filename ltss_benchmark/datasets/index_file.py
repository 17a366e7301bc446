"""Reading ADE20K's `index_ade20k.pkl` without running what is in it (see `common.pickles`)."""

import pickle
from pathlib import Path

from common import pickles


def read_index(path: Path) -> dict[str, list]:
    """The columns `folder`, `filename` and `objectnames` of the index, as lists of text.

    Raises ValueError for a missing or damaged file, one without these columns, and one that names anything but plain
    values and arrays.
    """
    try:
        with path.open("rb") as file:
            index = pickles.plain(pickles.load(file))
    except OSError as error:
        raise ValueError(f"{path}: cannot read the index of ADE20K ({error.strerror})") from error
    except pickles.Refused as error:
        raise ValueError(f"{path}: holds {error}, which is no plain value or array; refused") from error
    except (
        pickle.UnpicklingError,
        EOFError,
        ValueError,
        TypeError,
        AttributeError,
        KeyError,
        IndexError,
        UnicodeError,
    ) as error:
        raise ValueError(f"{path}: damaged file ({error})") from error
    missing = [key for key in ("folder", "filename", "objectnames") if not isinstance(index, dict) or key not in index]
    if missing:
        raise ValueError(f"{path}: has no {missing[0]!r}; this is not the index of the release 2021_17_01")
    columns = {key: [str(item) for item in index[key]] for key in ("folder", "filename", "objectnames")}
    if len(columns["folder"]) != len(columns["filename"]):
        raise ValueError(f"{path}: names {len(columns['folder'])} folders for {len(columns['filename'])} files")
    return columns
