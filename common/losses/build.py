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
from typing import Any

import torch

from common.config import ConfigError, pick, typed
from common.losses.auc import AUC
from common.losses.blv import BLV, PRESETS
from common.losses.class_weights import EffectiveNumber, MedianFrequency, Power
from common.losses.counts import Counts, RefreshedCounts
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
from common.losses.said import BY_CLASS, Basis, basis_of, remarks
from common.losses.section import SLOTS, CountsConfig, LossContext, Remedies, Slot, Taken


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
    for text in remarks(remedies, loss, context, where):
        warnings.warn(text, stacklevel=2)

    return loss


def goes_by_pixels(remedies: Mapping[str, Any], *, stated: bool = False) -> bool:
    """Whether counts of the pixels of pseudo-labels would change how a remedy of the section treats one class beside
    another, by its text alone. What is not to be read counts as one that does, so that `build_loss` refuses it.

    stated: also a remedy whose counts the section gives, which pseudo-labels join where `counts.refresh` is set.
    """
    known = {"pixels", "stated"} if stated else {"pixels"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # `build_loss` says what is chosen in vain
        return any(_basis(remedies.get(slot), slot) in known for slot in BY_CLASS)


def _basis(section: Any, slot: Slot) -> Basis | None:
    """What the remedy of a slot goes by, see `basis_of`."""
    if not section:
        return None
    if not isinstance(section, Mapping):
        return "pixels"
    try:
        return basis_of(_read(section, slot, slot))
    except ConfigError:
        return "pixels"


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

    return _read(section, slot, where)


def _read(section: Mapping[str, Any], slot: Slot, where: str) -> Any:
    """The dataclass of one remedy. ConfigError for an unknown name or option."""
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


__all__ = [
    "LOSSES",
    "PRESETS",
    "LossContext",
    "Remedies",
    "Slot",
    "Taken",
    "build_loss",
    "goes_by_pixels",
]
