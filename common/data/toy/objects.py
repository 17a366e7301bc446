"""The countable things of the procedural street scenes, built from a pen's boxes, ellipses and lines.

Measures are in metres. Vehicles share a range of paints, people and riders a range of clothes, two-wheelers and street
furniture are dark or grey: colour alone does not tell these classes apart.
"""

import numpy as np

from common.data.toy.canvas import RAW_IDS, Canvas, Pen, Place

PAINTS = ((0.62, 0.62, 0.64), (0.85, 0.85, 0.85), (0.16, 0.17, 0.19), (0.60, 0.13, 0.12), (0.14, 0.25, 0.52),
          (0.72, 0.62, 0.22), (0.17, 0.38, 0.28))  # fmt: skip
CLOTHES = ((0.18, 0.20, 0.30), (0.62, 0.20, 0.20), (0.75, 0.73, 0.68), (0.25, 0.38, 0.30), (0.70, 0.55, 0.25),
           (0.33, 0.30, 0.30), (0.25, 0.35, 0.60))  # fmt: skip
# of all riders and some people
JACKETS = (
    *CLOTHES[3:5],
    (0.84, 0.82, 0.18),
    (0.90, 0.48, 0.12),
    (0.72, 0.84, 0.20),
)
SKIN = ((0.78, 0.58, 0.47), (0.50, 0.35, 0.26), (0.88, 0.70, 0.58))
GLASS, RUBBER, METAL = (0.17, 0.22, 0.27), (0.07, 0.07, 0.08), (0.45, 0.46, 0.47)


def pick(rng: np.random.Generator, colours, spread: float = 0.06) -> np.ndarray:
    """One of the colours, jittered."""
    colour = np.array(colours[rng.integers(len(colours))]) + rng.uniform(-spread, spread, 3)
    return np.maximum(colour, 0.02)


def _shadow(pen: Pen, width: float) -> None:
    """Darkens the ground beneath; the label stays."""
    view = pen.canvas.image[pen.at]
    np.multiply(
        view, np.float32(0.55), out=view, where=pen.ellipse(0, 0, width, 0.16)[..., None]
    )


def _wheels(pen: Pen, centres, radius: float, label: int) -> None:
    for centre in centres:
        pen.fill(pen.ellipse(centre, radius, radius, radius), RUBBER, label)
        pen.fill(pen.ellipse(centre, radius, radius * 0.5, radius * 0.5), METAL)


def car(canvas: Canvas, rng: np.random.Generator, place: Place) -> None:
    """From behind or ahead (half of them), else from the side."""
    label, paint, side = RAW_IDS["car"], pick(rng, PAINTS), rng.random() < 0.5
    lamp = (0.75, 0.10, 0.08) if rng.random() < 0.6 else (0.95, 0.93, 0.80)
    if side:
        pen = canvas.pen(place, 2.3, 2.3, 1.55, 0.2)
        _shadow(pen, 2.3)
        pen.fill(pen.box(-2.1, 2.1, 0.25, 0.85) | pen.ellipse(0, 0.8, 2.2, 0.22), paint, label)
        roof = (pen.v < 1.45) & (pen.v > 0.8) & (np.abs(pen.u) < 1.35 - 0.7 * (pen.v - 0.8))
        pen.fill(roof, paint, label)
        pen.fill(
            roof
            & (pen.v > 0.9)
            & (pen.v < 1.32)
            & (np.abs(pen.u) > 0.06)
            & (np.abs(pen.u) < 0.95),
            GLASS,
        )
        _wheels(pen, (-1.3, 1.3), 0.34, label)
        return
    pen = canvas.pen(place, 1.1, 1.1, 1.6, 0.2)
    _shadow(pen, 1.1)
    pen.fill(pen.box(-0.8, -0.5, 0, 0.4) | pen.box(0.5, 0.8, 0, 0.4), RUBBER, label)
    pen.fill(pen.box(-0.9, 0.9, 0.22, 0.92), paint, label)
    cabin = (pen.v < 1.5) & (pen.v > 0.9) & (np.abs(pen.u) < 0.85 - 0.35 * (pen.v - 0.9))
    pen.fill(cabin, paint * 0.9, label)
    pen.fill(cabin & (pen.v > 0.97) & (pen.v < 1.38) & (np.abs(pen.u) < 0.66), GLASS)
    pen.fill(pen.box(-0.86, -0.6, 0.6, 0.8) | pen.box(0.6, 0.86, 0.6, 0.8), lamp)
    pen.fill(pen.box(-0.26, 0.26, 0.4, 0.53), (0.85, 0.85, 0.82))


