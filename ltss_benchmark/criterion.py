"""Mask2Former's losses for semantic segmentation: classification of queries, masks at points.

Every prediction (the initial queries and each decoder layer) is matched to the classes of the image, and contributes

    2 · classification + 5 · binary cross-entropy + 5 · dice,

the last two at 12544 points a matched pair, three quarters of them where the predicted mask is least decided. Nothing
is made at full size: masks of matched queries at stride 4 only, targets from the label map at the points only.
Ignored and padded pixels belong to no class and are background of every mask.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Annotated, Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common import distributed
from common.config.bounds import AtLeast, AtMost, NotNegative, Positive, Share
from common.losses.pixel_loss import PixelLoss
from common.losses.seesaw import SeesawLoss
from common.models.mask2former import class_probabilities
from common.models.mask2former.decoder import masks
from common.ops.point_sample import class_masks, point_sample, uncertain_points
from common.ops.resize import Size, size_of
from ltss_benchmark.matcher import (
    AT_ONCE,
    Matcher,
    Matches,
    MatchWeights,
    Targets,
    find_targets,
)

STRIDE = 4  # of the mask features
Points = Annotated[int, AtLeast(1), AtMost(1 << 20)]  # of a matched pair
Oversampling = Annotated[
    float, AtLeast(1), AtMost(100)
]  # candidates for each point that is chosen


@dataclass(frozen=True)
class CriterionConfig:
    """Defaults are the release's."""

    class_loss: Literal["ce", "seesaw"] = "ce"
    # weights of the terms, in the loss and in the matching cost
    class_weight: NotNegative = 2.0
    mask_weight: NotNegative = 5.0
    dice_weight: NotNegative = 5.0
    no_object_weight: Positive = 0.1  # of queries without a class, in the cross-entropy
    points: Points = 12544
    oversample: Oversampling = 3.0
    importance: Share = 0.75
    seesaw_p: NotNegative = 1.2
    seesaw_q: NotNegative = 1.0
    # mask losses are divided by the classes, or matched pairs
    normalizer: Literal["targets", "pairs"] = "targets"


