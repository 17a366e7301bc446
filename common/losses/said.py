"""What a section `remedies` chooses in vain, or twice: the texts of warnings."""

from collections.abc import Iterator, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from common.losses.blv import BLV
from common.losses.class_weights import ClassWeights
from common.losses.counts import Unit
from common.losses.equalization import Equalization
from common.losses.focal import Focal
from common.losses.ldam import LDAM
from common.losses.logit_adjustment import LogitAdjustment
from common.losses.pixel_loss import PixelLoss
from common.losses.pixel_seesaw import PixelSeesaw
from common.losses.region import RegionTerm
from common.losses.section import LossContext, Remedies, Slot

Basis = Literal[Unit, "stated"]
# the slots whose vectors are made anew of refreshed counts
BY_CLASS: tuple[Slot, ...] = ("logits", "class_weight")
# a class's share of the draws over its share of the pixels, above which a sampler counts as a remedy of its own
OVERSAMPLED = 1.5
# the options of a remedy that are all 0 where it changes nothing
STRENGTHS: dict[type, tuple[str, ...]] = {
    BLV: ("amplitude",),
    LogitAdjustment: ("tau",),
    LDAM: ("margin",),
    Equalization: ("gamma",),
    PixelSeesaw: ("p", "q"),
    Focal: ("gamma",),
}


def basis_of(remedy: Any) -> Basis | None:
    """What a remedy of the slots `logits` and `class_weight` goes by: counts of pixels or images of the training
    labels, or pixels that its own options state. None: no counts, or those of the labels that its loss has seen."""
    if remedy is None:
        return None
    if isinstance(remedy, BLV):
        if remedy.coefficient == "none":
            return None
        return "pixels" if remedy.counts == "dataset" else "stated"
    if isinstance(remedy, PixelSeesaw):
        return None if remedy.online or remedy.p == 0 else "pixels"

    return getattr(remedy, "of", "pixels")


def remarks(
    remedies: Remedies, loss: PixelLoss, context: LossContext, where: str
) -> Iterator[str]:
    """Each on one line, which begins with `where`."""
    yield from _idle(remedies, loss, where)
    yield from _idle_counts(remedies, loss, context, where)
    yield from _twice(remedies, loss, context, where)


def _idle(remedies: Remedies, loss: PixelLoss, where: str) -> Iterator[str]:
    """Of remedies that change nothing, by their options or by the counts at hand."""
    for slot in ("logits", "focus"):
        remedy = getattr(loss, slot)
        zeros = _zeros(remedy, STRENGTHS.get(type(remedy), ()))
        if zeros:
            name = getattr(remedies, slot)["name"]
            yield f"{where}.{slot}: {name} with {zeros}: it changes nothing"

    for i, (section, term) in enumerate(zip(remedies.sets, loss.sets, strict=True)):
        zeros = _zeros(term, ("weight",))
        if zeros:
            yield f"{where}.sets[{i}]: {section['name']} with {zeros}: it changes nothing"

    logits = loss.logits
    if isinstance(logits, Equalization) and logits.gamma and not loss.offsets.any():
        yield f"{where}.logits: equalization spares no class here: none is as rare as its `tail`"
    if isinstance(logits, BLV) and logits.noise == "constant" and logits.centre:
        yield f"{where}.logits: blv: centre takes noise: constant away again: it changes nothing"
    if remedies.class_weight is not None and _equal(loss.weights):
        name = remedies.class_weight["name"]
        yield f"{where}.class_weight: {name} gives every class the same weight here: it changes nothing"


def _zeros(remedy: Any, names: Sequence[str]) -> str:
    """These options of a remedy where all are 0, so that it changes nothing; else empty."""
    if any(getattr(remedy, name) for name in names):
        return ""
    # BLV as released also averages over other pixels
    if getattr(remedy, "average", None) is not None:
        return ""

    return " and ".join(f"{name}: 0" for name in names)


def _idle_counts(
    remedies: Remedies, loss: PixelLoss, context: LossContext, where: str
) -> Iterator[str]:
    """Of options of `counts` that no remedy reads."""
    bases = {basis_of(loss.logits), basis_of(loss.class_weight)}
    if remedies.counts.refresh and bases.isdisjoint({"pixels", "stated"}):
        weights = loss.class_weight
        # by images, but Σ π w = 1 over pixels
        scaled = isinstance(weights, ClassWeights) and weights.normalise == "expected"
        changed = "all class weights alike, and nothing else" if scaled else "nothing"
        yield f"{where}.counts.refresh: no remedy that is chosen goes by counts of pixels: it changes {changed}"

    if remedies.counts.of == "dataset" or context.sampled is None:
        return
    if any(isinstance(term, RegionTerm) for term in loss.sets):
        bases.add("images")
    if bases.isdisjoint({"pixels", "images"}):
        text = "sampled, but no remedy that is chosen goes by counts of the training labels: it changes nothing"
        yield f"{where}.counts.of: {text}"
    elif torch.allclose(context.sampled.pixels, context.counts.pixels):
        yield f"{where}.counts.of: sampled changes nothing here: the sampler shows all images alike"


def _twice(
    remedies: Remedies, loss: PixelLoss, context: LossContext, where: str
) -> Iterator[str]:
    """Of what corrects for rarity beside something else that does: another remedy, or a sampler of which the loss does
    not know."""
    correcting = {}
    if remedies.class_weight is not None and not _equal(loss.weights):
        correcting["class_weight"] = remedies.class_weight["name"]
    logits = loss.logits
    if remedies.logits is not None and isinstance(logits, LogitAdjustment) and logits.tau:
        correcting["logits"] = remedies.logits["name"]
    if len(correcting) == 2:
        yield f"{where}: logits and class_weight both correct for class frequency: rare classes gain twice"

    if context.sampled is None or remedies.counts.of == "sampled":
        return
    before, after = context.counts.prior(), context.sampled.prior()
    shown = before > 0
    more = float((after[shown] / before[shown]).max())
    if correcting and more > OVERSAMPLED:
        names = ", ".join(f"{slot}: {name}" for slot, name in correcting.items())
        yield (
            f"{where}: the sampler shows a class up to {more:.1f} times as often, and {names} goes by the "
            "data set's counts: rare classes gain twice; counts.of: sampled goes by what is shown"
        )


def _equal(weights: Tensor) -> bool:
    return float(weights.max() - weights.min()) < 1e-3 * float(weights.max())
