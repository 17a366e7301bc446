"""The losses of USRN (CVPR 2022) on unlabelled images, as pure functions of logits.

Two views of each image are pixel-aligned: the weak one gives the pseudo-labels, the strong one learns them. p and q are
the softmax over C classes and K subclasses on the weak view, H the entropy divided by its maximum, π(s) the class of
subclass s. The subclass branch, trained on balanced subclasses, is less biased to frequent classes; where it is not the
less certain of the two, only the class of its winner may become a label:

    p̃ = p if H(q) > H(p), else p ⊙ onehot(π(argmax q));    label argmax p̃ where max p̃ > τ, else none.

Both losses run at stride 8: features are pooled 2×2 before they are classified. They are means over all pixels, those
without label included, so the loss grows as labels become certain.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from common.data import IGNORE
from common.losses.cross_entropy import cross_entropy_sum
from common.losses.upsampled import Total


class UnlabelledLosses(NamedTuple):
    """`classes` is L_u_reg, `subclasses` L_u_sub; `kept` and `vetoed` are shares of all pixels, without gradient:
    those with a class label, and those that the gate took a confident one from. `surer` is the share with a confident
    label and a subclass branch that is not the less certain: no more can be vetoed. `label` (B, h, w) are the labels
    that L_u_reg learned, −1 where there is none, `confident` those before the gate; `pixels` all that count."""

    classes: Tensor
    subclasses: Tensor
    kept: Tensor
    vetoed: Tensor
    surer: Tensor
    label: Tensor
    confident: Tensor
    pixels: Tensor | int

    @property
    def taken(self) -> Tensor:
        """The labels that the gate took away."""
        return torch.where(self.label == IGNORE, self.confident, IGNORE)


def entropy(logits: Tensor) -> Tensor:
    """Entropy of the softmax over dimension 1 divided by its maximum: (B, K, …) to (B, …), in [0, 1]; 0 for K = 1."""
    return entropy_of(logits.float().softmax(1))


def entropy_of(probability: Tensor) -> Tensor:
    """The same of probabilities."""
    if probability.shape[1] == 1:
        return torch.zeros_like(probability[:, 0])
    return torch.special.entr(probability).sum(1) / math.log(probability.shape[1])


def confident_labels(logits: Tensor, threshold: float, valid: Tensor | None = None) -> Tensor:
    """Argmax (B, …) of logits (B, K, …), −1 where its probability is not above `threshold`, or not `valid`."""
    return confident_classes(logits.float().softmax(1), threshold, valid)


def confident_classes(
    probability: Tensor, threshold: float, valid: Tensor | None = None
) -> Tensor:
    """The same of probabilities."""
    confidence, label = probability.max(1)
    kept = confidence > threshold
    if valid is not None:
        kept = kept & valid

    return torch.where(kept, label, IGNORE)


def gated_labels(
    logits: Tensor, sub_logits: Tensor, parents: Tensor, threshold: float
) -> Tensor:
    """Class labels (B, …) of the weak view after the entropy gate, −1 where there is none.

    logits: (B, C, …); sub_logits: (B, K, …); parents: class of each subclass, int64 (K,).
    Above τ = 0.5 only the winner of p can be kept, whatever p̃ is, so the gate is a veto: a confident label stays if
    H(q) > H(p) or π(argmax q) agrees. Below, another class may win, and p̃ itself is made.
    """
    if threshold < 0.5:
        return gated_labels_by_product(logits, sub_logits, parents, threshold)

    p = logits.float().softmax(1)
    q = sub_logits.float().softmax(1)
    free = entropy_of(q) > entropy_of(p)
    return vetoed(confident_classes(p, threshold), free, parents[sub_logits.argmax(1)])


def vetoed(label: Tensor, free: Tensor, parent: Tensor) -> Tensor:
    """Confident labels (B, …), −1 where they are not `free`, bool (B, …), of a subclass branch whose winner's class,
    `parent` (B, …), is another."""
    agrees = parent == label
    return torch.where(agrees | free, label, IGNORE)


def gated_labels_by_product(
    logits: Tensor,
    sub_logits: Tensor,
    parents: Tensor,
    threshold: float,
    valid: Tensor | None = None,
) -> Tensor:
    """The same by the definition, for any threshold: p̃ is made and its maximum taken. Not `valid`: −1."""
    p = logits.float().softmax(1)
    parent = parents[sub_logits.argmax(1)]
    free = (entropy(sub_logits) > entropy(logits))[:, None]
    only = torch.zeros_like(p).scatter_(1, parent[:, None], 1.0)
    gated = torch.where(free, p, p * only)

    return confident_classes(gated, threshold, valid)


def area(label: Tensor, valid: Tensor | None) -> Tensor | int:
    """The pixels of labels that count, at least 1: those of bool `valid`, None for all."""
    return label.numel() if valid is None else valid.sum().clamp(min=1)


def share(label: Tensor, pixels: Tensor | int) -> Tensor:
    """Labelled ones among so many pixels."""
    return (label != IGNORE).sum() / pixels


def right_and_wrong(
    label: Tensor, truth: Tensor, pixels: Tensor | int
) -> tuple[Tensor, Tensor]:
    """Labels (B, …) that are the truth's, and that are not, among so many pixels; −1 in either counts as neither."""
    known = (label != IGNORE) & (truth != IGNORE)
    right = known & (label == truth)

    return right.sum() / pixels, (known & ~right).sum() / pixels


def pseudo_label_loss(
    logits: Tensor, label: Tensor, pixels: Tensor | int, total: Total = cross_entropy_sum
) -> Tensor:
    """Loss of logits (B, K, …) with `label` (B, …), summed over labelled pixels by `total`, divided by `pixels`, which
    are all that count (`area`)."""
    return total(logits, label) / pixels


def unlabelled_losses(
    strong: Tensor,
    strong_sub: Tensor,
    weak: Tensor,
    weak_sub: Tensor,
    parents: Tensor,
    threshold: float = 0.75,
    *,
    gate: bool = True,
    valid: Tensor | None = None,
    total: Total = cross_entropy_sum,
) -> UnlabelledLosses:
    """L_u_reg and L_u_sub of both views' logits, all at the same size.

    strong, weak: (B, C, h, w); strong_sub, weak_sub: (B, K, h, w); parents: int64 (K,); valid: bool (B, h, w), other
    pixels (padding of a crop) count neither in sums nor in divisors.
    Gradients flow to the strong view only. Without `gate` every confident class label is kept. total: how the losses
    of pixels with a class label are summed (`PixelLoss.total`); subclasses keep cross-entropy.
    """
    weak = weak.detach()
    weak_sub = weak_sub.detach()
    p = weak.float().softmax(1)
    q = weak_sub.float().softmax(1)

    confident = confident_classes(p, threshold, valid)
    sub_label = confident_classes(q, threshold, valid)
    free = entropy_of(q) > entropy_of(p)
    if not gate:
        label = confident
    elif threshold < 0.5:
        label = gated_labels_by_product(weak, weak_sub, parents, threshold, valid)
    else:
        label = vetoed(confident, free, parents[weak_sub.argmax(1)])

    pixels = area(label, valid)
    sure = confident != IGNORE
    masks = torch.stack([label != IGNORE, sure, sure > free])  # > is "and not"
    kept, before, surer = masks.flatten(1).sum(1) / pixels

    return UnlabelledLosses(
        classes=pseudo_label_loss(strong, label, pixels, total),
        subclasses=pseudo_label_loss(strong_sub, sub_label, pixels),
        kept=kept,
        vetoed=before - kept,
        surer=surer,
        label=label,
        confident=confident,
        pixels=pixels,
    )