def truck(canvas: Canvas, rng: np.random.Generator, place: Place) -> None:
    """A ribbed box without windows; from the side with a cab."""
    label, paint, cab = RAW_IDS["truck"], pick(rng, PAINTS), pick(rng, PAINTS)
    half = 1.25 if rng.random() < 0.5 else 2.6
    front = 1.5 if half > 2 else 0.0
    pen = canvas.pen(place, half, half + front + 0.1, 3.4, 0.2)
    _shadow(pen, half)
    pen.fill(pen.box(-half, half, 0.45, 0.95), (0.2, 0.2, 0.21), label)
    ribs = 1 - 0.22 * (np.mod(pen.u * 1.6 * canvas.domain.texture, 1) < 0.3).astype(np.float32)
    pen.fill(pen.box(-half, half, 0.85, 3.2), paint, label, ribs)
    pen.fill(pen.box(-half, half, 3.05, 3.2) | pen.box(-half, half, 0.85, 1.0), paint * 0.6)
    if front:
        pen.fill(pen.box(half, half + front, 0.4, 2.5), cab, label)
        pen.fill(pen.box(half + 0.5, half + front, 1.5, 2.3), GLASS)
        _wheels(pen, (-1.9, -1.0, half + 0.8), 0.48, label)
    else:
        pen.fill(pen.box(-1.1, -0.6, 0, 0.5) | pen.box(0.6, 1.1, 0, 0.5), RUBBER, label)
        pen.fill(
            pen.box(-1.2, 1.2, 0.62, 0.85),
            (0.8, 0.2, 0.1),
            label,
            1 + 2 * (np.mod(pen.u * 2, 1) < 0.5),
        )


def bus(canvas: Canvas, rng: np.random.Generator, place: Place) -> None:
    """One dark band of windows under a destination board; from the front or the side."""
    label, paint = RAW_IDS["bus"], pick(rng, PAINTS[1:6:2])
    half = 1.3 if rng.random() < 0.5 else 3.6
    pen = canvas.pen(place, half + 0.1, half + 0.1, 3.2, 0.2)
    _shadow(pen, half)
    pen.fill(pen.box(-half, half, 0.3, 3.05), paint, label)
    post = 1 + 1.5 * (np.mod(pen.u * 0.7, 1) < 0.12)
    pen.fill(pen.box(-half + 0.1, half - 0.1, 1.25, 2.5), GLASS, None, post)
    if half < 2:
        pen.fill(pen.box(-0.8, 0.8, 2.6, 2.9), (0.95, 0.7, 0.15))
        pen.fill(
            pen.box(-1.15, -0.8, 0.5, 0.75) | pen.box(0.8, 1.15, 0.5, 0.75), (0.95, 0.93, 0.8)
        )
        pen.fill(pen.box(-1.1, -0.7, 0, 0.32) | pen.box(0.7, 1.1, 0, 0.32), RUBBER, label)
    else:
        pen.fill(pen.box(-0.5, 0.6, 0.4, 2.4), paint * 0.7)
        _wheels(pen, (-2.4, 2.3), 0.5, label)


