"""Cross-validation over blocks of a drive: neighbouring frames of a video are on one side of every split."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

SEQUENCE = r"(.*?)[^A-Za-z0-9]?\d+"  # a name is a sequence's name and the number of a frame
DRAWS = 4096  # random assignments that are tried
WEIGHTLESS = 1e-12  # share of a class that a fold does not show


@dataclass(frozen=True)
class Folds:
    """The images of a data set in its order: the block of each (N,), and the fold of each block (B,), both from 0."""

    block: np.ndarray
    fold: np.ndarray

    @property
    def count(self) -> int:
        return int(self.fold.max()) + 1

    def tested(self, fold: int) -> np.ndarray:
        """Places of the images that a fold is measured on; every image is one of one fold."""
        return np.flatnonzero(self.fold[self.block] == fold)

    def trained(self, fold: int, neighbours: Sequence[np.ndarray]) -> np.ndarray:
        """Places of the other images, less those that are neighbours of a tested one.

        neighbours: of every image the places of those that are too near.
        """
        tested = set(self.tested(fold).tolist())
        near = {int(other) for place in tested for other in neighbours[place]}
        others = [place for place in range(len(self.block)) if place not in tested | near]
        return np.array(others, int)


def sequences(names: Sequence[str], pattern: str = SEQUENCE) -> list[list[int]]:
    """Places of the names of each sequence, in the order of their frames' numbers.

    pattern: its first group is the sequence's name; what follows it orders the frames, numbers as numbers. ValueError
    for a pattern without a group, and for a name that it does not match.
    """
    rule = re.compile(pattern)
    if not rule.groups:
        raise ValueError(
            f"sequence {pattern!r}: has no group for the sequence's name, such as (.*)_\\d+"
        )

    found: dict[str, list[int]] = {}
    for place, name in enumerate(names):
        match = rule.fullmatch(name)
        if match is None:
            raise ValueError(f"sequence {pattern!r}: does not match the image {name!r}")
        found.setdefault(match[1] or "", []).append(place)

    return [
        sorted(places, key=lambda place: natural(names[place])) for places in found.values()
    ]


def natural(name: str) -> list[tuple[int, str]]:
    """A key that sorts frame_9 before frame_10."""
    parts = re.findall(r"\d+|\D+", name)
    return [(int(part), "") if part.isdigit() else (-1, part) for part in parts]


def blocks(sequences: Sequence[Sequence[int]], size: int) -> np.ndarray:
    """The block of every image (N,): of each sequence runs of `size` frames or a little more, as equal as can be."""
    block = np.empty(sum(map(len, sequences)), int)
    number = 0

    for places in sequences:
        for run in np.array_split(np.array(places), max(1, len(places) // size)):
            block[run] = number
            number += 1

    return block


def neighbours(sequences: Sequence[Sequence[int]], gap: int) -> list[np.ndarray]:
    """Of every image the places of those of its sequence that are at most `gap` frames away."""
    found = [np.empty(0, int)] * sum(map(len, sequences))
    for places in sequences:
        run = np.array(places)
        for i, place in enumerate(places):
            found[place] = run[max(0, i - gap) : i + gap + 1]

    return found


def assigned(pixels: np.ndarray, block: np.ndarray, count: int, seed: int = 0) -> Folds:
    """Blocks dealt to `count` folds, in numbers that differ by one at most, so that classes have alike shares in all.

    pixels: (N, C) of every image. Of many random assignments, each bettered by exchanging two blocks as long as that
    helps, the one whose largest `deviation` is least. ValueError where there are fewer blocks than folds.
    """
    total = np.zeros((block.max() + 1, pixels.shape[1]))
    np.add.at(total, block, pixels)
    if len(total) < count:
        raise ValueError(
            f"{len(total)} blocks cannot be dealt to {count} folds; take smaller blocks or fewer folds"
        )

    draw = np.random.default_rng(seed)
    even = np.arange(len(total)) % count
    tried = np.stack([draw.permutation(even) for _ in range(DRAWS)])
    start = min(tried, key=lambda fold: deviation(total, fold, count).max())

    return Folds(block, _exchanged(total, start, count))


def _exchanged(total: np.ndarray, fold: np.ndarray, count: int) -> np.ndarray:
    """An assignment which no exchange of two blocks betters."""
    best = deviation(total, fold, count).max()
    improved = True

    while improved:
        improved = False
        for i in range(len(fold)):
            for j in range(i):
                other = fold.copy()
                other[[i, j]] = fold[[j, i]]
                value = deviation(total, other, count).max()
                if value < best - 1e-12:
                    fold, best, improved = other, value, True

    return fold


def deviation(total: np.ndarray, fold: np.ndarray, count: int) -> np.ndarray:
    """|ln| of a class's share in a fold over its share in all, (folds, classes that are shown).

    total: pixels of every block (B, C).
    """
    shown = total[:, total.sum(0) > 0]
    sums = np.zeros((count, shown.shape[1]))
    np.add.at(sums, fold, shown)
    share = np.maximum(sums / np.maximum(sums.sum(1, keepdims=True), 1), WEIGHTLESS)
    return np.abs(np.log(share / (shown.sum(0) / shown.sum())))
