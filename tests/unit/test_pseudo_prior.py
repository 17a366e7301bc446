"""`remedies.pseudo_prior`: labels that a network trained with logit adjustment gives itself are those of z + τ ln π."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from common.config import Config, ConfigError, TrainConfig
from common.losses.build import LossContext, build_loss
from common.ops.resize import size_of
from semi_sup.config import METHODS as SEMI_SUP
from tests.contexts import context
from tests.unit import test_u2pl, test_unimatch_method, test_usrn_method
from tests.unit.remedy_examples import COUNTS, example, section
from tests.unit.test_models import SMALL
from uda.train import METHODS as UDA

PIXELS = (9000, 600, 300, 90, 10)
TAU = 0.7
ADJUSTED = {"logits": {"name": "logit_adjustment", "tau": TAU}}
NO_DISTANCE = {"feature_distance": {"weight": 0.0}, "threshold": 0.3}
SUBCLASSES = test_usrn_method.COUNTS
USRN = replace(SMALL["usrn"], options={**SMALL["usrn"].options, "subclasses": sum(SUBCLASSES)})
NETWORKS = {**SMALL, "usrn": USRN}
CASES = {  # network, options of the method
    "usrn": ("usrn", {"subclasses": SUBCLASSES, "threshold": 0.3, "gate": False}),
    "self_training": ("deeplabv3plus", {"threshold": 0.3}),
    "unimatch": ("deeplabv3plus_unimatch", {}),
    "unimatch_v2": ("dpt", {}),
    "daformer": ("daformer", NO_DISTANCE),
    "hrda": ("hrda", NO_DISTANCE),
    "mic": ("daformer", NO_DISTANCE),
}


def built(name, remedies):
    network, options = CASES[name]
    torch.manual_seed(0)
    table = UDA if name in UDA else SEMI_SUP
    cfg = Config(
        NETWORKS[network], method={"name": name, **options}, remedies=remedies, train=TrainConfig(10), name="run"
    )
    return table[name](cfg, context(PIXELS)).train()


def spied(method):
    """The logits that the method's pseudo-labels are made of, as they come."""
    seen, give = [], method.loss.with_prior
    method.loss.with_prior = lambda logits: seen.append(logits) or give(logits)
    return seen


def labelled(name, method):
    """What the method learns of unlabelled images in a step, and the logits at the labels' size that it was made of.

    (label, certainty) of usrn: the labels, without certainty; of DAFormer: the labels, and the share of sure pixels.
    """
    seen, found = spied(method), []
    if name in UDA:
        target = {"image": torch.randint(0, 256, (2, 3, 96, 128), dtype=torch.uint8)}
        label, weight = method.look(method.teacher, method.model.normalise(target["image"]), target)
        corners = method.model.align_corners
        return label, weight, F.interpolate(seen[0], size_of(label), mode="bilinear", align_corners=corners)

    unimatch = name.startswith("unimatch")
    streams = (test_unimatch_method if unimatch else test_usrn_method).batches()
    method.count = lambda *given: found.append(given[0]) or {}
    for part in method(streams, 0):
        part["loss"].backward()

    if not unimatch:
        return found[0], None, seen[0]
    labels = found[0].classes
    z = F.interpolate(seen[-1], size_of(labels.label), mode="bilinear", align_corners=True)
    return labels.label, labels.confidence, z


@pytest.mark.parametrize("name", CASES)
def test_labels_are_those_of_the_prior_added_back(name):
    method = built(name, {**ADJUSTED, "pseudo_prior": True})
    label, certainty, logits = labelled(name, method)
    prior = torch.tensor(PIXELS) / sum(PIXELS)
    probability = (logits + TAU * prior.log().view(-1, 1, 1)).softmax(1)
    best, expected = probability.max(1)
    assert not torch.equal(expected, logits.argmax(1))
    if name in ("usrn", "self_training"):
        expected = torch.where(best > 0.3, expected, -1)
    assert (label == expected).float().mean() > 0.999  # equal but for rounding at ties

    if name.startswith("unimatch"):
        torch.testing.assert_close(certainty, best, rtol=1e-4, atol=1e-5)
    if name in UDA:
        share = (best >= 0.3).float().mean()
        torch.testing.assert_close(certainty, share.expand_as(certainty), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", CASES)
def test_without_it_labels_are_those_of_the_logits(name):
    method = built(name, ADJUSTED)
    label, _, logits = labelled(name, method)
    expected = logits.argmax(1)
    if name in ("usrn", "self_training"):
        expected = torch.where(logits.softmax(1).amax(1) > 0.3, expected, -1)
    assert (label == expected).float().mean() > 0.999
    z = torch.randn(1, 5, 2, 2)
    assert method.loss.with_prior(z) is z


def test_u2pl_labels_and_drops_by_it():
    prior = torch.tensor(PIXELS[::-1]) / sum(PIXELS)
    method = test_u2pl.method(remedies={**ADJUSTED, "pseudo_prior": True}, cutmix=False)
    method.loss.offsets.copy_(TAU * prior.log())
    seen, batch = spied(method), test_u2pl.batches()["unlabeled"]
    label = method.mixed(batch).label
    entropy = method.certainty(batch["image"])
    answers = [F.interpolate(z, size_of(label), mode="bilinear", align_corners=True) for z in seen]
    adjusted = [z + TAU * prior.log().view(-1, 1, 1) for z in answers]
    assert (label == adjusted[0].argmax(1)).float().mean() > 0.999
    assert not torch.equal(label, answers[0].argmax(1))
    torch.testing.assert_close(entropy, torch.special.entr(adjusted[1].softmax(1)).sum(1), rtol=1e-3, atol=1e-4)


def test_the_prior_is_in_the_labels_alone():
    logits, label = example()
    facts = LossContext(COUNTS, labels_itself=True)
    plain = build_loss(section("logit_adjustment"), facts)
    ours = build_loss({**section("logit_adjustment"), "pseudo_prior": True}, facts)
    assert torch.equal(ours(logits, label), plain(logits, label))


@pytest.mark.parametrize(
    ("remedies", "itself", "message"),
    [
        (ADJUSTED, False, "learns no labels that its own network gives"),
        ({}, True, "only logits logit_adjustment and balanced_softmax"),
        (section("blv"), True, "only logits logit_adjustment and balanced_softmax"),
    ],
)
def test_refused(remedies, itself, message):
    with pytest.raises(ConfigError, match=f"^remedies.pseudo_prior: .*{message}") as caught:
        build_loss({**remedies, "pseudo_prior": True}, LossContext(COUNTS, labels_itself=itself))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["baseline", "daformer"])
def test_methods_without_labels_of_their_own_refuse_it(name):
    network, options = ("deeplabv3plus", {}) if name == "baseline" else ("daformer", {**NO_DISTANCE, "adapt": False})
    kind = SEMI_SUP[name] if name == "baseline" else UDA[name]
    remedies = {**ADJUSTED, "pseudo_prior": True}
    with pytest.raises(ConfigError, match="pseudo_prior: this method learns no labels"):
        kind(Config(SMALL[network], method=options, remedies=remedies, name="run"), context(PIXELS))