def point_losses(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Binary cross-entropy and dice loss (N,) of mask logits and targets (N, P), in float32.

    bce = mean_p BCE(x, t);  dice = 1 − (2 Σ σ(x) t + 1) / (Σ σ(x) + Σ t + 1).
    """
    logits = logits.float()
    bce = F.binary_cross_entropy_with_logits(logits, targets, reduction="none").mean(1)
    sigmoid = logits.sigmoid()
    dice = 1 - (2 * (sigmoid * targets).sum(1) + 1) / (sigmoid.sum(1) + targets.sum(1) + 1)

    return bce, dice


def classification_loss(
    logits: Tensor, labels: Tensor, no_object_weight: float, class_weight: Tensor | None = None
) -> Tensor:
    """Cross-entropy (L,) of logits (L, M, K + 1) and labels (L, M): a mean in which "no object" (K) weighs less.

    class_weight: (K,), factors of the losses of queries with a class; the mean's divisor does not know them.
    """
    no_object = logits.shape[2] - 1
    each = F.cross_entropy(
        logits.float().flatten(0, 1), labels.flatten(), reduction="none"
    ).view_as(labels)
    weight = torch.where(labels == no_object, no_object_weight, 1.0)
    if class_weight is not None:
        each = each * F.pad(class_weight, (0, 1), value=1.0)[labels]

    return (each * weight).sum(1) / weight.sum(1)


def adjusted_classes(
    logits: Tensor, label: Tensor, remedies: PixelLoss, progress: float
) -> Tensor:
    """Logits (N, K + 1) of queries with a class, label (N,), as the slot `logits` changes them.

    The K classes are adjusted among themselves: their log-sum-exp is brought back to what it was, so that the
    probability of "no object" stays as it is.
    """
    classes, no_object = logits.float().split([logits.shape[1] - 1, 1], 1)
    adjusted = remedies.adjust(classes, label, progress)
    shift = classes.logsumexp(1, keepdim=True) - adjusted.logsumexp(1, keepdim=True)
    return torch.cat([adjusted + shift, no_object], 1)


def adjusted_queries(
    logits: Tensor, matches: Matches, remedies: PixelLoss, progress: float
) -> Tensor:
    """Logits (L, B, Q, K + 1) with those of matched queries as the remedies change them."""
    every = logits.flatten(0, 2)
    matched = adjusted_classes(every[matches.place], matches.label, remedies, progress)
    return every.index_copy(0, matches.place, matched).view_as(logits)


class SetCriterion(nn.Module):
    """Losses of a Mask2Former in training, and what they hold: the counts of Seesaw.

    Args:
        num_classes: K.
        copies: (K,) queries of each class for the Frequency-based Matcher; None for one-to-one matching.
        remedies: their slots `logits` and `class_weight` act on the matched queries; None is plain cross-entropy.
    """

    def __init__(
        self,
        num_classes: int,
        options: CriterionConfig,
        copies: np.ndarray | None = None,
        remedies: PixelLoss | None = None,
    ):
        super().__init__()
        self.num_classes = num_classes
        self.options = options
        self.remedies = remedies
        weights = MatchWeights(options.class_weight, options.mask_weight, options.dice_weight)
        self.matcher = Matcher(weights, options.points, copies)
        seesaw = options.class_loss == "seesaw"
        self.seesaw = (
            SeesawLoss(num_classes, options.seesaw_p, options.seesaw_q) if seesaw else None
        )

    def forward(
        self, out: Mapping[str, Any], target: Tensor | Targets, progress: float = 0.0
    ) -> dict[str, Tensor]:
        """Losses of the training outputs `out` and label maps (B, H, W), −1 where ignored, or their `find_targets`.
        progress: share of the training that is over.

        `find_targets` waits for all that the GPU was given before: ahead of the network's forward for the last step's
        update and the labels' copy, later for the network, too.

        `loss` is the sum of all others: `loss_ce` (or `loss_seesaw`), `loss_mask`, `loss_dice` of the last prediction,
        and with `_0`, `_1`, … those of the initial queries and of the layers before; each with its weight.
        """
        features = out["mask_features"]
        targets = (
            target if isinstance(target, Targets) else find_targets(target, self.num_classes)
        )
        targets = targets._replace(label=pad_label(targets.label, size_of(features)))
        layers = [*out["aux"], out]
        logits = torch.stack([layer["pred_logits"] for layer in layers])
        embeddings = torch.stack([layer["mask_embed"] for layer in layers])
        probability = class_probabilities(logits.detach(), self.num_classes)
        matches = self.matcher(probability, embeddings, features, targets)
        of_class = self._classes(logits, matches, progress)
        mask, dice = self._masks(embeddings, features, targets, matches)
        options = self.options
        terms = {
            "loss_seesaw" if self.seesaw else "loss_ce": options.class_weight * of_class,
            "loss_mask": options.mask_weight * mask,
            "loss_dice": options.dice_weight * dice,
        }
        total = torch.stack(list(terms.values())).sum()
        suffixes = [*(f"_{i}" for i in range(len(layers) - 1)), ""]
        named = {
            f"{name}{s}": v
            for name, values in terms.items()
            for s, v in zip(suffixes, values, strict=True)
        }

        return {"loss": total, **named}

    def _classes(self, logits: Tensor, matches: Matches, progress: float) -> Tensor:
        """(L,): matched queries have their class, all others none."""
        layers, batch, queries, _ = logits.shape
        weight = None
        if self.remedies is not None:
            weight = self.remedies.weight(progress)
            logits = adjusted_queries(logits.float(), matches, self.remedies, progress)

        labels = torch.full((layers * batch * queries,), self.num_classes, device=logits.device)
        labels = labels.scatter_(0, matches.place, matches.label).view(layers, batch * queries)
        logits = logits.flatten(1, 2)
        if self.seesaw is None:
            return classification_loss(logits, labels, self.options.no_object_weight, weight)

        # The release's order, which its counts depend on: the last prediction first, then the others.
        return self.seesaw(logits.roll(1, 0), labels.roll(1, 0)).roll(-1, 0)

    def _masks(
        self, embeddings: Tensor, features: Tensor, targets: Targets, matches: Matches
    ) -> tuple[Tensor, Tensor]:
        """Summed binary cross-entropy and dice losses (L,) over their normaliser."""
        layers, batch, queries, _ = embeddings.shape
        counts = [layers * n for n in matches.per_layer]
        matched = embeddings.flatten(0, 2).index_select(0, matches.place).split(counts)
        of_image = features.unbind()
        groups = list(self._together(counts, features))
        pairs = [sum(counts[group]) for group in groups]
        labels = matches.label.split(pairs)
        images = (matches.place // queries % batch).split(pairs)
        found: list[Tensor] = []

        for group, classes, image in zip(groups, labels, images, strict=True):
            maps = torch.cat(
                [
                    masks(embedding[None], feature[None])[0]
                    for embedding, feature in zip(matched[group], of_image[group], strict=True)
                ]
            )
            losses = self._pair_losses(maps, classes, image, targets.label, counts[group])
            found += torch.stack(losses).split(counts[group], 1)

        sums = [
            each.view(2, layers, n).sum(2)
            for each, n in zip(found, matches.per_layer, strict=True)
        ]
        total = reduce(torch.add, sums)  # (2, L), image after image
        bce, dice = total / self._normalizer(targets, matches, embeddings.device)

        return bce, dice

    def _together(self, counts: Sequence[int], features: Tensor) -> Iterator[slice]:
        """Images, one after the other, whose maps and candidates of points are held at once, of `counts` pairs each."""
        values = max(int(self.options.oversample * self.options.points), features[0, 0].numel())
        limit = AT_ONCE.get(features.device.type, AT_ONCE["cuda"]) // values
        start = pairs = 0

        for image, count in enumerate(counts):
            if image > start and pairs + count > limit:
                yield slice(start, image)
                start, pairs = image, 0
            pairs += count

        yield slice(start, len(counts))

    def _pair_losses(
        self, maps: Tensor, classes: Tensor, image: Tensor, label: Tensor, counts: Sequence[int]
    ) -> tuple[Tensor, Tensor]:
        """Losses (n,) of mask logits (n, h, w) against `classes` (n,) of the label maps (B, H, W) of `image` (n,).
        counts: pairs of each image, whose points are drawn one image after the other."""
        options = self.options
        points = uncertain_points(
            maps,
            options.points,
            oversample=options.oversample,
            importance=options.importance,
            groups=counts,
        )
        truth = class_masks(label, points, classes.unsqueeze(1), image).squeeze(1)

        return point_losses(point_sample(maps.unsqueeze(1), points).squeeze(1), truth)

    def _normalizer(self, targets: Targets, matches: Matches, device: torch.device) -> Tensor:
        """Classes (or matched pairs) of the whole batch by the number of ranks, at least 1."""
        count = (
            targets.number if self.options.normalizer == "targets" else sum(matches.per_layer)
        )
        mean = distributed.all_mean(torch.full((), float(count), device=device))
        return mean.clamp(min=1)


def pad_label(label: Tensor, size: Size) -> Tensor:
    """Label maps (B, H, W) filled up with −1 to the padded input whose features have `size` at
    stride 4.

    Raises ValueError where the features do not reach over the whole label: negative padding would
    cut it.
    """
    height, width = label.shape[1:]
    down, right = STRIDE * size[0] - height, STRIDE * size[1] - width
    if down < 0 or right < 0:
        raise ValueError(
            f"labels of {height}×{width} pixels reach beyond features of {size[0]}×{size[1]} at "
            f"stride {STRIDE}; the network has to give ⌈side/{STRIDE}⌉ of them"
        )

    return F.pad(label, (0, right, 0, down), value=-1)
