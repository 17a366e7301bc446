"""LOSSES: every remedy of the training loss by name, and `build_loss`, which reads the section `remedies`.

    remedies:
      logits: {name: logit_adjustment, tau: 1.0}          # changes the logits; one
      class_weight: {name: inverse}                       # weighs a pixel by its class; one
      focus: {name: focal, gamma: 2.0}                    # weighs or chooses pixels by their loss; one
      sets: [{name: lovasz, weight: 1.0}]                 # terms over whole regions, beside the pixel loss; any number
      counts: {of: dataset, refresh: 1000}                # of whom; steps between new counts of pseudo-labels
      pseudo_prior: true                                  # see `Remedies`

A new loss is one file with a frozen dataclass of its options that does what its slot asks for (see the protocols of
`slots.py`), and one row of LOSSES.
"""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from common.config import ConfigError, pick, typed
from common.config.bounds import Whole
from common.losses.auc import AUC
from common.losses.blv import BLV, PRESETS
from common.losses.class_weights import EffectiveNumber, MedianFrequency, Power
from common.losses.counts import Counts, PseudoUnit, RefreshedCounts
from common.losses.cross_entropy import Average
from common.losses.equalization import Equalization
from common.losses.focal import PAT, Focal
from common.losses.hard_pixel import HardPixels
from common.losses.ldam import LDAM
from common.losses.logit_adjustment import LogitAdjustment
from common.losses.lovasz import Lovasz
from common.losses.overlap import Dice, Tversky
from common.losses.pixel_loss import PixelLoss
from common.losses.pixel_seesaw import PixelSeesaw
from common.losses.region import Region

Slot = Literal["logits", "class_weight", "focus", "sets"]
SLOTS: tuple[Slot, ...] = get_args(Slot)
# a class's share of the draws over its share of the pixels, above which a sampler counts as a remedy of its own
OVERSAMPLED = 1.5


@dataclass(frozen=True)
class Row:
    """A remedy: its slot, the dataclass that types its options and does its work, and options that the name fixes."""

    slot: Slot
    remedy: type
    fixed: Mapping[str, Any] = field(default_factory=dict)


LOSSES: dict[str, Row] = {
    "blv": Row("logits", BLV),
    "gcl": Row("logits", BLV, {"preset": "gcl"}),
    "logit_adjustment": Row("logits", LogitAdjustment),
    "balanced_softmax": Row("logits", LogitAdjustment, {"tau": 1.0}),
    "ldam": Row("logits", LDAM),
    "equalization": Row("logits", Equalization),
    "seesaw": Row("logits", PixelSeesaw),
    "inverse": Row("class_weight", Power, {"rho": 1.0}),
    "sqrt": Row("class_weight", Power, {"rho": 0.5}),
    "power": Row("class_weight", Power),
    "median_frequency": Row("class_weight", MedianFrequency),
    "effective_number": Row("class_weight", EffectiveNumber),
    "focal": Row("focus", Focal),
    "pat": Row("focus", PAT),
    "hard_pixels": Row("focus", HardPixels),
    "lovasz": Row("sets", Lovasz),
    "dice": Row("sets", Dice),
    "tversky": Row("sets", Tversky),
    "auc": Row("sets", AUC),
    "region": Row("sets", Region),
}


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


def build_loss(
    section: Mapping[str, Any], context: LossContext, where: str = "remedies"
) -> PixelLoss:
    """The loss that the section `remedies` describes. ConfigError (one line) for what is unknown or does not fit.

    where: begins the messages, e.g. "run: remedies".
    """
    remedies = typed(Remedies, section, where)
    chosen = {
        "logits": _remedy(remedies.logits, "logits", context, where),
        "class_weight": _remedy(remedies.class_weight, "class_weight", context, where),
        "focus": _remedy(remedies.focus, "focus", context, where),
        "sets": [_remedy(item, "sets", context, where) for item in remedies.sets],
    }
    _check(remedies, chosen, context, where)
    labelled = _labelled(remedies.counts, context, f"{where}.counts.of")
    chosen["sets"] = [_made(term, labelled, context.features) for term in chosen["sets"]]
    average = context.average
    if isinstance(chosen["logits"], BLV):
        labelled = chosen["logits"].counted(labelled)
        average = chosen["logits"].average or average

    counts = RefreshedCounts(
        labelled, remedies.counts.refresh, context.pseudo_labels or "pixels"
    )
    loss = PixelLoss(counts, average, pseudo_prior=remedies.pseudo_prior, **chosen)
    _check_finite(loss, where)
    _warn(remedies, loss, where)
    _warn_of_sampler(remedies, loss, context, where)

    return loss


