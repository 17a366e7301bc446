"""Pictures of labels, errors and confidences: arrays in, uint8 (H, W, 3) out."""

from collections.abc import Sequence

import numpy as np

from common.data import IGNORE

Colour = tuple[int, int, int]
IGNORED: Colour = (38, 42, 50)
WRONG: Colour = (213, 94, 0)
WRONG_TAIL: Colour = (240, 228, 66)  # told from WRONG with any kind of colour vision
_VIRIDIS = (
    (68, 1, 84),
    (71, 44, 122),
    (59, 81, 139),
    (44, 113, 142),
    (33, 144, 141),
    (39, 173, 129),
)
_VIRIDIS += ((92, 200, 99), (170, 220, 50), (253, 231, 37))


def colourise(
    label: np.ndarray, palette: Sequence[Sequence[int]], ignored: Colour = IGNORED
) -> np.ndarray:
    """The palette's colours of a label (H, W) of class ids; `ignored` where it is IGNORE."""
    table = np.array([*palette, ignored], np.uint8)  # IGNORE is -1, the last entry
    assert IGNORE == -1
    return table[label]


def overlay(image: np.ndarray, colours: np.ndarray, alpha: float = 0.5) -> np.ndarray:
    """`colours` laid over `image`, both uint8 (H, W, 3); alpha 1 hides the image."""
    return (image * (1 - alpha) + colours * alpha + 0.5).astype(np.uint8)


def error_map(
    image: np.ndarray, truth: np.ndarray, pred: np.ndarray, tail: Sequence[int] = ()
) -> np.ndarray:
    """A faint grey image with wrong pixels in WRONG, or WRONG_TAIL where the truth is a tail class.

    image uint8 (H, W, 3); truth, pred (H, W). Pixels without a true class are IGNORED.
    """
    grey = image @ np.array([0.299, 0.587, 0.114])
    result = np.repeat((110 + 0.45 * grey)[..., None], 3, axis=-1).astype(np.uint8)
    wrong = (truth != pred) & (truth != IGNORE)
    result[wrong] = WRONG
    result[wrong & np.isin(truth, list(tail))] = WRONG_TAIL
    result[truth == IGNORE] = IGNORED

    return result


def confidence_map(confidence: np.ndarray) -> np.ndarray:
    """Confidence (H, W) in 0..1 from dark violet over green to yellow (viridis)."""
    stops = np.linspace(0, 1, len(_VIRIDIS))
    channels = [
        np.interp(confidence, stops, [colour[c] for colour in _VIRIDIS]) for c in range(3)
    ]
    return (np.stack(channels, axis=-1) + 0.5).astype(np.uint8)