def train(canvas: Canvas, rng: np.random.Generator, place: Place) -> None:
    """A tram: separate windows over a stripe, a skirt to the ground, a pantograph."""
    label, paint, stripe = RAW_IDS["train"], pick(rng, PAINTS[5:]), pick(rng, PAINTS[1:2])
    half = 1.3 if rng.random() < 0.4 else 3.2
    pen = canvas.pen(place, half, half, 4.6, 0.15)
    body = pen.box(-half, half, 0.1, 3.0) | pen.ellipse(0, 3.0, half, 0.55)
    pen.fill(
        pen.line(-0.4, 3.4, 0.3, 4.4, 0.07) | pen.box(-0.7, 0.8, 4.38, 4.5),
        (0.2, 0.2, 0.2),
        label,
    )
    pen.fill(body, paint, label)
    pen.fill(body & (pen.v < 0.5), (0.22, 0.22, 0.24))
    pen.fill(body & (pen.v > 0.95) & (pen.v < 1.35), stripe)
    if half < 2:
        pen.fill(pen.ellipse(0, 2.2, 1.0, 0.75), GLASS)
        pen.fill(pen.ellipse(0, 0.75, 0.2, 0.2), (0.97, 0.95, 0.85))
    else:
        pen.fill(
            body & (pen.v > 1.6) & (pen.v < 2.6) & (np.mod(pen.u + 0.3, 1.1) < 0.65), GLASS
        )


def person(canvas: Canvas, rng: np.random.Generator, place: Place) -> None:
    # so a jacket alone does not make a rider
    top = pick(rng, JACKETS if rng.random() < 0.25 else CLOTHES)
    legs, skin = pick(rng, CLOTHES) * 0.7, pick(rng, SKIN)
    label, tall, stride = RAW_IDS["person"], rng.uniform(1.55, 1.9), rng.uniform(0.05, 0.22)
    pen = canvas.pen(place, 0.5, 0.5, tall, 0.15)
    _shadow(pen, 0.45)
    hip, neck = 0.50 * tall, 0.84 * tall
    pen.fill(
        pen.line(-stride, 0.05, -0.04, hip, 0.10) | pen.line(stride, 0.05, 0.04, hip, 0.10),
        legs,
        label,
    )
    arms = pen.line(-0.26, hip, -0.18, neck - 0.1, 0.08) | pen.line(
        0.26, hip, 0.18, neck - 0.1, 0.08
    )
    pen.fill(arms, top * 0.85, label)
    pen.fill(pen.ellipse(0, (hip + neck) / 2, 0.25, 0.57 * (neck - hip)), top, label)
    pen.fill(pen.ellipse(0, 0.93 * tall, 0.13, 0.08 * tall), skin, label)
    pen.fill(pen.ellipse(0, 0.97 * tall, 0.13, 0.045 * tall), (0.15, 0.11, 0.08))


def _rider(pen: Pen, rng: np.random.Generator, seat: float) -> None:
    """Leans forward (to the right) on a two-wheeler, knees bent, with a helmet."""
    label, top, legs = RAW_IDS["rider"], pick(rng, JACKETS), pick(rng, CLOTHES) * 0.7
    helmet = pick(rng, ((0.92, 0.90, 0.85), (0.85, 0.80, 0.25)))
    pen.fill(
        pen.line(-0.2, seat, 0.22, seat - 0.12, 0.13)
        | pen.line(0.22, seat - 0.12, 0.05, 0.3, 0.10),
        legs,
        label,
    )
    pen.fill(pen.line(-0.18, seat + 0.08, 0.12, seat + 0.55, 0.25), top, label)
    pen.fill(pen.line(0.14, seat + 0.5, 0.5, seat + 0.2, 0.08), top * 0.85, label)
    pen.fill(pen.ellipse(0.24, seat + 0.84, 0.15, 0.17), pick(rng, SKIN), label)
    pen.fill(pen.ellipse(0.22, seat + 0.92, 0.18, 0.13), helmet, label)


