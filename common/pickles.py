"""Reading pickles without running what is in them.

A pickle can call any function. Here it may hold plain values and name what `NUMPY`, or a caller's own table, lists:
NumPy arrays and scalars are rebuilt from their bytes, without NumPy's own constructors. Any other name is refused, and
so is what Python's unpickler does not survive.
"""

import io
import pickle
import pickletools
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
    return (
        _numbers(data, kind).reshape(shape, order=order) if kind.dtype is not None else Inert()
    )


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
    def __init__(self, data: bytes, known: Mapping[str, Any]):
        super().__init__(io.BytesIO(data), encoding="latin1")
        self.known = known

    def find_class(self, module: str, name: str) -> Any:
        # Python 2 called it so
        full = f"{'builtins' if module == '__builtin__' else module}.{name}"
        if full not in self.known:
            raise Refused(full)
        return self.known[full]


def load(data: bytes, known: Mapping[str, Any] = NUMPY) -> Any:
    """The pickled value. known: what each name that may occur becomes; with `NUMPY`'s, `plain` has to follow.

    Raises Refused for any other name; ValueError for what `check` finds; other errors where the file is damaged
    (`common.files.read_artifact` makes one line of each).
    """
    check(io.BytesIO(data), len(data))
    return _Unpickler(data, known).load()


# Before it is unpickled ---------------------------------------------------------------------------------------------

# tuples within tuples; hashing them recurses in C and overflows the stack at some 100 000
DEEPEST = 100
_PUTS = ("PUT", "BINPUT", "LONG_BINPUT")
_GETS = ("GET", "BINGET", "LONG_BINGET")
_TUPLES = ("TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "FROZENSET")

_Depth = int | None  # of a value on the unpickler's stack: tuples within it; None is a mark


def check(file: BinaryIO, size: int) -> None:
    """Raise ValueError for a pickle that would take the process with it; nothing in it is run or made.

    That is: lengths beyond its end, memo numbers beyond any need (their table is allocated at once), deep tuples.
    file: stands at the pickle, and afterwards behind it. size: in bytes, of the whole file.
    """
    stack: list[_Depth] = []
    memo: dict[int, _Depth] = {}

    for code, argument, _ in pickletools.genops(file):
        if code.name in _PUTS and argument > size:
            raise ValueError(f"memo number {argument} in a pickle of {size} bytes")
        if code.name in _PUTS or code.name == "MEMOIZE":
            memo[argument if code.name in _PUTS else len(memo)] = stack[-1] if stack else 0
        elif code.name in _GETS:
            stack.append(memo.get(argument, 0))
        elif code.name == "DUP":
            stack.append(stack[-1] if stack else 0)
        else:
            _apply(code, stack)

        if stack and (stack[-1] or 0) > DEEPEST:
            raise ValueError(f"more than {DEEPEST} tuples within each other")


def _apply(code: pickletools.OpcodeInfo, stack: list[_Depth]) -> None:
    """Take from the stack what an operation takes, and put the depths of what it makes."""
    before = code.stack_before
    taken: list[_Depth] = []
    if pickletools.markobject in before:
        while stack and stack[-1] is not None:
            taken.append(stack.pop())
        before = before[: before.index(pickletools.markobject) + 1]

    for _ in range(min(len(before), len(stack))):
        taken.append(stack.pop())

    inner = max((depth or 0 for depth in taken), default=0)
    depth = 1 + inner if code.name in _TUPLES else 0

    for made in code.stack_after:
        stack.append(None if made is pickletools.markobject else depth)


# Afterwards ---------------------------------------------------------------------------------------------------------


def plain(value: Any) -> Any:
    """`value` with real arrays in place of what they were rebuilt in. ValueError where something contains itself."""
    return _plain(value, {}, set())


def _plain(value: Any, done: dict[int, Any], open_: set[int]) -> Any:
    """`done` has what was made of each object already, so that what is shared stays shared."""
    if isinstance(value, _Array):
        return value.value
    if not (isinstance(value, Mapping) or type(value) in (list, tuple)):
        return value

    key = id(value)
    if key in open_:
        raise ValueError(f"a {type(value).__name__} that contains itself")

    if key not in done:
        open_.add(key)
        if isinstance(value, Mapping):
            done[key] = {name: _plain(item, done, open_) for name, item in value.items()}
        else:
            done[key] = type(value)(_plain(item, done, open_) for item in value)

        open_.remove(key)

    return done[key]
