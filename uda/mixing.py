"""CutMix of source pixels into the weak target view: one box of half the crop's area for a micro-batch."""

from typing import NamedTuple

import torch
from torch import Tensor

from uda.base import STRIDE


class Box(NamedTuple):
    """Pixels [y0, y1) × [x0, x1) of the crop."""

    y0: int
    y1: int
    x0: int
    x1: int


def draw_box(crop: tuple[int, int], probability: float) -> Box | None:
    """A box whose height is a share 0.5^u of the crop's, u ~ U(0, 1), and whose area is half; None otherwise.

    Drawn on the host (torch's CPU generator), so that nothing waits for the device.
    """
    chance, u, v, w = torch.rand(4, dtype=torch.float64, device="cpu").tolist()
    if chance >= probability:
        return None

    share = 0.5**u
    height = round(crop[0] * share)
    width = round(crop[1] * 0.5 / share)
    y = round((crop[0] - height) * v)
    x = round((crop[1] - width) * w)

    return Box(y, y + height, x, x + width)


def paste(target: Tensor, source: Tensor, box: Box) -> Tensor:
    """Images (B, 3, H, W) with the source's pixels in the box; image b of one goes with image b of the other."""
    if target.shape != source.shape:
        raise ValueError(
            f"CutMix: source crops {tuple(source.shape)} and target crops {tuple(target.shape)} differ; give both "
            "streams the same batch_size and crop, or set method.cutmix=0"
        )

    mixed = target.clone()
    inside = (..., slice(box.y0, box.y1), slice(box.x0, box.x1))
    mixed[inside] = source[inside]

    return mixed


def paste_labels(label: Tensor, source: Tensor, box: Box) -> Tensor:
    """Grid labels (B, h, w) with the source's full-size labels (B, H, W), ignored pixels included, in the box.

    Grid cell i shows pixel 4i, which is what resizing by nearest to the full size, pasting, and back gives.
    """
    rows, columns = (
        slice(-(-a // STRIDE), -(-b // STRIDE)) for a, b in ((box.y0, box.y1), (box.x0, box.x1))
    )
    mixed = label.clone()
    mixed[:, rows, columns] = source[:, ::STRIDE, ::STRIDE][:, rows, columns].to(label.dtype)
    return mixed
