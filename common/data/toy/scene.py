"""Procedural street scenes with a long tail: what lies where.

A scene is a pure function of (seed, domain, index, size). A street canyon is seen through a pinhole camera: ground,
facades, walls and fences are planes in perspective with textures in metres, things stand on the ground and hide each
other from far to near. Labels are Cityscapes label ids.
"""

from dataclasses import dataclass

import numpy as np

from common.data.toy import objects as things
from common.data.toy.canvas import DOMAINS, RAW_IDS, Canvas, Domain, Place

FOCAL = 1.1  # of the camera, in image heights
# Objects expected in a scene; lanes from/to in metres beside the road's edge (negative: on the road), scale from/to.
_TRAFFIC = {
    things.car: (5.5, (-4.5, -1.0), (0.03, 0.13)),
    things.person: (5.0, (-1.0, 2.6), (0.05, 0.13)),
    things.pole: (4.5, (0.3, 0.8), (0.035, 0.12)),
    things.tree: (5.0, (1.2, 4.0), (0.03, 0.10)),
    things.traffic_sign: (2.0, (0.2, 1.0), (0.05, 0.12)),
    things.traffic_light: (1.05, (0.2, 0.8), (0.06, 0.12)),
    things.bin_: (0.5, (0.5, 2.5), (0.04, 0.10)),
    things.truck: (0.30, (-4.0, -1.5), (0.045, 0.085)),
    things.bus: (0.30, (-4.0, -1.5), (0.045, 0.085)),
    things.train: (0.26, (-4.5, -2.0), (0.04, 0.07)),
}
# Two-wheelers: expected number, share with a rider.
_CYCLES = {things.bicycle: (0.7, 0.45), things.motorcycle: (0.42, 0.65)}


@dataclass(frozen=True)
class Scene:
    image: np.ndarray  # uint8 (H,W,3)
    label: np.ndarray  # uint8 (H,W), Cityscapes label ids
    instance: np.ndarray  # uint16 (H,W), 0 = not a countable object


def _uniform(rng: np.random.Generator, span: tuple[float, float]) -> float:
    return float(rng.uniform(*span))


class Quota:
    """Counts with little variance: round(expected · scenes) objects over any run of consecutive scenes.

    The k-th question asked for scene i is answered with ⌊expected + frac(offset_k + i·√prime_k)⌋, so that a rare class
    occurs in small validation sets as often as in large ones.
    """

    PRIMES = (2, 3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37, 41, 43, 47, 53)

    def __init__(self, seed: int, domain: int, index: int):
        self.index, self.offsets, self.asked = (
            index,
            np.random.default_rng((seed, domain)).random(len(self.PRIMES)),
            0,
        )

    def __call__(self, expected: float) -> int:
        k, self.asked = self.asked, self.asked + 1
        return int(expected + (self.offsets[k] + self.index * self.PRIMES[k] ** 0.5) % 1)


@dataclass(frozen=True)
class Street:
    """The street's cross-section: metres from its middle, left negative; `eye` is the camera's height."""

    x: float  # vanishing point
    horizon: float
    eye: float
    edges: np.ndarray  # (6,) facade, strip, sidewalk | road | sidewalk, strip, facade
    strips: tuple[int, int]  # label ids left and right

    def scale(self, y: np.ndarray | float) -> np.ndarray | float:
        """Image heights per metre for ground seen at height y of the image."""
        return (y - self.horizon) / self.eye

    def place(self, across: float, scale: float) -> Place:
        """Foot point of an object `across` metres from the middle whose metre is `scale` image heights long."""
        return Place(
            self.x + across * scale, self.horizon + self.eye * scale, scale, FOCAL / scale
        )


def _street(canvas: Canvas, rng: np.random.Generator, terrain: float) -> Street:
    lean = rng.uniform(-1.5, 1.5)  # the camera keeps off the middle of the road
    road, walks, strips = (
        rng.uniform(4.3, 6.0),
        rng.uniform(1.8, 3.2, 2),
        rng.uniform(0.3, 2.5, 2),
    )
    grass = [n < terrain for n in rng.permutation(2)]
    strips += 1.5 * np.array(grass)
    kinds = tuple(
        RAW_IDS["terrain"] if g else RAW_IDS["parking"] if p < 0.12 else RAW_IDS["sidewalk"]
        for g, p in zip(grass, rng.random(2), strict=True)
    )
    left, right = -road - lean, road - lean
    edges = np.array([left - walks[0] - strips[0], left - walks[0], left, right, right + walks[1],
                      right + walks[1] + strips[1]], np.float32)  # fmt: skip
    return Street(
        canvas.aspect * rng.uniform(0.42, 0.58),
        rng.uniform(0.38, 0.46),
        rng.uniform(1.4, 1.7),
        edges,
        kinds,
    )