def bicycle(
    canvas: Canvas, rng: np.random.Generator, place: Place, ridden: bool = False
) -> None:
    """Thin wheels that one sees through, but that the annotation covers, and a thin frame."""
    label, paint = RAW_IDS["bicycle"], pick(rng, PAINTS)
    pen = canvas.pen(place, 1.05, 1.05, 1.95 if ridden else 1.2, 0.15)
    _shadow(pen, 1.0)
    wheels = [pen.ellipse(c, 0.36, 0.38, 0.38) for c in (-0.58, 0.58)]
    pen.mark(wheels[0] | wheels[1], label)
    for wheel, centre in zip(wheels, (-0.58, 0.58), strict=True):
        pen.fill(wheel & ~pen.ellipse(centre, 0.36, 0.24, 0.24), RUBBER)
    joints = ((-0.58, 0.36), (-0.2, 0.85), (0.45, 0.85), (0.0, 0.36), (-0.2, 0.85))
    frame = pen.line(0.45, 0.95, 0.58, 0.36, 0.06)
    for (u0, v0), (u1, v1) in zip(joints, joints[1:], strict=False):
        frame |= pen.line(u0, v0, u1, v1, 0.06)
    pen.fill(frame, paint, label)
    pen.fill(
        pen.box(-0.36, -0.06, 0.88, 0.99) | pen.line(0.32, 1.02, 0.52, 1.0, 0.06), RUBBER, label
    )
    if ridden:
        canvas.count += 1
        pen.number = canvas.count
        _rider(pen, rng, 0.95)


def motorcycle(
    canvas: Canvas, rng: np.random.Generator, place: Place, ridden: bool = False
) -> None:
    """Fat solid wheels, a body with a tank, a lamp and an exhaust."""
    label, paint = RAW_IDS["motorcycle"], pick(rng, ((0.66, 0.10, 0.10), (0.80, 0.36, 0.10)))
    pen = canvas.pen(place, 1.2, 1.2, 1.85 if ridden else 1.25, 0.15)
    _shadow(pen, 1.1)
    _wheels(pen, (-0.7, 0.72), 0.36, label)
    pen.fill(
        pen.line(-0.75, 0.72, 0.1, 0.62, 0.16) | pen.box(-0.35, 0.4, 0.22, 0.62),
        (0.16, 0.16, 0.17),
        label,
    )
    pen.fill(
        pen.ellipse(0.2, 0.7, 0.5, 0.28) | pen.line(-0.9, 0.75, -0.5, 0.7, 0.11), paint, label
    )
    pen.fill(
        pen.line(0.42, 1.0, 0.72, 0.36, 0.08) | pen.line(0.3, 1.05, 0.5, 1.02, 0.07),
        METAL,
        label,
    )
    pen.fill(pen.line(-0.9, 0.28, -0.1, 0.3, 0.10), (0.75, 0.75, 0.77), label)
    pen.fill(pen.ellipse(0.62, 0.9, 0.12, 0.12), (0.97, 0.93, 0.7), label)
    if ridden:
        canvas.count += 1
        pen.number = canvas.count
        _rider(pen, rng, 0.85)


def _stick(pen: Pen, height: float) -> None:
    """A pole at least 1/90 of the image height wide, so that it does not vanish in small images."""
    half = max(0.09, 0.0055 / pen.place.scale)
    pen.fill(pen.box(-half, half, 0, height), METAL, RAW_IDS["pole"])


def pole(canvas: Canvas, rng: np.random.Generator, place: Place) -> None:
    """A lamp post with an arm."""
    height, arm = (
        rng.uniform(5.5, 7.5),
        (1 if rng.random() < 0.5 else -1) * rng.uniform(0.8, 1.4),
    )
    pen = canvas.pen(place, 1.5, 1.5, height + 0.2)
    _stick(pen, height)
    thick = max(0.09, 0.005 / place.scale)
    pen.fill(pen.line(0, height - 0.1, arm, height - 0.05, thick), METAL, RAW_IDS["pole"])


