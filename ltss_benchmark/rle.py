"""Run-length encoding of masks as COCO stores it: runs down the columns, compressed to a string."""

import numpy as np


def encode_labels(label: np.ndarray) -> dict[int, str]:
    """The mask of every class in a label map (H, W), as COCO's compressed `counts`.

    A mask's runs are counted column after column, background first: n0 background pixels, n1 of the mask, n2 …; the
    map is walked through once for all classes.
    """
    flat = np.ascontiguousarray(label.T).ravel()
    if not flat.size:
        return {}

    start = np.flatnonzero(np.concatenate([[True], flat[1:] != flat[:-1]]))
    stop = np.append(start[1:], flat.size)
    value = flat[start]

    return {
        int(k): compress(_counts(start[value == k], stop[value == k], flat.size))
        for k in np.unique(value)
    }


def _counts(start: np.ndarray, stop: np.ndarray, size: int) -> np.ndarray:
    """Alternating lengths of background and mask; what follows the last run of the mask is background."""
    ends = np.stack([start, stop], 1).ravel()
    counts = np.diff(ends, prepend=0)
    return counts if stop[-1] == size else np.append(counts, size - stop[-1])


def compress(counts: np.ndarray) -> str:
    """COCO's string of run lengths (n,).

    From the fourth on a length is replaced by its difference to the second last before. Each number is written in
    groups of five bits, lowest first, as the character 48 + group, plus 32 where more follow; the sign is the highest
    bit of the last group.
    """
    left = np.asarray(counts, dtype=np.int64).copy()
    left[3:] -= np.asarray(counts, dtype=np.int64)[1:-2]
    position = []
    characters = []
    index = np.arange(len(left))

    for group in range(13):  # 64 bits
        bits = left & 31
        left >>= 5
        last = np.where(bits & 16, left == -1, left == 0)
        position.append(index * 13 + group)
        characters.append(bits + 48 + np.where(last, 0, 32))
        left = left[~last]
        index = index[~last]
        if not len(left):
            break

    order = np.argsort(np.concatenate(position), kind="stable")

    return np.concatenate(characters)[order].astype(np.uint8).tobytes().decode("ascii")