def _remedy(
    section: Mapping[str, Any] | None, slot: Slot, context: LossContext, where: str
) -> Any:
    """The dataclass of one remedy; None where the slot is empty."""
    if section is None:
        return None

    where = f"{where}.{slot}"
    if slot in context.refused:
        slots = ", ".join(each for each in SLOTS if each not in context.refused) or "none"
        raise ConfigError(
            f"{where}: this method's loss has no such slot ({context.refused[slot]}); it has: {slots}"
        )

    options = dict(section)
    name = options.pop("name", None)
    known = {key: row for key, row in LOSSES.items() if row.slot == slot}
    row = pick(known, name, f"{where}.name")
    both = sorted(row.fixed.keys() & options.keys())
    if both:
        raise ConfigError(
            f"{where}.{both[0]}: {name} fixes it to {row.fixed[both[0]]!r}; remove the key"
        )

    make = getattr(row.remedy, "from_section", None)
    options = {**row.fixed, **options}

    return make(options, where) if make else typed(row.remedy, options, where)


def _labelled(chosen: CountsConfig, context: LossContext, where: str) -> Counts:
    """The counts that the remedies go by. ConfigError where nobody says what the sampler shows."""
    if chosen.of == "dataset":
        return context.counts
    if context.sampled is None:
        raise ConfigError(
            f"{where}: sampled, but this loss is not told what is sampled; set it to dataset"
        )

    if torch.allclose(context.sampled.pixels, context.counts.pixels):
        text = "sampled changes nothing here: the sampler shows all images alike"
        warnings.warn(f"{where}: {text}", stacklevel=4)

    return context.sampled


def _made(term: Any, counts: Counts, features: int | None) -> Any:
    """A term over regions, with its own weights where it has any."""
    if not isinstance(term, Region) or features is None:
        return term
    return term.term(counts, features)


def _check(
    remedies: Remedies, chosen: Mapping[str, Any], context: LossContext, where: str
) -> None:
    """ConfigError for what the method or the network cannot do."""
    if remedies.counts.refresh and context.pseudo_labels is None:
        raise ConfigError(
            f"{where}.counts.refresh: {remedies.counts.refresh}, but this method makes no pseudo-labels; remove it"
        )

    if remedies.heads != Remedies.heads and not context.several_heads:
        raise ConfigError(
            f"{where}.heads: {', '.join(remedies.heads) or 'none'}, but in this method remedies act on one head alone; "
            "remove it"
        )

    if remedies.pseudo_prior:
        _check_pseudo_prior(chosen["logits"], context, f"{where}.pseudo_prior")
    if remedies.logits is not None:
        scale = getattr(chosen["logits"], "scale", None)
        _check_classifier(remedies.logits["name"], scale, context.cosine, f"{where}.logits")

    for i, term in enumerate(chosen["sets"]):
        if isinstance(term, Region) and context.features is None:
            raise ConfigError(
                f"{where}.sets[{i}]: region needs the features that a 1×1 classifier of pixels reads, which this loss "
                "is not given; remove it"
            )
    if context.full_size:
        return
    if isinstance(chosen["focus"], HardPixels):
        raise ConfigError(
            f"{where}.focus: hard_pixels needs the losses of a whole batch, which this method never has"
        )

    for i, term in enumerate(chosen["sets"]):
        if term.at != "network":
            raise ConfigError(
                f"{where}.sets[{i}].at: {term.at!r} is not to be had in this method; set it to network"
            )


