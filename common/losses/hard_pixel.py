"""Hard pixel mining: the mean of the largest pixel losses (DeepLab project of detectron2, after Wu et al., 2016)."""

import math
import warnings
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from common.config.bounds import Above, AtMost, Below, Count
from common.data import IGNORE
from common.ops.resize import Size, resize_rows, size_of

# logits at full size that are made at a time: the cache, or 256 MiB
BAND = {"cpu": 1 << 22, "cuda": 1 << 26}


@dataclass(frozen=True)
class HardPixels:
    """Which pixels train. fraction: share of all pixels, ignored ones (of loss 0) included, that is kept, the hardest.

    threshold: keep the pixels whose class has less than this probability instead, at least `min_kept` of the batch (the
    online hard example mining of MMSegmentation and UniMatch).
    choose: by the cross-entropy of the network's own logits (clean), or by the loss that the other remedies make of it
    (noisy): noise that helps rare classes would let their pixels pass as easy ones.
    """

    fraction: Annotated[float, Above(0), AtMost(1)] = 0.2
    threshold: Annotated[float, Above(0), Below(1)] | None = None
    min_kept: Count = 100_000
    choose: Literal["clean", "noisy"] = "clean"

    def __post_init__(self):
        if self.threshold is None:
            idle, instead = "min_kept", "fraction"
        else:
            idle, instead = "fraction", "threshold"

        value, default = getattr(self, idle), type(self).__dataclass_fields__[idle].default
        if value != default:
            given = getattr(self, instead)
            warnings.warn(
                f"hard_pixels: {idle}: {value} has no effect where {instead}: {given} chooses",
                stacklevel=3,
            )

    def mean(self, losses: Tensor, valid: Tensor, by: Tensor) -> Tensor:
        """Mean of the losses whose pixels are chosen, of any shape; nothing is read on the host.

        valid: what is not ignored. by: the losses that decide; both are 0 where ignored.
        """
        flat = losses.flatten()
        by = by.detach().flatten()
        if self.threshold is None:
            count = max(int(self.fraction * flat.numel()), 1)
            return flat.gather(0, by.topk(count, sorted=False).indices).mean()

        kept = min(self.min_kept, flat.numel())
        least = by.topk(kept).values[-1]
        chosen = ((by > -math.log(self.threshold)) | (by >= least)) & valid.flatten()

        return (flat * chosen).sum() / chosen.sum().clamp(min=1)


def hard_pixel_cross_entropy(
    logits: Tensor,
    label: Tensor,
    *,
    fraction: float = 0.2,
    stride: int = 4,
    align_corners: bool = False,
) -> Tensor:
    """Mean cross-entropy of the hardest pixels of a batch, of logits enlarged `stride` times.

    Equal to `HardPixels.mean` of the pixel losses of the enlarged logits, which are never kept: the pixels are chosen
    from losses that are made a few rows at a time, and only theirs are interpolated with a gradient.

    Args:
        logits: (B, K, h, w).
        label: (B, H, W) with H ≤ stride · h, W ≤ stride · w: the upper left part of the enlarged logits; −1 is ignored.
        fraction: of all B·H·W pixels, ignored ones (of loss 0) included.
    """
    losses = _pixel_losses(logits.detach(), label, stride, align_corners)
    count = max(int(fraction * losses.numel()), 1)
    pixels = losses.flatten().topk(count, sorted=False).indices
    chosen = _interpolate(logits, pixels, size_of(label), stride, align_corners)
    label = label.flatten()[pixels].long()

    return F.cross_entropy(chosen.float(), label, ignore_index=IGNORE, reduction="sum") / count


@torch.no_grad()
def _pixel_losses(logits: Tensor, label: Tensor, stride: int, align_corners: bool) -> Tensor:
    """(B, H, W) cross-entropies, 0 where ignored."""
    batch, classes, height, width = logits.shape
    size = (stride * height, stride * width)
    band = BAND.get(logits.device.type, BAND["cuda"])
    step = max(band // (batch * classes * size[1]), 1)
    bands = []

    for start in range(0, label.shape[1], step):
        rows = (start, min(start + step, label.shape[1]))
        large = resize_rows(logits, size, rows, align_corners)[..., : label.shape[2]].float()
        bands.append(
            F.cross_entropy(
                large, label[:, slice(*rows)].long(), ignore_index=IGNORE, reduction="none"
            )
        )

    return torch.cat(bands, 1)


def _interpolate(
    logits: Tensor, pixels: Tensor, size: Size, stride: int, align_corners: bool
) -> Tensor:
    """Bilinear logits (n, K) at flat pixel numbers of the batch's label maps of `size`."""
    batch, classes, height, width = logits.shape
    column = pixels % size[1]
    row = pixels // size[1] % size[0]
    first = pixels // (size[0] * size[1]) * (height * width)

    def taps(place: Tensor, length: int) -> tuple[Tensor, Tensor, Tensor]:
        if align_corners:
            source = place * ((length - 1) / max(stride * length - 1, 1))
        else:
            source = ((place + 0.5) / stride - 0.5).clamp(min=0)

        low = source.floor().long()
        return low, (low + 1).clamp(max=length - 1), source - low

    (top, bottom, y) = taps(row, height)
    (left, right, x) = taps(column, width)
    corners = torch.stack(
        [
            top * width + left,
            top * width + right,
            bottom * width + left,
            bottom * width + right,
        ],
        1,
    )
    weights = torch.stack([(1 - y) * (1 - x), (1 - y) * x, y * (1 - x), y * x], 1).to(
        logits.dtype
    )
    table = logits.permute(0, 2, 3, 1).reshape(-1, classes)

    return F.embedding_bag(
        corners + first.unsqueeze(1), table, per_sample_weights=weights, mode="sum"
    )
