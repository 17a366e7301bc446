"""USRN's subclass branch and entropy gate for networks of an encoder and a decoder, as UniMatch's are.

The branch is a second decoder, for the K subclasses, on the encoder's maps. (In USRN it has its own copy of the
backbone's later stages, too.) Where it is not the less certain of the two on the weak view, only the class of its
winner may become a label: p̃ = p if H(q) > H(p), else p ⊙ onehot(π(argmax q)), here at the size of the crop.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.config import Config
from common.models import EncoderDecoder, build_network
from semi_sup.consistency import PseudoLabels
from semi_sup.losses import entropy
from semi_sup.subclasses import chosen_counts, parents


class SubclassBranch(nn.Module):
    """A decoder like that of the config's network, with one output a subclass.

    numbers: subclasses of each class, or the name of a preset. Raises ConfigError for numbers that do not fit.
    """

    parents: Tensor

    def __init__(self, cfg: Config, numbers: str | Sequence[int]):
        super().__init__()
        counts = chosen_counts(numbers, cfg.model.num_classes, f"{cfg.name}: method.subclasses")
        like = replace(cfg.model, num_classes=sum(counts), pretrained=False, checkpoint=None)
        self.net = build_network(like, EncoderDecoder, cfg.model.name, cfg.name)  # type: ignore[type-abstract]
        self.net.backbone = nn.Identity()  # the maps are those of the network itself
        self.register_buffer("parents", parents(counts), persistent=False)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Logits (B, K, h, w) of the maps that the network's decoder reads."""
        return self.net.decode(maps)


@torch.no_grad()
def gated_labels(
    logits: Tensor, sub_logits: Tensor, parents: Tensor, shown: Tensor, gate: bool = True
) -> tuple[PseudoLabels, PseudoLabels]:
    """Labels of the classes, after the gate, and of the subclasses, both at the size of `shown` (B, H, W).

    logits: (B, C, h, w); sub_logits: (B, K, h, w); parents: class of each subclass, int64 (K,). One image is enlarged
    at a time. Without `gate` the classes' are those of `pseudo_labels`.
    """
    size = shown.shape[-2:]
    found = []

    for z, s in zip(logits.float(), sub_logits.float(), strict=True):
        z, s = (
            F.interpolate(x[None], size, mode="bilinear", align_corners=True) for x in (z, s)
        )
        p = z.softmax(1)
        confidence, label = p.max(1)
        sub_confidence, sub_label = s.softmax(1).max(1)
        if gate:
            parent = parents[sub_label]
            free = entropy(s) > entropy(z)
            label = torch.where(free, label, parent)
            confidence = torch.where(free, confidence, p.gather(1, parent[:, None])[:, 0])

        found.append((label, confidence, sub_label, sub_confidence))

    label, confidence, sub_label, sub_confidence = (
        torch.cat(x) for x in zip(*found, strict=True)
    )
    classes = PseudoLabels(label, confidence, shown)

    return classes, PseudoLabels(sub_label, sub_confidence, shown)
