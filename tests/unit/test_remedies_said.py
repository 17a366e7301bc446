"""What a section `remedies` chooses in vain is said, and nothing else is."""

import warnings
from pathlib import Path

import pytest
import torch

from common.config import ConfigError, load_config
from common.losses.build import LossContext, build_loss, goes_by_pixels
from common.losses.counts import Counts
from scripts.systems import system_of
from tests.unit.remedy_examples import COUNTS, section

ROOT = Path(__file__).parents[2]
SAMPLED = Counts(torch.tensor([800.0, 100, 100]).double(), COUNTS.images, 10.0)
REFRESH = "counts.refresh: no remedy that is chosen goes by counts of pixels: it changes "
STATED = [1.0, 2.0, 3.0]


def told(chosen, **facts) -> list[str]:
    """The warnings of one section."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        build_loss(chosen, LossContext(COUNTS, cosine=30.0, features=3, **facts))
    return [str(warning.message) for warning in caught]


# Remedies of no strength ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("chosen", "text"),
    [
        (section("logit_adjustment", tau=0), "logits: logit_adjustment with tau: 0"),
        (section("ldam", margin=0), "logits: ldam with margin: 0"),
        (section("blv", amplitude=0), "logits: blv with amplitude: 0"),
        (section("equalization", gamma=0), "logits: equalization with gamma: 0"),
        (section("seesaw", p=0, q=0), "logits: seesaw with p: 0 and q: 0"),
        (section("focal", gamma=0), "focus: focal with gamma: 0"),
        (section("power", rho=0), "class_weight: power gives every class the same weight here"),
        *(
            (section(name, weight=0), f"sets[0]: {name} with weight: 0")
            for name in ("lovasz", "dice", "tversky", "auc", "region")
        ),
    ],
)
def test_a_remedy_of_no_strength_is_said(chosen, text):
    assert told(chosen) == [f"remedies.{text}: it changes nothing"]


@pytest.mark.parametrize(
    "chosen",
    [
        section("seesaw", p=0),
        section("seesaw", q=0),
        section("equalization", tail=0.2),
        section("focal", gamma=0.5),
        section("pat", kappa=0),  # halves the loss
        section("hard_pixels", fraction=1.0),  # ignored pixels count
        section("lovasz", weight=0.1),
        section("blv", preset="released-head", amplitude=0, counts="dataset"),  # averages over all pixels
    ],
    ids=str,
)
def test_what_acts_is_not_said(chosen):
    assert told(chosen) == []


def test_the_term_that_is_idle_is_named():
    sets = [{"name": "dice"}, {"name": "lovasz", "weight": 0.0}]
    assert told({"sets": sets}) == ["remedies.sets[1]: lovasz with weight: 0: it changes nothing"]


def test_a_remedy_of_no_strength_corrects_nothing_twice():
    chosen = {**section("logit_adjustment", tau=0), **section("inverse")}
    assert not [line for line in told(chosen) if "twice" in line]
    assert len([line for line in told(section("power", rho=0), sampled=SAMPLED) if "twice" in line]) == 0


# Counts that no remedy reads ------------------------------------------------------------------------------------------

# section → whether its numbers change with pixels of pseudo-labels; with those that it states counted as well
BASES = [
    ({}, False, False),
    (section("focal"), False, False),
    (section("region"), False, False),
    (section("logit_adjustment"), True, True),
    (section("balanced_softmax"), True, True),
    (section("logit_adjustment", of="images"), False, False),
    (section("ldam"), True, True),
    (section("equalization", tail=0.2), True, True),
    (section("seesaw"), True, True),
    (section("seesaw", p=0), False, False),
    (section("seesaw", counts="online"), False, False),
    (section("blv"), True, True),
    (section("gcl"), True, True),
    (section("blv", coefficient="none"), False, False),
    (section("blv", preset="released-head", counts="dataset", coefficient="none"), False, False),
    (section("blv", counts=STATED), False, True),
    (section("blv", preset="released-head", counts=STATED), False, True),
    (section("blv", preset="released-head", counts="dataset"), True, True),
    (section("inverse"), True, True),
    (section("median_frequency"), True, True),
    (section("effective_number", normalise="none"), False, False),
    (section("effective_number", normalise="none", of="pixels", beta=None), True, True),
    ({**section("blv", counts=STATED), **section("inverse")}, True, True),
    ({**section("blv", counts=STATED), **section("effective_number")}, False, True),
]


@pytest.mark.parametrize(("chosen", "by_pixels", "with_stated"), BASES, ids=lambda value: str(value)[:70])
def test_whether_pseudo_labels_change_a_remedy(chosen, by_pixels, with_stated):
    """By the text alone; a loss that is built tells the same by what a refresh does to its vectors."""
    assert goes_by_pixels(chosen) is by_pixels and goes_by_pixels(chosen, stated=True) is with_stated
    said = [line for line in told({**chosen, "counts": {"refresh": 1}}, pseudo_labels="pixels") if "refresh" in line]
    assert said == ([] if with_stated else [f"remedies.{REFRESH}nothing"])

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        facts = LossContext(COUNTS, cosine=30.0, features=3, pseudo_labels="pixels")
        loss = build_loss({**chosen, "counts": {"refresh": 1}}, facts)
    logits, label = torch.randn(1, 3, 4, 4), torch.randint(3, (1, 4, 4))

    def value():
        torch.manual_seed(0)
        return loss.eval().mean_of(loss.adjust(logits, label), label, 0.0)

    before = value()
    loss.count(torch.tensor([2, 2, 2, 1]), area=500.0)
    loss.after_step(0)
    assert torch.equal(value(), before) is not with_stated


def test_released_counts_are_stated():
    """Also where the preset has them, of nineteen classes."""
    assert not goes_by_pixels(section("blv", preset="released-head", coefficient="none"), stated=True)
    for given in ({"preset": "released-head"}, {"preset": "released-first"}, {"counts": "released"}):
        chosen = section("blv", **given)
        assert not goes_by_pixels(chosen) and goes_by_pixels(chosen, stated=True)


def test_refreshed_weights_by_images_keep_their_ratios():
    """Σ π w = 1 has the pixels of pseudo-labels in it: all weights change alike, which is what is said."""
    chosen = {**section("effective_number"), "counts": {"refresh": 1}}
    assert not goes_by_pixels(chosen) and not goes_by_pixels(chosen, stated=True)
    said = told(chosen, pseudo_labels="pixels")
    assert said == [f"remedies.{REFRESH}all class weights alike, and nothing else"]

    with pytest.warns(UserWarning, match="refresh"):
        loss = build_loss(chosen, LossContext(COUNTS, pseudo_labels="pixels"))
    before = loss.weights.clone()
    loss.count(torch.tensor([2, 2, 2, 1]), area=50.0)
    loss.after_step(0)
    factors = loss.weights / before
    assert abs(float(factors[0]) - 1) > 0.01
    torch.testing.assert_close(factors, factors[0].expand(3))


@pytest.mark.parametrize(
    "remedies",
    [{"logits": "blv"}, {"logits": [1]}, {"logits": {"name": "blw"}}, {"class_weight": {"name": "power", "rho": "x"}}],
)
def test_what_cannot_be_read_is_left_to_those_who_refuse_it(remedies):
    assert goes_by_pixels(remedies)


def test_options_in_vain_are_said_once():
    """By the loss, and not when it is asked what it goes by."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert goes_by_pixels(section("blv", noise="uniform", sigma=4.0))


