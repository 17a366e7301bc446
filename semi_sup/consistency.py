"""What FixMatch, UniMatch and UniMatch V2 have in common, as pure functions: pseudo-labels at the size of the crop,
CutMix of images and labels, the loss of confident pixels, dropout of whole channels."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from common import distributed
from common.data import IGNORE
from common.losses.upsampled import Total, upsampled_cross_entropy_sum
from common.ops.resize import size_of
from common.ops.upsampled_loss import upsampled_labels

plain_sum: Total = partial(upsampled_cross_entropy_sum, align_corners=True)


class PseudoLabels(NamedTuple):
    """label int64, confidence float32 and shown bool (the image, not padding), each (B, H, W)."""

    label: Tensor
    confidence: Tensor
    shown: Tensor

    def confident(self, threshold: float | Tensor) -> Tensor:
        """The labels (B, H, W), −1 in padding and where the confidence is below `threshold`, one for all or a map."""
        keep = (self.confidence >= threshold) & self.shown
        return torch.where(keep, self.label, IGNORE)

    def kept(self, threshold: float | Tensor) -> Tensor:
        """The share of pixels with a label, of those that show the image."""
        return (self.confident(threshold) != IGNORE).sum() / self.shown.sum().clamp(min=1)

    def flip(self) -> "PseudoLabels":
        """The same in the opposite order of the batch."""
        return PseudoLabels(*(x.flip(0) for x in self))


@torch.no_grad()
def pseudo_labels(logits: Tensor, shown: Tensor) -> PseudoLabels:
    """Argmax and largest probability of logits (B, K, h, w) enlarged bilinearly, with aligned corners, to the size of
    `shown` (B, H, W)."""
    label, confidence = upsampled_labels(logits, size_of(shown), align_corners=True)
    return PseudoLabels(label, confidence, shown)


def native_area(batch: Mapping[str, Tensor], shown: Tensor) -> Tensor:
    """Pixels of its whole image that each one of a crop stands for (B,), so that counts of crops are those of images.

    batch: with the `geometry` of the crops. shown: bool (B, H, W), pixels or cells that are no padding.
    """
    height, width = batch["geometry"][:, :2].double().unbind(1)
    return height * width / shown.flatten(1).sum(1).clamp(min=1)


def in_boxes(boxes: Tensor, size: Sequence[int]) -> Tensor:
    """Which pixels lie in the boxes (B, 4) = top, left, bottom, right: bool (B, H, W)."""
    top, left, bottom, right = boxes.T[..., None]
    row, column = (torch.arange(side, device=boxes.device) for side in size)
    down = (row >= top) & (row < bottom)
    across = (column >= left) & (column < right)

    return down[:, :, None] & across[:, None, :]


def paste(images: Tensor, partner: Tensor, inside: Tensor) -> Tensor:
    """Images (B, C, H, W) with the partner's pixels where `inside` (B, H, W) says so."""
    return torch.where(inside[:, None], partner, images)


def paste_labels(labels: PseudoLabels, partner: PseudoLabels, inside: Tensor) -> PseudoLabels:
    """Label, confidence and padding, pasted as the images are."""
    pairs = zip(labels, partner, strict=True)
    return PseudoLabels(*(torch.where(inside, theirs, ours) for ours, theirs in pairs))


class Labels(NamedTuple):
    """Of the classes and, where a branch has them, of the subclasses."""

    classes: PseudoLabels
    subclasses: PseudoLabels | None = None

    def flip(self) -> "Labels":
        """The same in the opposite order of the batch."""
        subclasses = None if self.subclasses is None else self.subclasses.flip()
        return Labels(self.classes.flip(), subclasses)

    def pasted(self, partner: "Labels", inside: Tensor) -> "Labels":
        """The partner's where `inside` (B, H, W) says so."""
        classes = paste_labels(self.classes, partner.classes, inside)
        if self.subclasses is None or partner.subclasses is None:
            return Labels(classes)

        return Labels(classes, paste_labels(self.subclasses, partner.subclasses, inside))


