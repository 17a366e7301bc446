"""Procedural object scenes: photographs of a few things (VOC) and interiors of many classes (ADE20K-Full).

A class is a silhouette × texture × colour; silhouettes, textures and colours are each shared by many classes.
Labels are made from instance numbers: object n of a scene has the class that was drawn for it.
"""

import numpy as np

from common.data.toy import objects as things
from common.data.toy.canvas import DOMAINS, Canvas, Pen, Place
from common.data.toy.scene import Quota, Scene

COLOURS = ((0.75, 0.25, 0.20), (0.30, 0.45, 0.75), (0.35, 0.55, 0.28), (0.78, 0.68, 0.30), (0.55, 0.35, 0.60),
           (0.62, 0.60, 0.57), (0.50, 0.36, 0.24), (0.28, 0.60, 0.62))  # fmt: skip
FORMS = 64  # silhouette × texture; further classes repeat them in other colours
ADE_IDS = tuple(int(k) for k in np.round(np.linspace(0, 846, 64)))  # 0, 13, …, 255, …, 846
ADE_RANKS = tuple(ADE_IDS[29 * r % 64] for r in range(64))  # class ids, most frequent first
ADE_STUFF = 8  # the most frequent ones are walls, floors and the like
ADE_IGNORE = 65535
# by pixels, roughly as in VOC 2012
VOC_RANKS = (
    15,
    8,
    12,
    6,
    7,
    19,
    14,
    18,
    13,
    11,
    1,
    9,
    3,
    20,
    4,
    10,
    17,
    16,
    5,
    2,
)
VOC_SPRITES = {2: (things.bicycle, 1.2), 6: (things.bus, 3.2), 7: (things.car, 1.55), 14: (things.motorcycle, 1.25),
               15: (things.person, 1.8), 19: (things.train, 3.6)}  # class id: function, height in metres  # fmt: skip


