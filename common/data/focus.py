"""What the crop of a draw is meant to show. A sampler hands it to the recipe in the opened sample, as `focus`."""

from collections.abc import Callable, MutableMapping
from typing import Any, NamedTuple

import numpy as np

from common.data.geometry import Geometry, Rule, nearest_crop, nearest_index

REDRAWS = 10  # DAFormer's: the last one is taken as it is


class Focus(NamedTuple):
    """A class, and what the crop owes it.

    near: a point, in shares of the image's height and width, that lies in the crop. pixels, share: the crop shows more
    pixels of the class than this number, or than this share of the crop, or is drawn again; 0 asks for nothing.
    """

    class_id: int
    near: tuple[float, float] | None = None
    pixels: float = 0
    share: float = 0

    def least(self, crop: tuple[int, int]) -> float:
        """Pixels of the class that a crop (height, width) has to exceed."""
        return max(self.pixels, self.share * crop[0] * crop[1])


def take_focus(sample: MutableMapping[str, Any]) -> Focus | None:
    """The focus of an opened sample, which loses it: it is no map that a crop is cut from."""
    return sample.pop("focus", None)


def point_of(focus: Focus | None) -> tuple[float, float] | None:
    """The point that the crop has to contain, where there is one."""
    return None if focus is None else focus.near


def draw_until_shown(
    draw: Callable[[], Geometry],
    focus: Focus | None,
    label: np.ndarray | None,
    crop: tuple[int, int],
    rule: Rule = nearest_index,
) -> Geometry:
    """A geometry by `draw`; it is drawn again, at most REDRAWS times, while its crop shows too little of the class."""
    g = draw()
    if focus is None or not focus.least(crop):
        return g

    for _ in range(REDRAWS):
        shown = np.count_nonzero(nearest_crop(label, g, crop, rule) == focus.class_id)
        if shown > focus.least(crop):
            break
        g = draw()

    return g
