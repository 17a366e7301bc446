"""Matching of queries to the classes of an image: Hungarian (Mask2Former), and the paper's Frequency-based Matcher.

The cost of giving query q to class t weighs the class probability and, at points shared by all queries of an image,
the binary cross-entropy and the dice loss of their masks. One-to-one matching leaves tail classes short of positive
queries; the Frequency-based Matcher (LTSS, TMM 2024) lets a class of image frequency f have

    q_c = ⌈max(1, S · √(T / f_c))⌉

queries: its column is repeated q_c times in the assignment.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import ArrayLike
from torch import Tensor

from common.distributed import to_device
from common.lazy import Lazy
from common.models.mask2former.decoder import masks
from common.ops.point_sample import class_masks, point_sample

optimize = Lazy("scipy.optimize")

# mask values of what is worked through at once, layers here and images in the criterion: what the cache holds some of,
# or 256 MiB
AT_ONCE = {"cpu": 1 << 22, "cuda": 1 << 26}


class Targets(NamedTuple):
    """The classes of every image of a batch; each is one mask, its pixels in the label map."""

    label: Tensor  # (B, H, W), −1 where ignored
    classes: list[list[int]]  # of each image, ascending; on the host
    padded: Tensor  # (B, T) the same on the label's device, filled up with −1

    @property
    def number(self) -> int:
        """Classes of all images together."""
        return sum(len(classes) for classes in self.classes)


class Matches(NamedTuple):
    """Matched pairs of all layers: image after image, in an image layer after layer; tensors on the device, (N,)."""

    place: Tensor  # (layer · B + image) · Q + query
    label: Tensor  # class
    per_layer: list[int]  # pairs of each image in each of the layers


@dataclass(frozen=True)
class MatchWeights:
    """Weights of the cost terms."""

    classes: float = 2.0
    mask: float = 5.0
    dice: float = 5.0


def find_targets(label: Tensor, num_classes: int) -> Targets:
    """The classes of label maps (B, H, W), −1 where ignored. The host waits for a copy of B · K bits, and so for all
    that the labels' GPU was given before."""
    flat = label.flatten(1).long() + 1
    present = torch.zeros(len(label), num_classes + 1, dtype=torch.bool, device=label.device)
    present.scatter_(1, flat, True)
    classes = [np.flatnonzero(row).tolist() for row in present[:, 1:].cpu().numpy()]
    width = max(map(len, classes), default=0)
    padded = torch.tensor(
        [row + [-1] * (width - len(row)) for row in classes], dtype=torch.int64
    )

    return Targets(label, classes, to_device(padded.view(len(classes), width), label.device))


def queries_per_class(frequency: ArrayLike, threshold: float, scale: float = 2.0) -> np.ndarray:
    """Number of queries (K,) of each class: ⌈max(1, scale · √(threshold / f))⌉, and 1 for a class never seen.

    Args:
        frequency: share of the training images that hold each class.
        threshold, scale: T and S.
    """
    shares = np.asarray(frequency, dtype=np.float64)
    seen = shares > 0
    ratio = threshold / np.where(seen, shares, 1.0)
    numbers = np.ceil(np.maximum(1.0, scale * np.sqrt(ratio)))

    return np.where(seen, numbers, 1.0).astype(np.int64)


def match_costs(
    probability: Tensor,
    mask_logits: Tensor,
    target_masks: Tensor,
    classes: Tensor,
    weights: MatchWeights,
) -> Tensor:
    """Costs (B, Q, T) in float32, under autocast too: sums over thousands of points overflow half precision.

    Args:
        probability: (B, Q, K) class probabilities.
        mask_logits: (B, Q, P) at the points; target_masks (B, T, P) at the same points.
        classes: (B, T) of the targets; any value in columns that are padding.
    """
    x = mask_logits.float()
    t = target_masks.float().transpose(1, 2)
    of_class = -probability.gather(
        2, classes.clamp(min=0).unsqueeze(1).expand(-1, probability.shape[1], -1)
    )

    with torch.autocast(x.device.type, enabled=False):
        # of each pair: Σ softplus(x) − x·t
        cross_entropy = (F.softplus(x).sum(2, keepdim=True) - x @ t) / x.shape[2]
        sigmoid = x.sigmoid()
        dice = 1 - (2 * (sigmoid @ t) + 1) / (
            sigmoid.sum(2, keepdim=True) + t.sum(1, keepdim=True) + 1
        )

    return weights.classes * of_class + weights.mask * cross_entropy + weights.dice * dice


