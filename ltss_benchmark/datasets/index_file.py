"""Reading ADE20K's `index_ade20k.pkl` without running what is in it.

A pickle can call any function. This reader knows plain containers, text and NumPy arrays, which it rebuilds from their
bytes; it refuses any other name.
"""

import pickle
import re
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np


class _Kind:
    """A NumPy number, text or object type."""

    def __init__(self, code: str, *flags):
        if not re.fullmatch(r"[<>|=]?([biufcUS]\d+|O\d*|\?)", code):
            raise pickle.UnpicklingError(f"NumPy type {code!r}")
        self.objects = code.strip("<>|=").startswith("O")
        self.dtype = np.dtype(object if self.objects else code)

    def __setstate__(self, state):
        if state[1] in ("<", ">") and not self.objects:
            self.dtype = self.dtype.newbyteorder(state[1])


class _Array:
    """A NumPy array, made from its bytes, or from its list of objects."""

    value: np.ndarray

    def __init__(self, *args):
        pass

    def __setstate__(self, state):
        *_, shape, kind, fortran, data = state
        if kind.objects:
            flat = np.empty(len(data), object)
            flat[:] = [plain(item) for item in data]
        else:
            flat = np.frombuffer(_bytes(data), kind.dtype)
        self.value = flat.reshape(shape, order="F" if fortran else "C")


def _bytes(data: bytes | str) -> bytes:
    return data.encode("latin1") if isinstance(data, str) else data


def _scalar(kind: _Kind, data: bytes | str = b"") -> Any:
    return plain(data) if kind.objects else np.frombuffer(_bytes(data), kind.dtype)[0].item()


def _from_buffer(data: bytes, kind: _Kind, shape: tuple[int, ...], order: str) -> np.ndarray:
    return np.frombuffer(data, kind.dtype).reshape(shape, order=order)


def _encode(text: str, encoding: str = "latin1") -> bytes:
    return text.encode("latin1")


def _no_bytes() -> bytes:
    return b""  # protocol 2 writes an empty array's data so


_KNOWN: dict[str, Any] = {
    "collections.OrderedDict": OrderedDict,
    "_codecs.encode": _encode,
    "builtins.bytes": _no_bytes,
    "numpy.ndarray": _Array,
    "numpy.dtype": _Kind,
}
for _core in ("numpy.core", "numpy._core"):
    _KNOWN |= {f"{_core}.multiarray._reconstruct": _Array, f"{_core}.multiarray.scalar": _scalar}
    _KNOWN |= {f"{_core}.numeric._frombuffer": _from_buffer}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        full = f"{'builtins' if module == '__builtin__' else module}.{name}"  # Python 2 called it so
        if full not in _KNOWN:
            raise pickle.UnpicklingError(f"the name {full}")
        return _KNOWN[full]


def plain(value: Any) -> Any:
    """`value` with real arrays in place of what they were rebuilt in."""
    return value.value if isinstance(value, _Array) else value


def read_index(path: Path) -> dict[str, list]:
    """The columns `folder`, `filename` and `objectnames` of the index, as lists of text.

    Raises ValueError for a missing or damaged file, one without these columns, and one that names anything but plain
    values and arrays.
    """
    try:
        with path.open("rb") as file:
            index = _Unpickler(file, encoding="latin1").load()
    except OSError as error:
        raise ValueError(f"{path}: cannot read the index of ADE20K ({error.strerror})") from error
    except pickle.UnpicklingError as error:
        raise ValueError(f"{path}: holds {error}, which is no plain value or array; refused") from error
    except (EOFError, ValueError, TypeError, AttributeError, KeyError, IndexError, UnicodeError) as error:
        raise ValueError(f"{path}: damaged file ({error})") from error
    missing = [key for key in ("folder", "filename", "objectnames") if not isinstance(index, dict) or key not in index]
    if missing:
        raise ValueError(f"{path}: has no {missing[0]!r}; this is not the index of the release 2021_17_01")
    columns = {key: [str(item) for item in plain(index[key])] for key in ("folder", "filename", "objectnames")}
    if len(columns["folder"]) != len(columns["filename"]):
        raise ValueError(f"{path}: names {len(columns['folder'])} folders for {len(columns['filename'])} files")
    return columns