def traffic_light(canvas: Canvas, rng: np.random.Generator, place: Place) -> None:
    """A dark box with three lamps, one of them on."""
    pen, on = canvas.pen(place, 0.5, 0.5, 4.2), int(rng.integers(3))
    _stick(pen, 3.0)
    label = RAW_IDS["traffic light"]
    pen.fill(pen.box(-0.33, 0.33, 2.65, 4.1), (0.12, 0.13, 0.12), label)
    for i, colour in enumerate(((0.98, 0.16, 0.10), (1.0, 0.75, 0.1), (0.15, 0.95, 0.45))):
        bright = 1.0 if i == on else 0.22
        pen.fill(pen.ellipse(0, 3.85 - 0.47 * i, 0.2, 0.2), np.array(colour) * bright)


def traffic_sign(canvas: Canvas, rng: np.random.Generator, place: Place) -> None:
    """A disc, triangle or board with a coloured rim, white (or blue) within, and a symbol."""
    kind, blue = int(rng.integers(3)), rng.random() < 0.35
    pen, label, v = canvas.pen(place, 0.7, 0.7, 3.4), RAW_IDS["traffic sign"], 2.75
    _stick(pen, 2.5)
    rim, inner = (
        ((0.9, 0.9, 0.9), (0.12, 0.28, 0.62))
        if blue
        else ((0.75, 0.12, 0.12), (0.9, 0.9, 0.88))
    )

    def plate(r: float) -> np.ndarray:
        if kind == 0:
            return pen.ellipse(0, v, r, r)
        if kind == 1:
            return (pen.v > v - 0.8 * r) & (np.abs(pen.u) < 0.62 * (v + r - pen.v))
        return pen.box(-0.95 * r, 0.95 * r, v - 0.8 * r, v + 0.8 * r)

    pen.fill(plate(0.58), rim, label)
    pen.fill(plate(0.42), inner)
    pen.fill(pen.line(-0.12, v - 0.2, 0.12, v + 0.12, 0.07), rim if blue else (0.1, 0.1, 0.1))


def tree(canvas: Canvas, rng: np.random.Generator, place: Place) -> None:
    """A trunk (vegetation too, as in Cityscapes) under a ragged crown with dark gaps."""
    height, radius, green = (
        rng.uniform(4.5, 8),
        rng.uniform(1.4, 2.6),
        rng.uniform(-0.06, 0.06, 3),
    )
    label, shift, f = RAW_IDS["vegetation"], rng.uniform(0, 60), 2.2 * canvas.domain.texture
    trunk = canvas.pen(place, 0.2, 0.2, height)
    trunk.fill(trunk.box(-0.16, 0.16, 0, height - radius), (0.27, 0.21, 0.16), label)
    pen = Pen(canvas, place, 1.1 * radius, 1.1 * radius, height + 0.1, 2.3 * radius - height)
    rough = canvas.cloud(pen.u * f + shift, pen.v * f)
    centre = height - 1.15 * radius
    crown = (pen.u / radius) ** 2 + (
        (pen.v - centre) / (1.15 * radius)
    ) ** 2 < 0.55 + 0.6 * rough
    leaves = canvas.grain(pen.u * 2.5 * f, pen.v * 2.5 * f + shift)
    depth = 1 + canvas.domain.contrast * (0.75 * (rough - 0.5) + 0.55 * (leaves - 0.5))
    pen.fill(crown, np.array((0.25, 0.36, 0.16)) + green, label, depth)


def bin_(canvas: Canvas, rng: np.random.Generator, place: Place) -> None:
    """A waste bin or cabinet: an object outside the 19 classes (label id 4, static)."""
    half, high, paint = rng.uniform(0.25, 0.5), rng.uniform(0.7, 1.3), pick(rng, PAINTS)
    pen = canvas.pen(place, half, half, high + 0.1, 0.1)
    pen.fill(pen.box(-half, half, 0, high), paint * 0.8, RAW_IDS["static"])
    pen.fill(pen.box(-half, half, high - 0.12, high), paint * 0.5)