def assign(cost: np.ndarray, copies: ArrayLike | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Queries and targets (n,) of the cheapest assignment of a cost matrix (Q, T), sorted by query.

    Args:
        copies: queries that each target asks for; default one each. Where they ask for more than Q in all, second
            and later copies are given up, the highest first, so that no target goes without; of more than Q targets
            the cheapest Q are served.
    """
    targets = np.arange(cost.shape[1])
    if copies is not None:
        repeats = np.asarray(copies)
        number = np.concatenate([np.arange(n) for n in repeats]) if len(repeats) else targets
        targets = np.repeat(targets, repeats)[np.argsort(number, kind="stable")]
        targets = targets[: max(cost.shape)]

    query, column = optimize.linear_sum_assignment(cost[:, targets])
    return query, targets[column]


class Matcher:
    """Pairs of all predictions of a batch, from one host copy of their costs.

    Args:
        weights: of the cost terms.
        points: points an image and layer.
        copies: (K,) queries of each class (`queries_per_class`); None for one-to-one matching.
    """

    def __init__(
        self,
        weights: MatchWeights | None = None,
        points: int = 12544,
        copies: np.ndarray | None = None,
    ):
        self.weights = weights or MatchWeights()
        self.points = points
        self.copies = copies

    @torch.no_grad()
    def __call__(
        self, probability: Tensor, embeddings: Tensor, mask_features: Tensor, targets: Targets
    ) -> Matches:
        """Match probability (L, B, Q, K) and embeddings (L, B, Q, d) on mask features (B, d, h, w) to `targets`.

        Every layer and image has its own points, uniform in the label map; as many layers are worked through at once
        as memory allows. ValueError for costs that are not finite.
        """
        if targets.padded.shape[1] == 0:
            none = targets.padded.new_empty(0)
            return Matches(none, none, [0] * len(targets.classes))

        layers, batch, queries, _ = embeddings.shape
        points = torch.rand(layers, batch, self.points, 2, device=embeddings.device)
        values = batch * queries * max(self.points, mask_features[0, 0].numel())  # of a layer
        limit = AT_ONCE.get(embeddings.device.type, AT_ONCE["cuda"])
        size = max(limit // values, 1)
        groups = zip(
            probability.split(size), embeddings.split(size), points.split(size), strict=True
        )
        costs = [self._costs(p, e, x, mask_features, targets) for p, e, x in groups]

        return self._assign(torch.cat(costs).cpu().numpy(), targets)

    def _costs(
        self,
        probability: Tensor,
        embeddings: Tensor,
        points: Tensor,
        mask_features: Tensor,
        targets: Targets,
    ) -> Tensor:
        """Costs (n, B, Q, T) of n layers at points (n, B, P, 2): their pairs of image and layer are one batch, image
        after image, so that one product with an image's features makes the masks of all its layers."""
        layers, batch, queries, _ = embeddings.shape
        every = masks(embeddings.transpose(0, 1).flatten(1, 2), mask_features)
        every = every.unflatten(1, (layers, queries)).flatten(0, 1)
        probability, points = (x.transpose(0, 1).flatten(0, 1) for x in (probability, points))
        classes = targets.padded.repeat_interleave(layers, 0)
        image = torch.arange(batch, device=points.device).repeat_interleave(layers)
        truth = class_masks(targets.label, points, classes, image)
        costs = match_costs(
            probability, point_sample(every, points), truth, classes, self.weights
        )

        return costs.unflatten(0, (batch, layers)).transpose(0, 1)

    def _assign(self, costs: np.ndarray, targets: Targets) -> Matches:
        layers, batch, queries, _ = costs.shape
        places = []
        labels = []
        per_layer = []

        for image, present in enumerate(targets.classes):
            classes = np.array(present, dtype=np.int64)
            copies = None if self.copies is None else self.copies[classes]

            for layer in range(layers):
                cost = costs[layer, image, :, : len(classes)]
                if not np.isfinite(cost).all():
                    raise ValueError(
                        f"matching cost of image {image}, prediction {layer} is not finite: the network's outputs are "
                        "NaN or infinite, mostly because the learning rate is too high"
                    )

                query, target = assign(cost, copies)
                places.append((layer * batch + image) * queries + query)
                labels.append(classes[target])

            per_layer.append(len(query))

        pairs = torch.from_numpy(np.stack([np.concatenate(places), np.concatenate(labels)]))
        place, label = to_device(pairs, targets.padded.device)

        return Matches(place, label, per_layer)
