"""Training steps of UniMatch and UniMatch V2 as the releases write them: what `semi_sup` is measured against.

Every logit is enlarged to the crop's size, the whole batch at once; the losses are of all pixels, masked; one backward
of the sum.
"""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from common.engine.method import Batch, Losses
from semi_sup import consistency
from semi_sup.consistency import in_boxes
from semi_sup.unimatch import UniMatch
from semi_sup.unimatch_v2 import UniMatchV2


class LiteralUniMatch(UniMatch):
    """The same network and options, of which `threshold` alone is read: two views, perturbed, with a second crop."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.backwards = 1

    def forward(self, streams: Mapping[str, Batch], step: int) -> Losses:
        x, u = streams["labeled"], streams["unlabeled"]
        size = x["label"].shape[-2:]
        with torch.no_grad():
            self.model.eval()
            partner = judged(large(self.model.decode(self.encode(u["partner_weak"])), size), u["partner_shown"])
            self.model.train()

        maps = self.encode(torch.cat((x["image"], u["weak"])))
        dropped = consistency.channel_dropout(maps)
        logits = large(self.model.decode([torch.cat(pair) for pair in zip(maps, dropped, strict=True)]), size)
        clean, perturbed = logits.chunk(2)
        labelled, weak = clean.chunk(2)
        perturbed = perturbed.chunk(2)[1]

        labels = judged(weak.detach(), u["shown"])
        pasted = [in_boxes(u[f"box{view}"], size) for view in (1, 2)]
        images = [
            torch.where(inside[:, None], u[f"partner_strong{view}"], u[f"strong{view}"])
            for view, inside in enumerate(pasted, 1)
        ]
        strong = large(self.model.decode(self.encode(torch.cat(images))), size).chunk(2)
        threshold = self.options.threshold
        losses = [masked(z, mixed(labels, partner, m), threshold) for z, m in zip(strong, pasted, strict=True)]

        terms = {"Lx": F.cross_entropy(labelled, x["label"].long(), ignore_index=-1)}
        terms |= {"Lfp": masked(perturbed, labels, threshold), "Ls": sum(losses) / 2}
        kept = ((labels[1] >= threshold) & labels[2]).sum() / labels[2].sum()
        return {**terms, "loss": (terms["Lx"] + terms["Ls"] / 2 + terms["Lfp"] / 2) / 2, "kept": kept}


class LiteralUniMatchV2(UniMatchV2):
    """The same networks and options, of which only `threshold` is read: two views with complementary channels."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.backwards = 1

    def forward(self, streams: Mapping[str, Batch], step: int) -> Losses:
        x, u = streams["labeled"], streams["unlabeled"]
        size = x["label"].shape[-2:]
        with torch.no_grad():
            net = self.teacher.eval()
            labels = judged(large(net.decode(net.encode(net.normalise(u["weak"]))), size), u["shown"])
        labelled = large(self.model.decode(self.encode(x["image"])), size)

        partner = tuple(value.flip(0) for value in labels)
        pasted = [in_boxes(u[f"box{view}"], size) for view in (1, 2)]
        images = [
            torch.where(inside[:, None], u[f"strong{view}"].flip(0), u[f"strong{view}"])
            for view, inside in enumerate(pasted, 1)
        ]
        maps = self.encode(torch.cat(images))
        masks = consistency.complementary_masks(len(x["image"]), maps[0].shape[1], maps[0])
        strong = large(self.model.decode([m * masks for m in maps]), size).chunk(2)
        threshold = self.options.threshold
        losses = [masked(z, mixed(labels, partner, m), threshold) for z, m in zip(strong, pasted, strict=True)]

        terms = {"Lx": F.cross_entropy(labelled, x["label"].long(), ignore_index=-1), "Ls": sum(losses) / 2}
        kept = ((labels[1] >= threshold) & labels[2]).sum() / labels[2].sum()
        return {**terms, "loss": (terms["Lx"] + terms["Ls"]) / 2, "kept": kept}


Judged = tuple[Tensor, Tensor, Tensor]  # label, confidence, what is no padding


def large(logits: Tensor, size: torch.Size) -> Tensor:
    return F.interpolate(logits, size, mode="bilinear", align_corners=True)


def judged(logits: Tensor, shown: Tensor) -> Judged:
    confidence, label = logits.softmax(1).max(1)
    return label, confidence, shown


def mixed(labels: Judged, partner: Judged, inside: Tensor) -> list[Tensor]:
    return [torch.where(inside, theirs, ours) for ours, theirs in zip(labels, partner, strict=True)]


def masked(logits: Tensor, labels: Judged | list[Tensor], threshold: float) -> Tensor:
    label, confidence, shown = labels
    loss = F.cross_entropy(logits, label, reduction="none")
    return (loss * ((confidence >= threshold) & shown)).sum() / shown.sum()