def _sky(canvas: Canvas, rng: np.random.Generator, street: Street) -> None:
    blue = (rng.uniform(-0.05, 0.05, 3) + (0.45, 0.62, 0.85)).astype(np.float32)
    white, cover = np.array((0.92, 0.93, 0.95), np.float32), rng.uniform(0.2, 0.9)
    at = canvas.window(0, 0, canvas.aspect, street.horizon + 0.01)
    x, y = canvas.x[:, at[1]], canvas.y[at[0]]
    f = canvas.domain.texture
    cloud = (
        1.26 * canvas.cloud(x * 3 * f, y * 8 * f)
        + 0.54 * canvas.cloud(x * 11 * f, y * 23 * f)
        - 1.3
        + cover
    )
    fade = np.clip(np.maximum(cloud, 0) + 0.5 * y / street.horizon, 0, 1)[..., None]
    canvas.image[at] = canvas.air(blue * (1 - fade) + white * fade, 25.0)
    canvas.label[at] = RAW_IDS["sky"]


def _skyline(canvas: Canvas, rng: np.random.Generator, street: Street) -> None:
    """Closes the street's far end with trees."""
    shift, high = rng.uniform(0, 60), rng.uniform(0.03, 0.08)
    at = canvas.window(
        street.x - 0.6, street.horizon - 0.14, street.x + 0.6, street.horizon + 0.02
    )
    x, y = canvas.x[:, at[1]], canvas.y[at[0]]
    top = street.horizon - high * (0.5 + canvas.cloud(x * 14 + shift, x * 0))
    leaf = 0.7 + 0.6 * canvas.domain.contrast * canvas.grain(x * 90, y * 90)
    green = np.array((0.24, 0.33, 0.18), np.float32)
    canvas.paint(
        at,
        (y > top) & (x > -1),
        canvas.air(green * leaf[..., None], 60.0),
        RAW_IDS["vegetation"],
    )


def _ground(canvas: Canvas, rng: np.random.Generator, street: Street) -> None:
    """Road with markings, sidewalks with slabs and a kerb, a strip of grass, parking or pavement before the houses."""
    walk = RAW_IDS["sidewalk"]
    labels = np.array(
        [street.strips[0], walk, RAW_IDS["road"], walk, street.strips[1]], np.uint8
    )
    tone = rng.uniform(0.30, 0.42) + rng.uniform(-0.02, 0.02, 3)
    looks = {  # colour, grain's strength, slabs' strength
        RAW_IDS["road"]: (tone, 0.18, 0.0),
        RAW_IDS["sidewalk"]: (tone + rng.uniform(0.02, 0.16) + (0.02, 0.01, 0.0), 0.14, 0.35),
        RAW_IDS["parking"]: (tone * 0.95 + (0.03, 0.0, 0.0), 0.2, 0.15),
        RAW_IDS["terrain"]: (
            np.array((0.33, 0.42, 0.17)) + rng.uniform(-0.04, 0.04, 3),
            0.5,
            0.0,
        ),
    }
    colours, grains, slabs = (
        np.array([looks[i][n] for i in labels], np.float32) for n in range(3)
    )
    at = canvas.window(0, street.horizon + 0.004, canvas.aspect, 1)
    y = canvas.y[at[0]]
    scale = street.scale(y)
    across, along, near = (
        (canvas.x - street.x) / scale,
        FOCAL / scale,
        np.clip(scale / 0.06, 0, 1),
    )
    zone = np.searchsorted(street.edges[1:-1], across)
    f = canvas.domain.texture
    texture = (
        1
        + (canvas.grain(across * 9 * f, along * 5 * f) - 0.5)
        * grains[zone]
        * canvas.domain.contrast
        * 2
    )
    joint = (np.mod(across, 0.9) < 0.12) | (np.mod(along, 1.2) < 0.2)
    texture -= joint * slabs[zone] * near
    colour = colours[zone] * texture[..., None]
    kerb = (np.abs(across - street.edges[2] + 0.12) < 0.12) | (
        np.abs(across - street.edges[3] - 0.12) < 0.12
    )
    colour[kerb] = 0.62
    colour[_markings(rng, street, across, along)] = 0.82
    canvas.image[at] = canvas.air(colour, along[..., None])
    canvas.label[at] = labels[zone]


