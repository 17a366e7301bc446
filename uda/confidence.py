"""Which of the teacher's labels DAFormer trusts: one share of confident pixels for a batch, and margins left out."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from common.config import ConfigError
from common.config.bounds import Whole
from common.ops.resize import size_of

# recipes that pad small images and give no `extent`
UNTOLD = ("cpsl", "detectron2", "u2pl", "unimatch", "usrn")


@dataclass(frozen=True)
class Margins:
    """Rows and columns without pseudo-labels, where target images show the ego car or are distorted.

    of: "crop" counts them in each crop, which for DAFormer has the height of the resized image; "image" in the image as
    it is stored.
    """

    top: Whole = 0
    bottom: Whole = 0
    left: Whole = 0
    right: Whole = 0
    of: Literal["crop", "image"] = "crop"


def check_margins(margins: Margins, crop: tuple[int, int], where: str) -> None:
    """ConfigError, beginning with `where`, for margins that leave nothing of a crop (height, width)."""
    sides = (("top", "bottom", "rows"), ("left", "right", "columns"))
    for (first, last, unit), side in zip(sides, crop, strict=True):
        before, after = getattr(margins, first), getattr(margins, last)
        if margins.of == "crop" and before + after >= side:
            raise ConfigError(
                f"{where}: {first} {before} and {last} {after} leave nothing of a crop of {side} {unit}; lower them"
            )


def check_image_margins(geometry: Tensor, margins: Margins) -> None:
    """ValueError for margins that leave nothing of one of the stored images. geometry: as in `image_margins`; this
    waits for it."""
    for height, width in geometry[:, :2].long().tolist():
        down, across = margins.top + margins.bottom, margins.left + margins.right
        if down >= height or across >= width:
            raise ValueError(
                f"method.margins: top and bottom {down}, left and right {across} leave nothing of an image of "
                f"{height}×{width}; lower them"
            )


def check_padding(recipe: object, where: str) -> None:
    """ConfigError, beginning with `where`, for a recipe whose padding would be learned as if it were image."""
    if recipe in UNTOLD:
        raise ConfigError(
            f"{where}.recipe: {recipe!r} does not tell the padding of small images, which would be learned; use mmseg"
        )


@torch.no_grad()
def confident_share(
    probability: Tensor, threshold: float, shown: Tensor | None = None
) -> Tensor:
    """The share of a batch's pixels whose class has a probability (B, H, W) of `threshold` or more, a scalar.

    shown: those that are counted, as `shown_pixels` has them; None: all. Those in margins are, as in the release.
    """
    confident = (probability >= threshold).float()
    if shown is None:
        return confident.mean()

    shown = shown.expand_as(confident)
    return (confident * shown).sum() / shown.sum().clamp(min=1)


def shown_pixels(target: Mapping[str, Tensor], size: tuple[int, int]) -> Tensor | None:
    """1 where target crops show their image, 0 in padding: float32 (B, H, W), or (1, H, W); None where nobody pads.

    size: H, W that the network pads the crops to, at the bottom and the right.
    """
    images = target["image"]
    crop = size_of(images)
    extent = target.get("extent")
    if extent is None and size == crop:
        return None

    shown = images.new_ones((1, *crop), dtype=torch.float32)
    if extent is not None:
        rows, columns = (torch.arange(side, device=images.device) for side in crop)
        down = rows < extent[:, :1]
        across = columns < extent[:, 1:]
        shown = shown * down[:, :, None] * across[:, None]

    return padded(shown, size)


def valid_pixels(
    target: Mapping[str, Tensor], size: tuple[int, int], margins: Margins, shown: Tensor | None
) -> Tensor:
    """1 where pseudo-labels of target crops count, 0 in margins and padding: float32 (B, H, W), or (1, H, W).

    size, shown: of `shown_pixels`.
    """
    images = target["image"]
    crop = size_of(images)
    if margins == Margins():
        return images.new_ones((1, *size), dtype=torch.float32) if shown is None else shown

    inside = (
        image_margins(target["geometry"], crop, margins)
        if margins.of == "image"
        else crop_margins(crop, margins, images.device)
    )
    inside = padded(inside, size)

    return inside if shown is None else inside * shown


def padded(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """Maps (…, h, w) with 0 at the bottom and the right, up to `size`."""
    height, width = size_of(maps)
    return F.pad(maps, (0, size[1] - width, 0, size[0] - height))


def crop_margins(size: tuple[int, int], margins: Margins, device: torch.device) -> Tensor:
    """1 inside the margins of a crop: float32 (1, H, W)."""
    rows, columns = (torch.arange(side, device=device) for side in size)
    down = (rows >= margins.top) & (rows < size[0] - margins.bottom)
    across = (columns >= margins.left) & (columns < size[1] - margins.right)
    return (down[:, None] & across).float()[None]


def image_margins(geometry: Tensor, size: tuple[int, int], margins: Margins) -> Tensor:
    """1 where a crop shows its image inside the margins, 0 in padding too: float32 (B, H, W).

    geometry: (B, 7), as `common.data.geometry.Geometry`. A pixel stands for the nearest one of the stored image.
    """
    height0, width0, height, width, y, x, flip = geometry.long().unsqueeze(2).unbind(1)
    rows, columns = (torch.arange(side, device=geometry.device) for side in size)

    shown = torch.minimum(width - x, torch.full_like(width, size[1]))
    columns = torch.where(flip > 0, shown - 1 - columns, columns)
    row = rows + y
    column = columns + x
    inside_down = row < height
    inside_across = (columns >= 0) & (column < width)

    row = row * height0 // height
    column = column * width0 // width
    down = (row >= margins.top) & (row < height0 - margins.bottom)
    across = (column >= margins.left) & (column < width0 - margins.right)

    counts_down = inside_down & down
    counts_across = inside_across & across
    return (counts_down[:, :, None] & counts_across[:, None]).float()
