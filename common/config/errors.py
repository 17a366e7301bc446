"""The error of a config, and how values stand in its message."""

import difflib
import reprlib
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

V = TypeVar("V")
LARGEST = 2**63 - 1  # of the integers that a config may hold: those of 64 bits


class ConfigError(ValueError):
    """A config that cannot be used; the message is one line that names the key, the value and the fix."""


class OutOfBounds(ConfigError):
    """A value of the right type that its key does not allow."""


class _Short(reprlib.Repr):
    """`repr` of the first few items, so that neither a long value nor a deep one fills the screen."""

    def __init__(self):
        super().__init__()
        self.maxlevel = 3
        self.maxstring = self.maxother = self.maxlong = 60

    def repr_int(self, value: int, level: int) -> str:
        if abs(value) > LARGEST:  # Python refuses to print those of thousands of digits
            return f"<integer of {value.bit_length()} bits>"
        return super().repr_int(value, level)


_SHORT = _Short()


def shown(value: Any) -> str:
    """`value` as it stands in a message: its `repr`, at most some 100 characters long."""
    text = _SHORT.repr(value)
    return text if len(text) <= 100 else f"{text[:80]}…"


def nearest(key: str, known: Iterable[str]) -> str:
    """The advice after an unknown key: the known one that looks like it, or all that are known."""
    known = list(known)
    close = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}?" if close else f"known keys: {', '.join(known)}"


def pick(table: Mapping[str, V], name: Any, where: str) -> V:
    """The entry of `table` that a config names. ConfigError, which begins with `where`, for any other value."""
    if isinstance(name, str) and name in table:
        return table[name]
    raise ConfigError(f"{where}: unknown {shown(name)}; {nearest(str(name)[:100], table)}")
