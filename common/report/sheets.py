"""Pictures of errors: a whole confusion matrix, and the images on which a class fares worst."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from common.visualize import colourise, error_map

INK = (27, 32, 39)
SOFT = (91, 101, 114)
WRONG = np.array([196, 64, 16])
RIGHT = np.array([31, 95, 191])
LONGEST = 24  # characters of a class's name
PANEL = 360  # pixels that a panel is wide
GAP = 8


class Row(NamedTuple):
    """One image of a sheet. image: uint8 (H, W, 3); truth, pred: classes (H, W)."""

    name: str
    text: str
    image: np.ndarray
    truth: np.ndarray
    pred: np.ndarray


def confusion_picture(matrix: np.ndarray, classes: Sequence[str]) -> Image.Image:
    """A matrix (K, K) as shares of the rows: truth at the left, prediction above, right pixels blue, wrong ones red.

    Cells shrink with the number of classes; numbers stand in them while there is room.
    """
    count = len(classes)
    cell = min(max(1400 // count, 3), 40)
    font = ImageFont.load_default(min(max(cell - 2, 6), 13))
    names = [name if len(name) <= LONGEST else f"{name[: LONGEST - 1]}…" for name in classes]
    margin = int(max(font.getlength(name) for name in names)) + 3 * GAP

    picture = Image.new("RGB", (margin + cell * count + GAP,) * 2, "white")
    draw = ImageDraw.Draw(picture)
    total = matrix.sum(1, keepdims=True)
    shares = np.divide(matrix, total, out=np.zeros(matrix.shape), where=total > 0)
    cells = Image.fromarray(_shade(shares)).resize(
        (cell * count,) * 2, Image.Resampling.NEAREST
    )
    picture.paste(cells, (margin, margin))

    for k, name in enumerate(names):
        middle = margin + cell * (k + 0.5)
        draw.text((margin - GAP, middle), name, INK, font, anchor="rm")
        _write_upwards(picture, (int(middle), margin - GAP), name, font)

    if cell >= 24:
        _write_shares(draw, shares, margin, cell)
    draw.text((GAP, GAP), "rows: truth", SOFT, font)
    draw.text((GAP, GAP + 16), "columns: predicted", SOFT, font)
    return picture


def _shade(shares: np.ndarray) -> np.ndarray:
    """Shares (K, K) as colours uint8 (K, K, 3), from near white."""
    colours = np.broadcast_to(WRONG, (*shares.shape, 3)).copy()
    np.einsum("kkc->kc", colours)[:] = RIGHT
    strength = shares[..., None] ** 0.6  # so that few per cent are seen
    return (250 * (1 - strength) + colours * strength).astype(np.uint8)


def _write_upwards(
    picture: Image.Image, place: tuple[int, int], text: str, font: ImageFont.FreeTypeFont
) -> None:
    """Text that ends at `place` (its middle and its lower end), read from below."""
    left, top, right, bottom = font.getbbox(text)
    size = (int(right - left) + 2, int(bottom - top) + 2)
    strip = Image.new("RGB", size, "white")
    ImageDraw.Draw(strip).text((1 - left, 1 - top), text, INK, font)
    turned = strip.transpose(Image.Transpose.ROTATE_90)
    picture.paste(turned, (place[0] - turned.width // 2, place[1] - turned.height))


def _write_shares(
    draw: ImageDraw.ImageDraw, shares: np.ndarray, margin: int, cell: int
) -> None:
    font = ImageFont.load_default(11)
    for i, j in np.argwhere(shares >= 0.005):
        place = (margin + cell * (j + 0.5), margin + cell * (i + 0.5))
        ink = "white" if shares[i, j] > 0.4 else INK
        draw.text(place, f"{100 * shares[i, j]:.0f}", ink, font, anchor="mm")


def worst_sheet(
    title: str, rows: Sequence[Row], palette: Sequence[Sequence[int]], k: int
) -> Image.Image:
    """Image, truth, prediction and errors of each row under its text; errors at class k in yellow."""
    font = ImageFont.load_default(14)
    height = [round(PANEL * row.truth.shape[0] / row.truth.shape[1]) for row in rows]
    lines = 44
    size = (4 * (PANEL + GAP) + GAP, sum(h + lines + GAP for h in height) + 40)
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    draw.text((GAP, GAP), title, INK, ImageFont.load_default(18))
    top = 40

    for row, tall in zip(rows, height, strict=True):
        draw.text((GAP, top), row.name, INK, font)
        draw.text((GAP, top + 19), row.text, SOFT, font)
        top += lines
        panels = (
            row.image,
            colourise(row.truth, palette),
            colourise(row.pred, palette),
            error_map(row.image, row.truth, row.pred, tail=[k]),
        )
        for i, panel in enumerate(panels):
            kind = Image.Resampling.BILINEAR if i == 0 else Image.Resampling.NEAREST
            sheet.paste(
                Image.fromarray(panel).resize((PANEL, tall), kind),
                (GAP + i * (PANEL + GAP), top),
            )
        top += tall + GAP

    return sheet