def _markings(
    rng: np.random.Generator, street: Street, across: np.ndarray, along: np.ndarray
) -> np.ndarray:
    """Dashes in the middle, edge lines and now and then a zebra crossing: they are road (H,W bool)."""
    left, right = street.edges[2], street.edges[3]
    period, shift, far = rng.uniform(5, 9), rng.uniform(0, 9), rng.uniform(6, 16)
    lines, zebra = rng.random(2)
    marks = (np.abs(across - (left + right) / 2) < 0.09) & (
        np.mod(along + shift, period) < 0.5 * period
    )
    if lines < 0.5:
        marks |= (np.abs(across - left - 0.4) < 0.07) | (np.abs(across - right + 0.4) < 0.07)
    if zebra < 0.3:
        road = (across > left + 0.2) & (across < right - 0.2)
        marks |= road & (along > far) & (along < far + 3) & (np.mod(across, 1.0) < 0.5)
    return marks


def _facade(canvas: Canvas, rng: np.random.Generator, street: Street, side: int) -> None:
    """A row of houses with windows along one side, gaps between them show what lies behind."""
    reach = abs(street.edges[0 if side < 0 else -1])
    n = 12
    ends = np.cumsum(rng.uniform(7, 20, n)) + rng.uniform(-4, 4)
    gaps = rng.random(n) < 0.12
    tall, pitch, storey_height, glow = (
        rng.uniform(low, high, n).astype(np.float32)
        for low, high in ((7, 22), (1.8, 3.4), (2.7, 3.4), (0.15, 0.4))
    )
    grey = (
        rng.uniform(0.32, 0.72, (n, 1))
        + rng.uniform(-0.10, 0.10, (n, 3))
        + np.array((0.05, 0.01, -0.04))
    )
    edge = street.x + side * 0.01 * reach
    at = canvas.window(*((0, 0, edge, 0.75) if side < 0 else (edge, 0, canvas.aspect, 0.75)))
    x, y = canvas.x[:, at[1]], canvas.y[at[0]]
    scale = np.maximum(side * (x - street.x), 1e-3) / reach
    along = FOCAL / scale
    house = np.minimum(np.searchsorted(ends, along[0]), n - 1)
    up = (street.horizon - y) / scale + street.eye
    wall = (up > 0) & (up < np.where(gaps[house] | (scale[0] < 0.012), 0, tall[house]))
    near, f = np.clip(scale / 0.05, 0, 1), canvas.domain.texture
    column, storey = along / pitch[house], up / storey_height[house]
    phase, level = np.mod(column, 1), np.mod(storey, 1)
    window = ((phase > 0.3) & (phase < 0.75)) & ((level > 0.3) & (level < 0.8))
    plaster = 0.22 * canvas.domain.contrast * (canvas.grain(along * 3 * f, up * 3 * f) - 0.5)
    texture = 1 + 0.12 * side * canvas.sun + plaster
    texture -= 0.25 * ((level < 0.06) * near)  # ledges
    bright = canvas.grain(column, storey + house.astype(np.float32))
    glass = np.where(bright < canvas.domain.lit, 0.95, glow[house] + 0.12 * bright)
    pane = window * near  # distant windows blur into the plaster
    colour = (
        grey[house].astype(np.float32) * (texture * (1 - pane))[..., None]
        + (glass * pane)[..., None]
    )
    canvas.paint(at, wall, canvas.air(colour, along[..., None]), RAW_IDS["building"])


