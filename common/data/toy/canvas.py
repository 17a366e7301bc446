"""What the procedural scenes are drawn with: a canvas in relative coordinates, an object's pen, the domains' looks.

Lengths are fractions of the image height (y runs down from 0 to 1, x from 0 to width/height), so that a scene is one
set of numbers at any resolution. Colours are RGB in 0..1 until `Canvas.finish` renders them in a domain's look.
"""

from dataclasses import dataclass

import numpy as np

RAW_IDS = {  # Cityscapes label ids (cityscapesScripts, labels.py)
    "ego vehicle": 1, "static": 4, "parking": 9, "road": 7, "sidewalk": 8, "building": 11, "wall": 12, "fence": 13,
    "pole": 17, "traffic light": 19, "traffic sign": 20, "vegetation": 21, "terrain": 22, "sky": 23, "person": 24,
    "rider": 25, "car": 26, "truck": 27, "bus": 28, "train": 31, "motorcycle": 32, "bicycle": 33,
}  # fmt: skip
_TABLE = 64  # side of the periodic noise table, a power of two


@dataclass(frozen=True)
class Domain:
    """How a camera or a renderer shows a scene; the geometry's distribution is the same in every domain."""

    number: int  # enters the seed: domains show different scenes
    hue: float = 0.0  # rotation about the grey axis in degrees
    saturation: float = 1.0
    tint: tuple[float, float, float] = (1.0, 1.0, 1.0)
    gamma: float = 1.0
    noise: float = 0.03  # standard deviation of the sensor noise, white = 1
    jitter: float = 0.12  # spread of exposure and white balance from image to image
    haze: float = 0.003  # extinction per metre
    haze_colour: tuple[float, float, float] = (0.80, 0.83, 0.86)
    texture: float = 1.0  # spatial frequency of the surfaces
    contrast: float = 1.0  # strength of the surfaces' texture
    lit: float = 0.0  # share of windows with the light on

    def matrix(self) -> np.ndarray:
        """(3,3) matrix that turns the hue, scales the saturation and applies the tint."""
        angle = np.deg2rad(self.hue)
        grey = np.full((3, 3), 1 / 3)
        cross = np.array([[0, -1, 1], [1, 0, -1], [-1, 1, 0]]) / np.sqrt(3)
        turn = np.cos(angle) * np.eye(3) + (1 - np.cos(angle)) * grey + np.sin(angle) * cross
        mix = self.saturation * np.eye(3) + (1 - self.saturation) * grey
        return (np.diag(self.tint) @ mix @ turn).astype(np.float32)


DOMAINS = {
    "day": Domain(0),
    "dusk": Domain(1, saturation=0.8, tint=(0.78, 0.60, 0.66), gamma=1.1, noise=0.05, haze=0.006,
                  haze_colour=(0.75, 0.5, 0.42), lit=0.5),
    "fog": Domain(2, saturation=0.7, tint=(0.95, 0.96, 0.98), haze=0.045, noise=0.035),
    "render": Domain(3, hue=55.0, saturation=1.55, tint=(0.88, 0.95, 1.12), gamma=0.8, noise=0.0, jitter=0.03,
                     haze=0.0, texture=2.2, contrast=0.45),
}  # fmt: skip


