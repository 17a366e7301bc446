"""A training step of USRN as the release writes it: what `semi_sup.usrn.USRN` is measured against.

The network runs three times with a graph, on labelled images, strong and weak view; the logits of both branches are
enlarged to the labels' size; the gate makes p̃; one backward of the sum.
"""

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from common.engine.method import Batch, Losses
from semi_sup.usrn import USRN


class LiteralUSRN(USRN):
    """The same networks and options, of which only `threshold` is read: weights 1, no teacher, no masks, no BLV."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.backwards = 1

    def forward(self, streams: Mapping[str, Batch], step: int) -> Losses:
        labeled, unlabeled = streams["labeled"], streams["unlabeled"]
        logits, sub_logits = self.both(self.features(labeled["image"]))
        terms = {"Ls": full_size(logits, labeled["label"]), "Ls_sub": full_size(sub_logits, labeled["sub_label"])}
        logits, sub_logits = self.both(pooled(self.features(unlabeled["strong"])))
        weak = self.both(pooled(self.features(unlabeled["weak"])))
        label, sub_label = pseudo_labels(*weak, self.parents, self.options.threshold)
        terms |= {"Lu_sub": confident(sub_logits, *sub_label), "Lu_reg": confident(logits, *label)}
        return {**terms, "loss": sum(terms.values())}

    def features(self, images: Tensor) -> list[Tensor]:
        return list(self.model.encode(self.model.normalise(images)))

    def both(self, features: list[Tensor]) -> tuple[Tensor, Tensor]:
        return self.model.classifier(features[0]), self.model.classifier_SubCls(features[1])


def full_size(logits: Tensor, label: Tensor) -> Tensor:
    large = F.interpolate(logits, label.shape[-2:], mode="bilinear", align_corners=True)
    return F.cross_entropy(large, label.long(), ignore_index=-1)


def pooled(features: list[Tensor]) -> list[Tensor]:
    """Stride 4 to stride 8."""
    return [F.avg_pool2d(x, 2) for x in features]


def entropy(p: Tensor) -> Tensor:
    return -(p * torch.log2(p + 1e-30)).sum(1) / math.log2(p.shape[1])


def pseudo_labels(logits: Tensor, sub_logits: Tensor, parents: Tensor, threshold: float) -> list[tuple[Tensor, Tensor]]:
    """Label and mask of the classes after the gate, and of the subclasses."""
    p, q = logits.softmax(1), sub_logits.softmax(1)
    certainty, sub_label = q.max(1)
    only = F.one_hot(parents[sub_label], p.shape[1]).permute(0, 3, 1, 2)
    gated = torch.where((entropy(q) > entropy(p))[:, None], p, p * only)
    confidence, label = gated.max(1)
    return [(label, confidence > threshold), (sub_label, certainty > threshold)]


def confident(logits: Tensor, label: Tensor, mask: Tensor) -> Tensor:
    return (F.cross_entropy(logits, label, reduction="none") * mask).mean()
