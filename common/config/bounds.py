"""What a field of an options dataclass allows beyond its type, said in its annotation and checked by `typed`.

points: Annotated[int, AtLeast(1)] = 12544
crop: tuple[Side, Side] | None = None
"""

import re
from dataclasses import dataclass
from typing import Annotated, Any, Protocol


class Bound(Protocol):
    """A condition on a value that has the right type already."""

    def complaint(self, value: Any) -> str | None:
        """What is wrong with `value`, for a message that has named key and value; None where it fits."""


@dataclass(frozen=True)
class AtLeast:
    """value ≥ low. `advice` ends the message."""

    low: float
    advice: str = ""

    def complaint(self, value: float) -> str | None:
        if value >= self.low:
            return None
        return f"is less than {self.low}" + (f"; {self.advice}" if self.advice else "")


@dataclass(frozen=True)
class Above:
    """value > low."""

    low: float

    def complaint(self, value: float) -> str | None:
        return None if value > self.low else f"is not above {self.low}"


@dataclass(frozen=True)
class AtMost:
    """value ≤ high."""

    high: float

    def complaint(self, value: float) -> str | None:
        return None if value <= self.high else f"is more than {self.high}"


@dataclass(frozen=True)
class Below:
    """value < high."""

    high: float

    def complaint(self, value: float) -> str | None:
        return None if value < self.high else f"is not below {self.high}"


@dataclass(frozen=True)
class Length:
    """A list of so many items."""

    low: int = 1
    high: int | None = None

    def complaint(self, value: tuple) -> str | None:
        if len(value) < self.low:
            return "is empty" if not value else f"has {len(value)} items, fewer than {self.low}"
        if self.high is not None and len(value) > self.high:
            return f"has {len(value)} items, more than {self.high}"
        return None


class Ascending:
    """A list in which no item is less than the one before, such as an interval."""

    def complaint(self, value: tuple) -> str | None:
        return None if list(value) == sorted(value) else "is not in ascending order"


class Pattern:
    """A regular expression."""

    def complaint(self, value: str) -> str | None:
        try:
            re.compile(value)
        except re.error as error:
            return f"is no regular expression ({error})"

        return None


# Whole numbers
Count = Annotated[int, AtLeast(1)]
Whole = Annotated[int, AtLeast(0)]
Side = Annotated[int, AtLeast(1), AtMost(65536)]  # pixels of an image, crop or window
Width = Annotated[int, AtLeast(1), AtMost(16384)]  # channels of a layer
Depth = Annotated[int, AtLeast(1), AtMost(64)]  # layers, blocks, heads
Classes = Annotated[int, AtLeast(1), AtMost(32768)]  # labels are 16-bit with a sign
Processes = Annotated[int, AtLeast(0), AtMost(1024)]

# Real numbers
Positive = Annotated[float, Above(0)]
NotNegative = Annotated[float, AtLeast(0)]
Share = Annotated[float, AtLeast(0), AtMost(1)]
Rate = Annotated[float, AtLeast(0), Below(1)]  # dropout, momentum: at 1 nothing would be left
Momentum = Annotated[float, Above(0), Below(1)]  # of a moving average
Scale = Annotated[float, AtLeast(0.01), AtMost(100)]  # of an image's size

Size = tuple[Side, Side]  # height, width
Interval = Annotated[tuple[Scale, Scale], Ascending()]  # that a scale is drawn from