class Canvas:
    """Image, Cityscapes label ids and instance numbers of one scene under construction.

    image float32 (H,W,3); label uint8 (H,W); instance uint16 (H,W), 0 where no countable object lies.
    `haze` is the extinction per metre; things are painted at a distance and fade with it.
    """

    def __init__(self, size: tuple[int, int], domain: Domain, rng: np.random.Generator):
        height, width = size
        self.domain, self.aspect = domain, width / height
        self.image = np.zeros((height, width, 3), np.float32)
        self.label = np.zeros((height, width), np.uint8)
        self.instance = np.zeros((height, width), np.uint16)
        self.y = ((np.arange(height, dtype=np.float32) + 0.5) / height)[:, None]
        self.x = ((np.arange(width, dtype=np.float32) + 0.5) / height)[None]
        self.table = rng.random((_TABLE, _TABLE), dtype=np.float32)
        self.sun = rng.uniform(-1, 1)  # light from the left (-1) … right (+1)
        self.count = 0
        self._haze = np.array(domain.haze_colour, np.float32)

    def window(self, x0: float, y0: float, x1: float, y1: float) -> tuple[slice, slice]:
        """Rows and columns whose centres may lie in [x0,x1] × [y0,y1], clipped to the canvas (perhaps empty)."""
        height, width = self.label.shape
        top, bottom = (min(max(int(y * height), 0), height) for y in (y0, y1 + 1 / height))
        left, right = (min(max(int(x * height), 0), width) for x in (x0, x1 + 1 / height))
        return slice(top, bottom), slice(left, right)

    def grain(self, u: np.ndarray, v: np.ndarray) -> np.ndarray:
        """Blocky noise in 0..1, one value per unit cell of (u, v)."""
        return self.table[
            np.floor(v).astype(np.int32) & (_TABLE - 1),
            np.floor(u).astype(np.int32) & (_TABLE - 1),
        ]

    def cloud(self, u: np.ndarray, v: np.ndarray) -> np.ndarray:
        """Smooth (bilinear) noise in 0..1 with unit cells."""
        i, j = np.floor(v), np.floor(u)
        fv, fu = v - i, u - j
        i, j = i.astype(np.int32) & (_TABLE - 1), j.astype(np.int32) & (_TABLE - 1)
        below, right = (i + 1) & (_TABLE - 1), (j + 1) & (_TABLE - 1)
        top = self.table[i, j] * (1 - fu) + self.table[i, right] * fu
        return (
            top * (1 - fv)
            + (self.table[below, j] * (1 - fu) + self.table[below, right] * fu) * fv
        )

    def air(self, colour: np.ndarray, metres: np.ndarray | float) -> np.ndarray:
        """`colour` (…,3) as seen through `metres` of haze (scalar or (…,1))."""
        if not self.domain.haze:
            return colour
        clear = np.exp(np.float32(-self.domain.haze) * metres)
        return self._haze + (colour - self._haze) * clear

    def paint(
        self, at: tuple[slice, slice], mask: np.ndarray, colour: np.ndarray, label: int | None
    ) -> None:
        """Sets colour (and label, instance 0) where `mask` within the window `at`."""
        np.copyto(self.image[at], colour, where=mask[..., None])
        if label is not None:
            self.label[at][mask] = label
            self.instance[at][mask] = 0

    def pen(
        self, place: "Place", left: float, right: float, top: float, bottom: float = 0.0
    ) -> "Pen":
        """A pen for a new object whose extent about its foot point is given in metres."""
        self.count += 1
        return Pen(self, place, left, right, top, bottom)

    def finish(self, rng: np.random.Generator, colour_rng: np.random.Generator) -> np.ndarray:
        """Renders to uint8 (H,W,3). `colour_rng` draws the exposure, `rng` the noise (the one draw per pixel)."""
        look = self.domain
        gain = colour_rng.uniform(1 - look.jitter, 1 + look.jitter) * colour_rng.uniform(
            1 - look.jitter / 3, 1 + look.jitter / 3, 3
        )
        out = self.image.reshape(-1, 3) @ (look.matrix().T * gain.astype(np.float32))
        np.clip(out, 0, 1, out=out)
        if look.gamma != 1:
            np.power(out, np.float32(look.gamma), out=out)
        if look.noise:
            out += rng.standard_normal(out.shape, dtype=np.float32) * np.float32(look.noise)
            np.clip(out, 0, 1, out=out)
        out *= 255
        return out.astype(np.uint8).reshape(self.image.shape)


@dataclass(frozen=True)
class Place:
    """Where an object stands: its foot point (x, y) in image heights, `scale` in image heights per metre."""

    x: float
    y: float
    scale: float
    metres: float = 0.0  # distance for the haze


class Pen:
    """Paints the parts of one object. u (right) and v (up): its pixels' metres from the foot point."""

    def __init__(
        self, canvas: Canvas, place: Place, left: float, right: float, top: float, bottom: float
    ):
        s = place.scale
        self.canvas, self.place, self.number = canvas, place, canvas.count
        self.at = canvas.window(
            place.x - left * s, place.y - top * s, place.x + right * s, place.y + bottom * s
        )
        self.u = (canvas.x[:, self.at[1]] - np.float32(place.x)) / np.float32(s)
        self.v = (np.float32(place.y) - canvas.y[self.at[0]]) / np.float32(s)
        self.clear = np.float32(np.exp(-canvas.domain.haze * place.metres))
        self.veil = np.array(canvas.domain.haze_colour, np.float32) * (1 - self.clear)
        # Rounded bodies: brighter towards the sun and the top.
        self.light = (
            0.94
            + (0.16 * canvas.sun / max(left, right)) * self.u
            + (0.10 / max(top, 1e-3)) * self.v
        )

    def box(self, left: float, right: float, low: float, high: float) -> np.ndarray:
        return (self.u > left) & (self.u < right) & (self.v > low) & (self.v < high)

    def ellipse(self, u: float, v: float, ru: float, rv: float) -> np.ndarray:
        return ((self.u - u) / ru) ** 2 + ((self.v - v) / rv) ** 2 < 1

    def line(self, u0: float, v0: float, u1: float, v1: float, half_width: float) -> np.ndarray:
        """Pixels nearer than `half_width` to the segment."""
        du, dv = u1 - u0, v1 - v0
        length = du * du + dv * dv
        t = (self.u - u0) * (du / length) + (self.v - v0) * (dv / length)
        t = np.minimum(np.maximum(t, 0), 1)
        return (self.u - u0 - t * du) ** 2 + (self.v - v0 - t * dv) ** 2 < half_width**2

    def fill(
        self,
        mask: np.ndarray,
        colour,
        label: int | None = None,
        texture: np.ndarray | None = None,
    ) -> None:
        """Paints `mask` (h,w) in `colour`, shaded and times `texture` (h,w); `label` None leaves the label alone."""
        light = self.light[mask]
        if texture is not None:
            light = light * np.broadcast_to(texture, mask.shape)[mask]
        self.canvas.image[self.at][mask] = (
            light[:, None] * (np.asarray(colour, np.float32) * self.clear) + self.veil
        )
        if label is not None:
            self.mark(mask, label)

    def mark(self, mask: np.ndarray, label: int) -> None:
        """Sets label and instance only: what an annotator's polygon covers beyond the painted parts."""
        self.canvas.label[self.at][mask] = label
        self.canvas.instance[self.at][mask] = self.number