def _check_pseudo_prior(logits: Any, context: LossContext, where: str) -> None:
    """ConfigError where there are no pseudo-labels to correct, or nothing to correct them by."""
    if not context.labels_itself:
        raise ConfigError(
            f"{where}: this method learns no labels that its own network gives; remove it"
        )
    if not isinstance(logits, LogitAdjustment):
        raise ConfigError(
            f"{where}: only logits logit_adjustment and balanced_softmax have a prior to add back; choose one of them, "
            "or remove it"
        )


def _check_classifier(name: str, wanted: float | None, given: float | None, where: str) -> None:
    """ConfigError where a remedy is stated for a cosine classifier of one scale, and the network has none of it."""
    if wanted is None:
        return

    if given is None:
        raise ConfigError(
            f"{where}.name: {name} needs a cosine classifier, which its size is stated for; set "
            "model.options.classifier: cosine, of a network that classifies pixels"
        )
    if given != wanted:
        raise ConfigError(
            f"{where}.scale: {name} is for a cosine classifier of scale {wanted:g}, and model.options.scale is "
            f"{given:g}; make them equal"
        )


def _check_finite(loss: PixelLoss, where: str) -> None:
    """ConfigError for strengths whose numbers float32 cannot hold: the loss would be NaN, whatever is learnt."""
    for slot, values in (("class_weight", loss.weights), ("logits", loss.offsets)):
        known = values is not None and not values.is_meta
        if known and not torch.isfinite(values).all():
            raise ConfigError(
                f"{where}.{slot}: its strength makes numbers that are not finite of these counts; lower it"
            )


def _warn_of_sampler(
    remedies: Remedies, loss: PixelLoss, context: LossContext, where: str
) -> None:
    """Say where a sampler that shows rare classes more often meets a loss that does not know of it."""
    if context.sampled is None or remedies.counts.of == "sampled":
        return

    both = [("class_weight", remedies.class_weight)]
    if isinstance(loss.logits, LogitAdjustment):
        both.append(("logits", remedies.logits))
    names = [f"{slot}: {section['name']}" for slot, section in both if section is not None]
    before, after = context.counts.prior(), context.sampled.prior()
    shown = before > 0
    more = float((after[shown] / before[shown]).max())
    if names and more > OVERSAMPLED:
        text = (
            f"{where}: the sampler shows a class up to {more:.1f} times as often, and {', '.join(names)} goes by the "
            "data set's counts: rare classes gain twice; counts.of: sampled goes by what is shown"
        )
        warnings.warn(text, stacklevel=3)


def _warn(remedies: Remedies, loss: PixelLoss, where: str) -> None:
    """Say what is chosen in vain, or twice."""
    if isinstance(loss.logits, Equalization) and not loss.offsets.any():
        text = (
            f"{where}.logits: equalization spares no class here: none is as rare as its `tail`"
        )
        warnings.warn(text, stacklevel=3)

    if remedies.class_weight is not None and _equal(loss.weights):
        name = remedies.class_weight["name"]
        text = f"{where}.class_weight: {name} gives every class the same weight here: it changes nothing"
        warnings.warn(text, stacklevel=3)

    blv = loss.logits
    if isinstance(blv, BLV) and blv.noise == "constant" and blv.centre:
        text = (
            f"{where}.logits: blv: centre takes noise: constant away again: it changes nothing"
        )
        warnings.warn(text, stacklevel=3)

    by_counts = remedies.logits is not None and loss.seen is None
    if remedies.counts.refresh and not by_counts and remedies.class_weight is None:
        text = f"{where}.counts.refresh: no remedy that is chosen goes by counts: it changes nothing"
        warnings.warn(text, stacklevel=3)

    if isinstance(loss.logits, LogitAdjustment) and loss.class_weight is not None:
        text = f"{where}: logits and class_weight both correct for class frequency: rare classes gain twice"
        warnings.warn(text, stacklevel=3)


def _equal(weights: Tensor) -> bool:
    return float(weights.max() - weights.min()) < 1e-3 * float(weights.max())


__all__ = ["LOSSES", "PRESETS", "LossContext", "Remedies", "build_loss"]