def _silhouette(form: int, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """One of eight outlines within the unit circle (h,w bool)."""
    r2, angle = u * u + v * v, np.arctan2(v, u)
    outlines = (
        lambda: r2 < 0.85,
        lambda: np.maximum(np.abs(u), np.abs(v)) < 0.72,
        lambda: (v > -0.6) & (np.abs(u) < 0.6 * (0.95 - v)),
        lambda: (np.abs(u) + np.abs(v)) < 0.98,
        lambda: r2 < (0.68 + 0.3 * np.cos(5 * angle)) ** 2,
        lambda: (
            (np.minimum(np.abs(u), np.abs(v)) < 0.27) & (np.maximum(np.abs(u), np.abs(v)) < 0.9)
        ),
        lambda: (u / 0.98) ** 2 + (v / 0.5) ** 2 < 1,
        lambda: (r2 < 0.9) & ~((u - 0.35) ** 2 + v * v < 0.3),
    )
    return outlines[form % 8]()


def _texture(canvas: Canvas, form: int, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """One of eight patterns (h,w) about 1."""
    f = 2.5
    patterns = (
        lambda: 0.5 + 0 * (u + v),
        lambda: np.mod(u * f, 1) < 0.5,
        lambda: np.mod(v * f, 1) < 0.5,
        lambda: np.mod((u + v) * f * 0.7, 1) < 0.5,
        lambda: (np.mod(u * f * 0.8, 1) < 0.5) ^ (np.mod(v * f * 0.8, 1) < 0.5),
        lambda: (np.mod(u * f, 1) - 0.5) ** 2 + (np.mod(v * f, 1) - 0.5) ** 2 < 0.09,
        lambda: np.mod(np.hypot(u, v) * f, 1) < 0.5,
        lambda: canvas.grain(u * 6, v * 6),
    )
    return (0.72 + 0.56 * patterns[form % 8]()).astype(np.float32)


def _look(rank: int) -> tuple[int, int, np.ndarray]:
    """Silhouette, texture and colour of the class with this rank; the first two are unique below FORMS."""
    a, b = divmod(rank % FORMS, 8)
    return b, a + b, np.array(COLOURS[(3 * a + 5 * b + rank // FORMS) % len(COLOURS)])


def glyph(canvas: Canvas, rng: np.random.Generator, place: Place, rank: int) -> None:
    """The object of a class about `place`, whose scale is its radius."""
    form, pattern, colour = _look(rank)
    turn, squeeze = rng.uniform(-0.3, 0.3), rng.uniform(0.8, 1.1)
    colour = np.clip(colour + rng.uniform(-0.08, 0.08, 3), 0.05, 0.95)
    pen = canvas.pen(place, 1.3, 1.3, 1.3, 1.3)
    u = (pen.u * np.cos(turn) + pen.v * np.sin(turn)) / squeeze
    v = pen.v * np.cos(turn) - pen.u * np.sin(turn)
    u, v = u.astype(np.float32), v.astype(np.float32)
    mask = _silhouette(form, u, v)
    pen.fill(mask, colour, 0, _texture(canvas, pattern, u, v))


def zipf(quantile: float, first: int, last: int, power: float) -> int:
    """Rank in first…last−1 at a quantile of p(rank) ∝ (rank − first + 1)^−power."""
    mass = np.cumsum(np.arange(1.0, last - first + 1) ** -power)
    return first + int(np.searchsorted(mass / mass[-1], quantile))


def spread(seed: int, number: int, n: int) -> float:
    """The n-th of a low-discrepancy sequence in 0..1: rare classes come evenly spaced, not in lumps."""
    return (np.random.default_rng((seed, number, 7)).random() + n * 0.6180339887498949) % 1


def backdrop(canvas: Canvas, rng: np.random.Generator) -> None:
    """A blurred background between two colours."""
    near, far = (rng.uniform(0.2, 0.85, 3).astype(np.float32) for _ in range(2))
    shift, f = rng.uniform(0, 60), rng.uniform(1.5, 5)
    x, y = canvas.x, canvas.y
    mix = 0.65 * canvas.cloud(x * f + shift, y * f) + 0.35 * canvas.cloud(x * 9, y * 9 + shift)
    canvas.image[:] = near + (far - near) * mix[..., None]


def begin(
    seed: int, domain: str, kind: int, index: int, size: tuple[int, int]
) -> tuple[Canvas, list]:
    """Canvas and the generators of geometry, colour and noise; every third picture is upright."""
    look = DOMAINS[domain]
    generators = [np.random.default_rng((seed, look.number, index, kind, n)) for n in range(3)]
    return Canvas(size[::-1] if index % 3 == 2 else size, look, generators[1]), generators


def voc_scene(seed: int, domain: str, index: int, size: tuple[int, int]) -> Scene:
    """One to three objects before a background; label uint8 of VOC class ids, outlines 255."""
    canvas, (geometry, colour, noise) = begin(seed, domain, 1, index, size)
    backdrop(canvas, colour)
    classes = [0]
    for j in range(1 + int(geometry.integers(3))):
        k = VOC_RANKS[
            zipf(spread(seed, canvas.domain.number, 3 * index + j), 0, len(VOC_RANKS), 0.8)
        ]
        x, span = (
            geometry.uniform(0.2, 0.8) * canvas.aspect,
            geometry.uniform(0.4, 0.8) * min(canvas.aspect, 1),
        )
        if k in VOC_SPRITES:
            draw, metres = VOC_SPRITES[k]
            draw(canvas, geometry, Place(x, geometry.uniform(0.6, 0.95), span / metres))
        else:
            glyph(
                canvas,
                geometry,
                Place(x, geometry.uniform(0.3, 0.7), span / 2),
                VOC_RANKS.index(k) * 3,
            )
        classes += [k] * (canvas.count + 1 - len(classes))
    label = np.array(classes, np.uint8)[canvas.instance]
    return Scene(
        canvas.finish(noise, colour),
        _outlined(label, max(1, round(size[0] / 150))),
        canvas.instance,
    )


def _outlined(label: np.ndarray, width: int) -> np.ndarray:
    """Sets pixels within `width` (in x or y) of another class to 255, as VOC's annotation does."""
    edge = np.zeros(label.shape, bool)
    for step in range(1, width + 1):
        for a, b in ((np.s_[step:], np.s_[:-step]), (np.s_[:, step:], np.s_[:, :-step])):
            differs = label[a] != label[b]
            edge[a] |= differs
            edge[b] |= differs
    return np.where(edge, np.uint8(255), label)


def ade_scene(
    seed: int, domain: str, index: int, size: tuple[int, int], objects: int = 8
) -> Scene:
    """Walls and a floor with `objects` things; label uint16 of ADE20K-Full class ids, 65535 unlabelled."""
    canvas, (geometry, colour, noise) = begin(seed, domain, 2, index, size)
    number = canvas.domain.number
    first = zipf(spread(seed, number, index), 0, ADE_STUFF, 1.0)
    stuff = [
        first,
        *(
            (first + k) % ADE_STUFF
            for k in geometry.choice(np.arange(1, ADE_STUFF), 2, replace=False)
        ),
    ]
    floor, corner = geometry.uniform(0.55, 0.75), geometry.uniform(0.55, 0.85) * canvas.aspect
    for rank, (x0, y0) in zip(stuff, ((0, 0), (0, floor), (corner, 0)), strict=True):
        pen = Pen(canvas, Place(x0, y0, 0.12), 0, 1e3, 0, 1e3)
        tint = (
            np.array(COLOURS[(rank * 3 + 5) % 8]) * 0.5 + 0.3 + colour.uniform(-0.05, 0.05, 3)
        )
        pen.light = np.float32(1) + 0 * (pen.u + pen.v)
        canvas.count += 1
        pen.number = canvas.count
        pen.fill(np.ones(pen.light.shape, bool), tint, 0, _texture(canvas, rank, pen.u, pen.v))
    classes = [ADE_IGNORE, *(ADE_RANKS[rank] for rank in stuff)]
    for j in range(objects):
        rank = zipf(spread(seed, number, objects * index + j), ADE_STUFF, len(ADE_RANKS), 1.0)
        x, y = geometry.uniform(0.05, 0.95) * canvas.aspect, geometry.uniform(0.1, 0.9)
        glyph(
            canvas,
            geometry,
            Place(x, y, geometry.uniform(0.09, 0.2) * min(canvas.aspect, 1)),
            rank,
        )
        classes.append(ADE_RANKS[rank])
    for _ in range(Quota(seed, number, index)(0.7)):  # something nobody has named
        x, y = geometry.uniform(0, 1, 2)
        glyph(canvas, geometry, Place(x * canvas.aspect, y, 0.08), int(geometry.integers(64)))
        classes.append(ADE_IGNORE)
    return Scene(
        canvas.finish(noise, colour),
        np.array(classes, np.uint16)[canvas.instance],
        canvas.instance,
    )