def _barrier(canvas: Canvas, rng: np.random.Generator, street: Street, kind: str) -> None:
    """A brick wall or a railing along one side between two distances."""
    side, start, length = int(rng.integers(2)), rng.uniform(7, 13), rng.uniform(6, 16)
    reach = abs(street.edges[1 if side == 0 else 4]) + rng.uniform(-0.3, 0.3)
    high = rng.uniform(1.7, 2.6) if kind == "wall" else rng.uniform(1.1, 1.7)
    brick = rng.uniform(0.35, 0.6) + rng.uniform(-0.04, 0.04, 3) + np.array((0.06, 0.0, -0.03))
    sign = 2 * side - 1
    ends = [street.x + sign * reach * FOCAL / d for d in (start, start + length)]
    at = canvas.window(min(ends), street.horizon - 0.3, max(ends), street.horizon + 0.35)
    x, y = canvas.x[:, at[1]], canvas.y[at[0]]
    scale = np.maximum(sign * (x - street.x), 1e-3) / reach
    along = FOCAL / scale
    up = (street.horizon - y) / scale + street.eye
    mask = (up > 0) & (up < high) & (along > start) & (along < start + length)
    f = canvas.domain.texture
    if kind == "wall":
        row = np.floor(up / 0.35)
        mortar = (np.mod(up, 0.35) < 0.08) | (
            np.mod(along / 0.8 + 0.5 * np.mod(row, 2), 1) < 0.1
        )
        texture = 1 + canvas.domain.contrast * (
            0.35 * (canvas.grain(along / 0.8, row) - 0.5) - 0.4 * mortar
        )
        colour = brick.astype(np.float32) * texture[..., None]
        canvas.paint(at, mask, canvas.air(colour, along[..., None]), RAW_IDS["wall"])
        return
    bars = (
        (np.mod(along * 2.2 * f, 1) < 0.45)
        | (np.abs(up - high + 0.08) < 0.09)
        | (np.abs(up - 0.35) < 0.07)
    )
    canvas.label[at][mask] = RAW_IDS[
        "fence"
    ]  # the annotation covers the gaps, the image shows what is behind
    canvas.image[at][mask] *= 0.8
    steel = np.float32(brick.mean() - 0.12) * np.ones(3, np.float32)
    canvas.paint(at, mask & bars, canvas.air(steel, along[..., None]), None)


def _hood(canvas: Canvas, rng: np.random.Generator) -> None:
    """The bonnet of the camera's own car: label id 1, void."""
    high, tone = rng.uniform(0.02, 0.05), rng.uniform(0.08, 0.25)
    at = canvas.window(0, 0.9, canvas.aspect, 1)
    x, y = canvas.x, canvas.y[at[0]]
    arch = y > 1 - high * (1 - (2 * x / canvas.aspect - 1) ** 2)
    colour = np.repeat((tone + 2 * (y - 0.93))[..., None], 3, axis=-1)
    canvas.paint(at, arch, colour, RAW_IDS["ego vehicle"])


def _queue(rng: np.random.Generator, street: Street, quota: Quota) -> list:
    """(scale, function, place, keywords) of every thing, from far to near."""
    queue = []

    def side_place(lane: tuple[float, float], scale: float) -> Place:
        side = 1 if rng.random() < 0.5 else -1
        edge = street.edges[3] if side > 0 else -street.edges[2]
        return street.place(side * (edge + _uniform(rng, lane)), scale)

    for draw, (expected, lane, span) in _TRAFFIC.items():
        for _ in range(quota(expected)):
            scale = float(np.exp(_uniform(rng, tuple(np.log(span)))))
            queue.append((scale, draw, side_place(lane, scale), {}))
    for draw, (expected, ridden) in _CYCLES.items():
        for _ in range(quota(expected)):
            scale, rides = _uniform(rng, (0.085, 0.15)), rng.random() < ridden
            lane = (-2.0, -0.6) if rides else (0.2, 1.6)
            queue.append((scale, draw, side_place(lane, scale), {"ridden": bool(rides)}))
    return sorted(queue, key=lambda item: item[0])


def street_scene(seed: int, domain: str, index: int, size: tuple[int, int]) -> Scene:
    """The `index`-th street scene of a domain at `size` (height, width).

    The geometry does not depend on the height, only on the aspect: the label at another resolution is the same scene
    sampled at other pixel centres. The sensor noise is drawn per pixel.
    """
    look: Domain = DOMAINS[domain]
    geometry, colour, noise = (
        np.random.default_rng((seed, look.number, index, n)) for n in range(3)
    )
    quota, canvas = Quota(seed, look.number, index), Canvas(size, look, colour)
    street = _street(canvas, geometry, quota(0.6))
    _sky(canvas, colour, street)
    _skyline(canvas, geometry, street)
    _ground(canvas, colour, street)
    for side in (-1, 1):
        _facade(canvas, geometry, street, side)
    for kind, expected in (("wall", 0.45), ("fence", 0.6)):
        for _ in range(quota(expected)):
            _barrier(canvas, geometry, street, kind)
    for _, draw, place, keywords in _queue(geometry, street, quota):
        draw(canvas, geometry, place, **keywords)
    _hood(canvas, geometry)
    return Scene(canvas.finish(noise, colour), canvas.label, canvas.instance)
