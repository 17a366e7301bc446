"""Reading pickles without running what is in them.

A pickle can call any function. Here it may hold plain values and name what `NUMPY`, or a caller's own table, lists:
NumPy arrays and scalars are rebuilt from their bytes, without NumPy's own constructors. Any other name is refused.
"""

import pickle
import re
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any, BinaryIO

import numpy as np


class Inert:
    """Stands for an object that nothing hangs on."""

    def __init__(self, *args, **kwargs):
        pass

    def __setstate__(self, state):
        pass


class _Dtype:
    """A NumPy type of numbers, text or objects; arrays of any other kind become inert."""

    def __init__(self, code: str, *flags):
        known = re.fullmatch(r"[<>|=]?([biufc]\d{1,2}|[SU]\d+|O\d*|\?)", code)
        self.objects = bool(known) and known[1].startswith("O")
        self.dtype = np.dtype(object if self.objects else code) if known else None

    def __setstate__(self, state):
        if self.dtype is not None and not self.objects and state[1] in ("<", ">"):
            self.dtype = self.dtype.newbyteorder(state[1])


class _Array:
    """A NumPy array, made from its bytes, or from its list of objects."""

    value: Any = None

    def __init__(self, *args):
        pass

    def __setstate__(self, state):
        *_, shape, kind, fortran, data = state
        if kind.dtype is None:
            self.value = Inert()
            return
        if kind.objects:
            flat = np.empty(len(data), object)
            flat[:] = [plain(item) for item in data]
        else:
            flat = _numbers(data, kind)
        self.value = flat.reshape(shape, order="F" if fortran else "C")


def _numbers(data: bytes | str, kind: _Dtype) -> np.ndarray:
    return np.frombuffer(data.encode("latin1") if isinstance(data, str) else data, kind.dtype)


def _scalar(kind: _Dtype, data: Any = b"") -> Any:
    if kind.dtype is None:
        return Inert()
    return plain(data) if kind.objects else _numbers(data, kind)[0].item()


def _from_buffer(data: bytes, kind: _Dtype, shape: tuple[int, ...], order: str) -> Any:
    return _numbers(data, kind).reshape(shape, order=order) if kind.dtype is not None else Inert()


def _encode(text: str, encoding: str = "latin1") -> bytes:
    return text.encode("latin1")


def _no_bytes() -> bytes:
    return b""  # protocol 2 writes an empty array's data so


NUMPY: dict[str, Any] = {
    "collections.OrderedDict": OrderedDict,
    "_codecs.encode": _encode,
    "builtins.bytes": _no_bytes,
    "numpy.ndarray": _Array,
    "numpy.dtype": _Dtype,
}
for _core in ("numpy.core", "numpy._core"):
    NUMPY |= {f"{_core}.multiarray._reconstruct": _Array, f"{_core}.multiarray.scalar": _scalar}
    NUMPY |= {f"{_core}.numeric._frombuffer": _from_buffer}


class Refused(pickle.UnpicklingError):
    """The pickle names something outside the table: `name`, as module.attribute."""

    def __init__(self, name: str):
        super().__init__(f"the name {name}")
        self.name = name


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: BinaryIO, known: Mapping[str, Any]):
        super().__init__(file, encoding="latin1")
        self.known = known

    def find_class(self, module: str, name: str) -> Any:
        full = f"{'builtins' if module == '__builtin__' else module}.{name}"  # Python 2 called it so
        if full not in self.known:
            raise Refused(full)
        return self.known[full]


def load(file: BinaryIO, known: Mapping[str, Any] = NUMPY) -> Any:
    """The pickled value. known: what each name that may occur becomes; with `NUMPY`'s, `plain` has to follow.

    Raises Refused for any other name; other errors of `pickle` where the file is damaged.
    """
    return _Unpickler(file, known).load()


def plain(value: Any) -> Any:
    """`value` with real arrays in place of what they were rebuilt in."""
    if isinstance(value, _Array):
        return value.value
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    return type(value)(map(plain, value)) if type(value) in (list, tuple) else value