class ClassThresholds(nn.Module):
    """A threshold for each class: τ_k = τ · c_k / max c, with c_k the moving average of the confidence of the pixels
    that are taken for class k. One that the network is less sure of keeps more of its labels than under one τ for all.

    c starts at 1 for all; a class that nothing was taken for keeps its value, and one that nothing was ever taken for
    has no part in the maximum. c is the same on all ranks, and moves once a step, by all of its micro-batches.
    """

    confidence: Tensor
    seen: Tensor
    before: Tensor
    sums: Tensor

    def __init__(self, num_classes: int, threshold: float, momentum: float):
        super().__init__()
        self.threshold = threshold
        self.momentum = momentum
        self.register_buffer("confidence", torch.ones(num_classes))
        self.register_buffer("seen", torch.zeros(num_classes, dtype=torch.bool))
        # of the step that is on: the averages before it, and what its pixels are sure of, summed and counted
        self.register_buffer("before", torch.ones(num_classes), persistent=False)
        self.register_buffer(
            "sums", torch.zeros(2, num_classes, dtype=torch.float64), persistent=False
        )
        self.register_load_state_dict_post_hook(_begin_step)

    def of(self, label: Tensor) -> Tensor:
        """The threshold of each pixel's class, float32 like `label` (B, H, W)."""
        return class_thresholds(self.threshold, self.confidence, self.seen)[label]

    @torch.no_grad()
    def update(self, labels: PseudoLabels) -> None:
        """Move the averages by the labels of a micro-batch, together with those before it in the step."""
        classes = len(self.confidence)
        label = torch.where(labels.shown, labels.label, classes).flatten()
        confidence = labels.confidence.flatten().double()
        sums = confidence.new_zeros(2, classes + 1)
        sums[0].index_add_(0, label, confidence)
        sums[1].index_add_(0, label, torch.ones_like(confidence))
        self.sums += distributed.all_sum(sums)[:, :classes]
        total, count = self.sums
        mean = (total / count.clamp(min=1)).float()
        moved = self.momentum * self.before + (1 - self.momentum) * mean
        self.confidence.copy_(torch.where(count > 0, moved, self.before))
        self.seen |= count > 0

    def after_step(self) -> None:
        """What comes next belongs to another step."""
        self.before.copy_(self.confidence)
        self.sums.zero_()


def _begin_step(thresholds: ClassThresholds, _: object) -> None:
    """After loading: what is held belongs to no step."""
    thresholds.after_step()


def class_thresholds(threshold: float, confidence: Tensor, seen: Tensor) -> Tensor:
    """τ_k (K,) of mean confidences (K,) and the classes that they are of, bool (K,); at most τ."""
    highest = torch.where(seen, confidence, 0).max()
    highest = torch.where(highest > 0, highest, 1.0)
    return threshold * (confidence / highest).clamp(max=1)


def confident_loss(
    logits: Tensor,
    labels: PseudoLabels,
    threshold: float | Tensor,
    total: Total = plain_sum,
) -> Tensor:
    """Loss of logits (B, K, h, w), enlarged with aligned corners, against confident labels: their sum by `total`, which
    enlarges them, divided by the number of pixels that show the image; 0 where none does."""
    loss = total(logits, labels.confident(threshold))
    return loss / labels.shown.sum().clamp(min=1)


def channel_dropout(maps: Sequence[Tensor], rate: float = 0.5) -> tuple[Tensor, ...]:
    """Maps (B, C, h, w) with whole channels of an image at 0 and the others divided by 1 − rate; each map has a mask of
    its own."""
    return tuple(x * channel_mask(x, rate) for x in maps)


def channel_mask(x: Tensor, rate: float = 0.5) -> Tensor:
    """0 with probability `rate`, else 1/(1 − rate): (B, C, 1, 1) for a map (B, C, h, w)."""
    keep = torch.full((*x.shape[:2], 1, 1), 1 - rate, dtype=x.dtype, device=x.device)
    return torch.bernoulli(keep) / (1 - rate)


def complementary_masks(pairs: int, channels: int, like: Tensor) -> Tensor:
    """Masks (2·pairs, channels, 1, 1) of the first and then of the second views: a channel is 2 in one and 0 in the
    other view of a pair. Half of the pairs (rounded down), drawn at random, are left as they are."""
    half = partial(torch.full, dtype=like.dtype, device=like.device)
    first = 2 * torch.bernoulli(half((pairs, channels, 1, 1), 0.5))
    whole = torch.randperm(pairs, device=like.device)[: pairs // 2]
    first.index_fill_(0, whole, 1)

    return torch.cat((first, 2 - first))
