"""Classes that no training label shows, and the stored value that may have been meant for one of them."""

from collections import Counter

import numpy as np

from common.data.dataset import SegmentationDataset
from common.data.labels import IGNORE
from common.data.statistics import Statistics

LOOKED_AT = 64  # label files that are opened for the values that are ignored
_NAMED = 5  # classes that a warning names


def coverage_warnings(dataset: SegmentationDataset, statistics: Statistics) -> list[str]:
    """What the labels of a data set lack, one line each: the classes without a pixel, and the most frequent ignored
    value of a set that a config describes, which often is such a class (masks stored as 0 and 255)."""
    absent = [int(k) for k in np.flatnonzero(statistics.pixel_count == 0)]
    if not absent:
        return []

    where = f"the {len(dataset)} training labels of data set {dataset.row.name!r} ({dataset.source.split})"
    lack = f"{_classes(dataset, absent)} no pixel in {where}"
    if dataset.source.folder is not None:
        ignored = _most_ignored(dataset, statistics)
        if ignored is not None:
            return [f"{lack}, {_remedy(dataset, absent, *ignored)}"]

    they, their, them = ("it", "its", "it") if len(absent) == 1 else ("they", "their", "them")

    return [
        f"{lack}: {they} cannot be learnt and {their} IoU says nothing; add images that show {them}"
    ]


def _classes(dataset: SegmentationDataset, absent: list[int]) -> str:
    names = [f"{k} ({dataset.row.classes[k]})" for k in absent[:_NAMED]]
    more = f" and {len(absent) - _NAMED} more" if len(absent) > _NAMED else ""
    return (
        f"class {names[0]} has"
        if len(absent) == 1
        else f"classes {', '.join(names)}{more} have"
    )


def _most_ignored(
    dataset: SegmentationDataset, statistics: Statistics
) -> tuple[int, float] | None:
    """The stored value that most ignored pixels have, by at most LOOKED_AT labels, and its share of all pixels."""
    some = np.flatnonzero(statistics.ignored)
    if not len(some):
        return None

    chosen = some[np.linspace(0, len(some) - 1, min(len(some), LOOKED_AT)).astype(int)]
    found: Counter[int] = Counter()

    for index in chosen:
        path = dataset.records[index].label
        table = dataset.row.label_table(path)
        raw = table.stored(path)
        values, counts = np.unique(raw[table.decode(raw, path) == IGNORE], return_counts=True)
        found.update(dict(zip(values.tolist(), counts.tolist(), strict=True)))

    value = max(found, key=found.__getitem__)
    ignored = statistics.ignored.sum(dtype=np.int64)
    of_all = ignored / (ignored + statistics.pixel_count.sum())

    return value, found[value] / found.total() * float(of_all)


def _remedy(dataset: SegmentationDataset, absent: list[int], value: int, share: float) -> str:
    """What to write where the ignored value is a class after all."""
    row = dataset.row
    table = row.label_table(dataset.records[0].label)
    shown = (
        f"while {100 * share:.1f} % of their pixels are ignored with {table.describe(value)}"
    )
    if row.encoding == "rgb":
        return f"{shown}: if that is one of them, give it this colour in data.folder.palette"

    k = absent[0]
    entries = {v: c for v, c in table.entries.items() if c not in (IGNORE, k)} | {value: k}
    if len(absent) > 1 or len(entries) > 8:
        return (
            f"{shown}: if that is one of them, give its id to {value} in data.folder.label_map"
        )

    mapping = ", ".join(f"{v}: {c}" for v, c in sorted(entries.items()))

    return f"{shown}: if that is {row.classes[k]!r}, set data.folder.label_map: {{{mapping}}}"