@pytest.mark.parametrize(
    ("chosen", "read"),
    [
        ({}, False),
        (section("focal"), False),
        (section("lovasz"), False),
        (section("blv", coefficient="none"), False),
        (section("blv", counts=STATED), False),
        (section("seesaw", counts="online"), False),
        (section("blv"), True),
        (section("logit_adjustment", of="images"), True),
        (section("effective_number"), True),
        (section("region"), True),
    ],
    ids=str,
)
def test_sampled_counts_that_nothing_reads_are_said(chosen, read):
    text = "sampled, but no remedy that is chosen goes by counts of the training labels: it changes nothing"
    for sampled in (SAMPLED, COUNTS):  # the second, of a sampler that shows all images alike, is said in other words
        said = [line for line in told({**chosen, "counts": {"of": "sampled"}}, sampled=sampled) if "sampled" in line]
        if read:
            assert said == [] if sampled is SAMPLED else "shows all images alike" in said[0]
        else:
            assert said == [f"remedies.counts.of: {text}"]


# What is shipped ------------------------------------------------------------------------------------------------------


def test_shipped_configs_choose_nothing_in_vain():
    """Of a long tail; in semi_sup with the refresh that its methods add where a remedy goes by counts."""
    seen = set()
    for path in sorted([*ROOT.glob("*/configs/**/*.yaml"), *ROOT.glob("*/configs/**/*.json")]):
        try:
            cfg = load_config(path)
            system = system_of(cfg).name
        except ConfigError:
            continue  # what others are based on

        known = (system, cfg.model.num_classes, str(cfg.remedies))
        if not cfg.remedies or known in seen:
            continue
        seen.add(known)
        pixels = torch.logspace(9, 5, cfg.model.num_classes)
        counts = dict(cfg.remedies.get("counts", {}))
        if system == "semi_sup" and goes_by_pixels(cfg.remedies):
            counts = {"refresh": 100} | counts
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            facts = LossContext(Counts.from_pixels(pixels), pseudo_labels="pixels", several_heads=True)
            build_loss({**cfg.remedies, "counts": counts}, facts, str(path))
    assert len(seen) > 20
