"""Procedural photographs of people for human parsing (MHP-v2): parts of the body, clothes and things they carry.

People face the camera, so what is left to them is on the right of the picture. Clothes, footwear and things are drawn
with the long tail of MHP-v2-LT: the classes of each list stand in the order of their published counts.
"""

import numpy as np

from common.data.toy.canvas import Canvas, Pen, Place
from common.data.toy.glyphs import backdrop, begin, glyph, spread, zipf
from common.data.toy.objects import CLOTHES, SKIN, pick
from common.data.toy.scene import Scene

FACE, HAIR, TORSO_SKIN, SOCKS, STOCKINGS = 3, 4, 16, 21, 20
ARMS, HANDS, LEGS = (5, 6), (7, 8), (30, 31)  # left, right
# T-shirt, jacket, singlet, dress, coat, …, jumpsuit
UPPER = (
    12,
    11,
    15,
    35,
    34,
    14,
    57,
    36,
    13,
    38,
    10,
    37,
)
LOWER = (17, 18, 19, 58)  # pants, shorts, skirt, other
LONG = {35, 34, 36, 38, 37}  # what covers the legs down to the knee
# shoes, bare feet, high heels, sandals, boots
FOOTWEAR = (
    (24, 25),
    (32, 33),
    (26, 27),
    (28, 29),
    (22, 23),
)
THINGS = {  # class: height in metres and distance to the side of its middle, radius
    55: (1.15, 0.0, 0.10), 48: (1.62, 0.0, 0.06), 53: (0.92, 0.3, 0.05), 43: (0.86, 0.0, 0.10), 1: (1.76, 0.0, 0.11),
    45: (0.62, 0.4, 0.17), 47: (1.62, 0.0, 0.07), 54: (0.95, -0.3, 0.05), 50: (1.40, 0.0, 0.12), 39: (1.78, 0.0, 0.10),
    49: (0.82, -0.32, 0.08), 40: (1.15, 0.2, 0.18), 44: (0.85, 0.4, 0.09), 9: (0.45, 0.1, 0.09), 52: (0.8, -0.38, 0.09),
    41: (0.15, 0.5, 0.16), 2: (1.78, 0.0, 0.15), 46: (0.25, -0.5, 0.2), 42: (0.9, 0.5, 0.2), 51: (2.0, 0.2, 0.35),
}  # fmt: skip
_REACH = 0.75  # half the width that a person's parts may take, in metres


def mhp_scene(seed: int, domain: str, index: int, size: tuple[int, int]) -> Scene:
    """One to four people before a background; label uint8 of MHP-v2's classes, 0 the background."""
    canvas, (geometry, colour, noise) = begin(seed, domain, 3, index, size)
    backdrop(canvas, colour)
    scales = np.sort(geometry.uniform(0.28, 0.5, 1 + int(geometry.integers(4))))
    for j, scale in enumerate(scales):
        x, y = geometry.uniform(0.15, 0.85) * canvas.aspect, geometry.uniform(0.85, 1.05)
        quantiles = [
            spread(seed, canvas.domain.number, 4 * (4 * index + j) + n) for n in range(4)
        ]
        person(canvas, geometry, Place(x, y, float(scale) * min(canvas.aspect, 1)), quantiles)
    return Scene(canvas.finish(noise, colour), canvas.label, canvas.instance)


def person(
    canvas: Canvas, rng: np.random.Generator, place: Place, quantiles: list[float]
) -> None:
    """A standing person; the four quantiles choose upper and lower clothes, footwear, and a thing."""
    upper = UPPER[zipf(quantiles[0], 0, len(UPPER), 1.2)]
    lower = LOWER[zipf(quantiles[1], 0, len(LOWER), 1.5)]
    footwear = FOOTWEAR[zipf(quantiles[2], 0, len(FOOTWEAR), 1.3)]
    pen = canvas.pen(place, _REACH, _REACH, 1.95, 0.05)
    skin, shirt, trousers = pick(rng, SKIN), pick(rng, CLOTHES), pick(rng, CLOTHES)
    _legs(pen, rng, skin, trousers, lower)
    _feet(pen, rng, skin, footwear)
    bottom = 0.45 if upper in LONG else 0.84
    stripes = 0.8 + 0.4 * (np.mod(pen.v * (4 + UPPER.index(upper)), 1) < 0.5).astype(np.float32)
    pen.fill(pen.box(-0.06, 0.06, 1.4, 1.52), skin, TORSO_SKIN)
    pen.fill(
        pen.box(-0.23, 0.23, bottom, 1.43),
        shirt,
        upper,
        np.broadcast_to(stripes, (len(pen.v), pen.u.shape[1])),
    )
    _arms(pen, skin if upper in (12, 15, 10) else shirt, skin)
    pen.fill(
        pen.ellipse(0, 1.68, 0.14, 0.14),
        rng.uniform(0.05, 0.45) * np.array((1.0, 0.8, 0.6)),
        HAIR,
    )
    pen.fill(pen.ellipse(0, 1.6, 0.1, 0.13), skin, FACE)
    if rng.random() < 0.6:
        thing = list(THINGS)[zipf(quantiles[3], 0, len(THINGS), 1.2)]
        height, aside, radius = THINGS[thing]
        at = Place(
            place.x + aside * place.scale, place.y - height * place.scale, radius * place.scale
        )
        glyph(canvas, rng, at, list(THINGS).index(thing) * 3)
        canvas.label[canvas.instance == canvas.count] = thing


def _legs(
    pen: Pen, rng: np.random.Generator, skin: np.ndarray, trousers: np.ndarray, lower: int
) -> None:
    knee = {17: 0.12, 18: 0.55, 19: 0.5, 58: 0.35}[lower]
    for label, side in zip(LEGS, (1, -1), strict=True):
        pen.fill(_limb(pen, side, 0.03, 0.17, 0.1, 0.86), skin, label)
    stretched = rng.random()
    if knee > 0.2 and stretched < 0.25:
        cover, top = (SOCKS, 0.25) if stretched < 0.15 else (STOCKINGS, 0.6)
        pen.fill(
            pen.box(-0.17, 0.17, 0.1, top) & (np.abs(pen.u) > 0.03), (0.85, 0.83, 0.8), cover
        )
    gap = 0.02 if lower in (17, 18) else -1.0
    pen.fill(pen.box(-0.2, 0.2, knee, 0.88) & (np.abs(pen.u) > gap), trousers, lower)


def _feet(
    pen: Pen, rng: np.random.Generator, skin: np.ndarray, footwear: tuple[int, int]
) -> None:
    bare, high = footwear == (32, 33), 0.3 if footwear == (22, 23) else 0.13
    colour = skin if bare else np.array((0.12, 0.1, 0.1)) + rng.uniform(0, 0.3, 3)
    for label, side in zip(footwear, (1, -1), strict=True):
        pen.fill(_limb(pen, side, 0.02, 0.2, -0.01, high), colour, label)


def _arms(pen: Pen, sleeve: np.ndarray, skin: np.ndarray) -> None:
    for arm, hand, side in zip(ARMS, HANDS, (1, -1), strict=True):
        pen.fill(_limb(pen, side, 0.23, 0.35, 0.9, 1.42), sleeve, arm)
        pen.fill(pen.ellipse(side * 0.29, 0.85, 0.07, 0.08), skin, hand)


def _limb(pen: Pen, side: int, near: float, far: float, low: float, high: float) -> np.ndarray:
    """A box on the person's left (side 1) or right."""
    return pen.box(near, far, low, high) if side > 0 else pen.box(-far, -near, low, high)
