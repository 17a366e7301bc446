"""Region Rebalance (arXiv 2204.01969): regions are classified beside pixels, and all of them count alike.

    r  = mean over the pixels of one class in one image of the features that the classifier reads
    u  = W r,    W a classifier of regions (K, D), which only training has
    L  = mean over the regions of the batch of −ln softmax(u + ln m)_k

with m_k the training images that show class k, so that the regions' own imbalance is adjusted for. With equal m it is
plain cross-entropy of regions. There is no official code; the weight is the paper's, the rest follows its text.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.config.bounds import NotNegative
from common.losses.counts import Counts, where_present
from common.losses.presence import At, thinned
from common.ops.resize import size_of


@dataclass(frozen=True)
class Region:
    """weight: beside the pixel loss."""

    weight: NotNegative = 0.5
    at: ClassVar[At] = "network"  # the features' grid

    def vector(self, counts: Counts) -> Tensor:
        """ln m (K,); a class without labels is treated as the most frequent one."""
        logs = counts.images.clamp(min=1).log()
        return where_present(logs, counts.images, logs.max())

    def term(self, counts: Counts, channels: int) -> "RegionTerm":
        """The module that does the work, on features of so many channels."""
        return RegionTerm(self, counts, channels)


class RegionTerm(nn.Module):
    """A term of the slot `sets` with weights of its own. Their start is drawn by a generator of their own, so that all
    other weights and draws are those of a run without it."""

    at = Region.at
    log_images: Tensor

    def __init__(self, options: Region, counts: Counts, channels: int):
        super().__init__()
        self.weight = options.weight
        self.register_buffer("log_images", options.vector(counts).float(), persistent=False)
        classes = len(counts.images)
        generator = torch.Generator("cpu").manual_seed(torch.initial_seed())
        start = torch.rand(classes, channels, generator=generator, device="cpu")
        start = (2 * start - 1) / math.sqrt(channels)
        self.classifier = nn.Parameter(torch.empty(classes, channels).copy_(start))

    def forward(self, features: Tensor, label: Tensor) -> Tensor:
        """Scalar of features (B, D, h, w) and label (B, H, W), −1 where ignored; 0 where no pixel is labelled."""
        with torch.autocast(features.device.type, enabled=False):
            means, present = region_means(features.float(), label, len(self.log_images))
            log_p = (F.linear(means, self.classifier) + self.log_images).log_softmax(-1)
            own = log_p.diagonal(dim1=1, dim2=2)  # row k of an image is the region of class k
            return -(own * present).sum() / present.sum().clamp(min=1)


def region_means(features: Tensor, label: Tensor, classes: int) -> tuple[Tensor, Tensor]:
    """Mean feature (B, K, D) of every class in every image, 0 where the image does not show it; which do (B, K).

    The label (B, H, W) is brought to the features' grid (h, w) by the nearest pixel of each cell.
    """
    small = thinned(label, size_of(features)).flatten(1)
    index = torch.arange(classes, device=label.device)
    member = (small[:, None] == index[:, None]).to(features.dtype)  # (B, K, n)
    cells = member.sum(2)
    sums = member @ features.flatten(2).transpose(1, 2)

    return sums / cells.clamp(min=1)[..., None], cells > 0
