"""The section `remedies` as a dataclass, and what a method says of its loss; `build.py` makes the loss of both."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from common.config.bounds import Whole
from common.losses.counts import Counts, PseudoUnit
from common.losses.cross_entropy import Average

Slot = Literal["logits", "class_weight", "focus", "sets"]
SLOTS: tuple[Slot, ...] = get_args(Slot)


@dataclass(frozen=True)
class CountsConfig:
    """of: `dataset` counts every training image once, `sampled` as often as the stream's sampler is expected to show
    it, as a whole (what crops and Copy-Paste show of it is not counted). refresh: after that many steps pseudo-labels
    count beside labels; 0: never."""

    of: Literal["dataset", "sampled"] = "dataset"
    refresh: Whole = 0


@dataclass(frozen=True)
class Remedies:
    """The section `remedies`; empty, it is plain cross-entropy.

    pseudo_prior: a network trained with logit adjustment scores classes as if they were equally frequent, so that the
    labels that it gives itself would have too many rare ones; with this, τ ln π is added back to the logits before.
    """

    logits: Mapping[str, Any] | None = None
    class_weight: Mapping[str, Any] | None = None
    focus: Mapping[str, Any] | None = None
    sets: tuple[Mapping[str, Any], ...] = ()
    counts: CountsConfig = CountsConfig()
    pseudo_prior: bool = False
    # of a network with several; the others keep cross-entropy
    heads: tuple[str, ...] = ("decode",)


@dataclass(frozen=True)
class Taken:
    """What a method takes of the section `remedies`. refused: the slots that its loss has not, and why.

    by_images: it does not classify pixels, and what remedies know as the pixels of a class is the number of images that
    show it. full_size: see LossContext. features: it gives its loss what the network's classifier reads, of a network
    that tells.
    """

    refused: Mapping[Slot, str] = field(default_factory=dict)
    by_images: bool = False
    full_size: bool = True
    features: bool = True

    def counted(self, counts: Counts) -> Counts:
        """Counts as the remedies see them."""
        return counts._replace(pixels=counts.images, area=None) if self.by_images else counts


@dataclass(frozen=True)
class LossContext:
    """What a method tells about itself. `refused`: the slots that its loss has not, and why.

    counts: of the training labels; sampled: the same as the sampler shows them. average: the pixels that a mean is
    taken over. pseudo_labels: how its pseudo-labels join the counts, None where it makes none. full_size: it makes
    logits at label size for a whole batch, which terms over regions and the choice of hard pixels may need. cosine:
    the scale of the network's cosine classifier. features: the channels of what the network's classifier reads, where
    the method gives it to the loss. labels_itself: its pseudo-labels are the answers of the network that it trains, or
    of a moving average of that. several_heads: `heads` of the section may name those that remedies act on.
    """

    counts: Counts
    average: Average = "valid"
    pseudo_labels: PseudoUnit | None = None
    full_size: bool = True
    refused: Mapping[Slot, str] = field(default_factory=dict)
    cosine: float | None = None
    features: int | None = None
    sampled: Counts | None = None
    labels_itself: bool = False
    several_heads: bool = False
