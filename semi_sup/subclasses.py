"""How many subclasses each class gets, and which class a subclass belongs to.

Subclasses are numbered class by class: those of class c are o_c … o_c + k_c − 1 with o_c = k_0 + … + k_{c−1}.
"""

from collections.abc import Sequence
from math import ceil

import numpy as np
import torch
from torch import Tensor

from common.config import ConfigError, nearest

LIMIT = 254  # subclass labels are 8-bit images, and 255 is void

# The release's numbers, in class order. They fix the size of its checkpoints, and no rule gives all of them.
PRESETS: dict[str, tuple[int, ...]] = {
    "voc_1over64": (136, 2, 2, 1, 1, 1, 2, 4, 8, 3, 1, 2, 7, 2, 2, 18, 1, 1, 1, 3, 3),
    "voc_1over32": (121, 2, 1, 1, 1, 1, 3, 3, 6, 3, 1, 2, 6, 2, 2, 15, 1, 1, 2, 2, 1),
    "voc_1over16": (132, 2, 1, 1, 1, 2, 3, 4, 7, 2, 1, 2, 6, 2, 2, 15, 1, 1, 2, 2, 1),
    "city_1over32": (38, 6, 22, 1, 2, 2, 1, 1, 17, 2, 5, 1, 1, 7, 1, 1, 1, 1, 1),
    "city_1over16": (45, 7, 28, 1, 2, 2, 1, 1, 20, 2, 5, 2, 1, 8, 1, 1, 1, 1, 1),
    "city_1over8": (42, 7, 26, 1, 2, 2, 1, 1, 19, 2, 5, 2, 1, 8, 1, 1, 1, 1, 1),
}


def subclass_counts(pixels: Sequence[int] | np.ndarray, limit: int = LIMIT) -> tuple[int, ...]:
    """Numbers of subclasses k_c from the labelled pixels of each class: k_c = max(1, ⌈n_c / u⌉).

    The unit u is the median over the classes that are present, so half of them stay whole. Where that gives more than
    `limit` in all, u is the smallest larger one that does not. Raises ValueError where no pixel is labelled, or where
    there are more classes than `limit`.
    """
    pixels = np.asarray(pixels, dtype=np.float64)
    if len(pixels) > limit:
        raise ValueError(
            f"{len(pixels)} classes cannot have subclasses of their own: the limit is {limit} in all"
        )
    if not (pixels > 0).any():
        raise ValueError("no labelled pixel of any class: subclasses need labelled images")

    unit = float(np.median(pixels[pixels > 0]))
    counts = _counts(pixels, unit)
    if counts.sum() > limit:
        # the counts change where a unit divides a class's pixels into a whole number of parts
        units = np.unique(pixels[:, None] / np.arange(1, limit + 1))
        units = units[units > unit]
        low, high = 0, len(units) - 1  # the largest unit leaves every class whole

        while low < high:
            middle = (low + high) // 2
            low, high = (
                (low, middle)
                if _counts(pixels, units[middle]).sum() <= limit
                else (middle + 1, high)
            )

        counts = _counts(pixels, units[low])

    return tuple(int(count) for count in counts)


def _counts(pixels: np.ndarray, unit: float) -> np.ndarray:
    # n / (n / 3) may be 3.0000000000000004
    whole = np.array([ceil(n / unit - 1e-9) for n in pixels])
    return np.maximum(whole, 1)


def check_counts(counts: Sequence[int], num_classes: int) -> tuple[int, ...]:
    """`counts` as a tuple. Raises ValueError unless it has one positive number per class, and at most 254 in all."""
    counts = tuple(int(count) for count in counts)
    if len(counts) != num_classes:
        raise ValueError(f"{len(counts)} numbers of subclasses for {num_classes} classes")
    if min(counts) < 1:
        raise ValueError(
            f"class {counts.index(min(counts))} has {min(counts)} subclasses; the least is 1"
        )
    if sum(counts) > LIMIT:
        raise ValueError(f"{sum(counts)} subclasses in all; 8-bit labels allow {LIMIT}")

    return counts


def chosen_counts(choice: str | Sequence[int], num_classes: int, where: str) -> tuple[int, ...]:
    """The numbers of subclasses that a config gives: the name of a preset, or numbers. Raises ConfigError."""
    if isinstance(choice, str) and choice not in PRESETS:
        raise ConfigError(
            f"{where}: {choice!r} is no preset; {nearest(choice, PRESETS)}; or give the numbers"
        )
    try:
        return check_counts(PRESETS[choice] if isinstance(choice, str) else choice, num_classes)
    except ValueError as error:
        raise ConfigError(f"{where}: {error}") from error


def offsets(counts: Sequence[int]) -> Tensor:
    """First subclass of each class, int64 (C,)."""
    counts = torch.as_tensor(counts, dtype=torch.int64)
    return counts.cumsum(0) - counts


def parents(counts: Sequence[int]) -> Tensor:
    """Class of each subclass, int64 (K,)."""
    return torch.tensor(
        [c for c, count in enumerate(counts) for _ in range(count)], dtype=torch.int64
    )
