"""The config section `remedies`: what it refuses, what it says, and how its counts are refreshed."""

from dataclasses import dataclass

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from common.config import ConfigError
from common.data import Statistics
from common.losses import build
from common.losses.build import LossContext, Row, build_loss
from common.losses.class_weights import MedianFrequency, Power
from common.losses.counts import Counts
from common.losses.equalization import Equalization
from common.losses.focal import PAT, Focal
from common.losses.logit_adjustment import LogitAdjustment
from tests.unit.remedy_examples import COUNTS, PIXELS, example, make, section


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        ({"logits": {"name": "blw"}}, "logits.name: unknown 'blw'; did you mean 'blv'"),
        ({"logits": {"tau": 1.0}}, "logits.name: "),
        ({"logits": {"name": "focal"}}, "unknown 'focal'"),
        ({"logits": {"name": "logit_adjustment", "taus": 1.0}}, "unknown key 'taus'; did you mean 'tau'"),
        ({"class_weight": {"name": "inverse", "rho": 1.0}}, "class_weight.rho: inverse fixes it to 1.0"),
        ({"logits": {"name": "ldam"}}, "cosine classifier"),
        ({"logits": {"name": "gcl"}}, "cosine classifier"),
        ({"counts": {"refresh": 10}}, "makes no pseudo-labels"),
        ({"counts": {"refresh": -1}}, "refresh: -1 is less than 0"),
        ({"losses": {}}, "unknown key 'losses'"),
    ],
)
def test_refused(chosen, message):
    with pytest.raises(ConfigError, match="remedies") as caught:
        build_loss(chosen, LossContext(COUNTS))
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("chosen", [section("hard_pixels"), section("lovasz")])
def test_refused_where_a_batch_is_never_whole(chosen):
    with pytest.raises(ConfigError, match="never has|set it to network"):
        build_loss(chosen, LossContext(COUNTS, full_size=False))


def test_a_slot_that_a_method_does_not_have():
    with pytest.raises(ConfigError, match=r"no such slot \(it has no pixels\); it has: logits, class_weight, sets"):
        build_loss(section("focal"), LossContext(COUNTS, refused={"focus": "it has no pixels"}))


@pytest.mark.parametrize("heads", [["aux"], [], ["decode", "aux"]])
def test_heads_are_for_methods_with_several(heads):
    """Named elsewhere, remedies would act on the one head all the same, or on none."""
    chosen = {"focus": {"name": "focal"}, "heads": heads}
    with pytest.raises(ConfigError, match="remedies.heads: .*, but .* remedies act on one head alone; remove"):
        build_loss(chosen, LossContext(COUNTS))
    assert build_loss(chosen, LossContext(COUNTS, several_heads=True)).focus is not None


def test_refreshed_counts_without_a_remedy_that_goes_by_them_are_said():
    chosen = {"focus": {"name": "focal"}, "counts": {"refresh": 5}}
    with pytest.warns(UserWarning, match="counts.refresh: no remedy that is chosen goes by counts"):
        build_loss(chosen, LossContext(COUNTS, pseudo_labels="pixels"))


def test_constant_noise_less_its_mean_is_said():
    with pytest.warns(UserWarning, match="centre takes noise: constant away again: it changes nothing"):
        build_loss({"logits": {"name": "blv", "noise": "constant", "centre": True}}, LossContext(COUNTS))


def test_idle_and_double_choices_are_said():
    pixels = Counts.from_pixels([900_000, 90_000, 50_000])
    with pytest.warns(UserWarning, match="effective_number gives every class the same weight"):
        idle = make("effective_number", pixels, of="pixels", beta=0.99)
    torch.testing.assert_close(idle.weights, torch.ones(3), rtol=1e-3, atol=0)
    with pytest.warns(UserWarning, match="twice"):
        build_loss({**section("logit_adjustment"), **section("inverse")}, LossContext(COUNTS))


@pytest.mark.parametrize(
    ("chosen", "told"),
    [
        (section("logit_adjustment"), "logits: logit_adjustment goes"),
        (section("inverse"), "class_weight: inverse goes"),
        ({**section("sqrt"), **section("blv")}, "class_weight: sqrt goes"),
        (section("blv"), ""),
        (section("focal"), ""),
        ({**section("inverse"), "counts": {"of": "sampled"}}, ""),
    ],
)
def test_a_sampler_beside_a_remedy_that_goes_by_the_counts_of_the_data_set_is_said(chosen, told, recwarn):
    """It shows the rarest class ten times as often: a loss that does not know corrects once more."""
    sampled = Counts(torch.tensor([800.0, 100, 100]).double(), COUNTS.images, 10.0)
    build_loss(chosen, LossContext(COUNTS, sampled=sampled))
    said = [str(warning.message) for warning in recwarn if "sampler" in str(warning.message)]
    assert len(said) == bool(told)
    assert all(told in line and "up to 10.0 times as often" in line for line in said)

    recwarn.clear()
    alike = Counts(PIXELS * torch.tensor([1.0, 1.2, 1.4]), COUNTS.images, 10.0)
    build_loss(chosen, LossContext(COUNTS, sampled=alike))
    assert not [warning for warning in recwarn if "sampler" in str(warning.message)]


def test_equalization_that_spares_no_class_is_said():
    with pytest.warns(UserWarning, match="equalization spares no class here"):
        make("equalization", Counts.from_pixels([30, 40, 30]))


@pytest.mark.parametrize(
    ("name", "options", "slot"),
    [("power", {"rho": 1000}, "class_weight"), ("logit_adjustment", {"tau": 1e308}, "logits")],
)
def test_strengths_beyond_all_numbers_are_refused(name, options, slot):
    with pytest.raises(ConfigError, match=f"remedies.{slot}: its strength makes numbers that are not finite"):
        make(name, **options)


def test_median_frequency_counts_the_pixels_of_the_images_that_show_a_class():
    """By a loop over images of unlike sizes, one of them drawn twice as often as the other two."""
    pixels = np.array([[90, 10, 0], [10, 0, 0], [500, 0, 300]], np.int32)
    statistics = Statistics(pixels, np.array([7, 0, 90], np.int32))
    for shares in (None, np.array([0.5, 0.25, 0.25])):
        often = np.ones(3) if shares is None else 3 * shares
        frequency = []
        for k in range(3):
            shown = [i for i in range(3) if pixels[i, k]]
            area = sum(often[i] * pixels[i].sum() for i in shown)
            frequency.append(sum(often[i] * pixels[i, k] for i in shown) / area)
        counts = Counts.from_statistics(statistics, shares)
        loss = make("median_frequency", counts, normalise="none")
        expected = torch.tensor(np.median(frequency) / np.array(frequency)).float()
        torch.testing.assert_close(loss.weights, expected)

    chosen = {**section("median_frequency"), "counts": {"refresh": 1}}
    loss = build_loss(chosen, LossContext(counts, pseudo_labels="shares"))
    loss.count(torch.tensor([0, 0, 0, 0, 0, 0, 1, 2]))
    loss.after_step(0)
    assert torch.isfinite(loss.weights).all() and not torch.equal(
        loss.weights, MedianFrequency().vector(counts).float()
    )


def test_pseudo_labels_refresh_every_vector():
    chosen = {**section("sqrt"), **section("logit_adjustment"), "counts": {"refresh": 2}}
    with pytest.warns(UserWarning, match="twice"):
        loss = build_loss(chosen, LossContext(COUNTS, pseudo_labels="pixels"))
    loss.count(torch.tensor([2, 2, 2, -1]), area=10.0)
    loss.after_step(0)
    torch.testing.assert_close(loss.offsets, LogitAdjustment().vector(COUNTS).float())
    loss.after_step(1)

    after = Counts(PIXELS + torch.tensor([0, 0, 30.0]), COUNTS.images, 10.0)
    torch.testing.assert_close(loss.offsets, LogitAdjustment().vector(after).float())
    torch.testing.assert_close(loss.weights, Power(rho=0.5).vector(after).float())

    with pytest.warns(UserWarning, match="twice"):
        restored = build_loss(chosen, LossContext(COUNTS, pseudo_labels="pixels"))
    restored.load_state_dict(loss.state_dict())
    assert torch.equal(restored.offsets, loss.offsets) and torch.equal(restored.weights, loss.weights)


def test_the_rare_of_equalization():
    counts = Counts.from_pixels([50, 30, 16, 3, 1, 0])
    assert Equalization(tail=0.05).vector(counts).tolist() == [0, 0, 0, 1, 1, 0]


def test_a_new_loss_is_one_file_and_one_row(monkeypatch):
    """What docs/extending.md says: a dataclass that does what its slot asks for, and a row."""

    @dataclass(frozen=True)
    class Squared:
        factor: float = 1.0

        def __call__(self, loss, logits, label):
            return self.factor * loss.square()

    monkeypatch.setitem(build.LOSSES, "squared", Row("focus", Squared))
    logits, label = example()
    each = F.cross_entropy(logits, label, ignore_index=-1, reduction="none")
    expected = 2 * each.square().sum() / (label >= 0).sum()
    torch.testing.assert_close(make("squared", factor=2.0)(logits, label), expected)


def test_focal_and_pat_take_gradient_through_their_factor_unless_detached():
    z = torch.tensor([[0.3, -0.2]], dtype=torch.float64, requires_grad=True)
    y = torch.tensor([0])
    for remedy in (Focal(), PAT()):
        assert torch.autograd.gradcheck(lambda z, r=remedy: r(F.cross_entropy(z, y, reduction="none"), z, y), z)


def test_remedies_go_by_what_is_sampled_where_they_are_told_to():
    sampled = Counts(torch.tensor([500.0, 300, 200]).double(), torch.tensor([10.0, 9, 8]).double(), 10.0)
    facts = LossContext(COUNTS, sampled=sampled, features=3)
    chosen = {**section("logit_adjustment"), **section("region"), "counts": {"of": "sampled"}}
    loss = build_loss(chosen, facts)
    torch.testing.assert_close(loss.offsets, LogitAdjustment().vector(sampled).float())
    torch.testing.assert_close(loss.trained[0].log_images, sampled.images.log().float())
    with pytest.warns(UserWarning, match="sampler"):
        plain = build_loss(section("logit_adjustment"), facts)
    torch.testing.assert_close(plain.offsets, LogitAdjustment().vector(COUNTS).float())

    with pytest.warns(UserWarning, match="counts.of: sampled changes nothing here"):
        build_loss(chosen, LossContext(COUNTS, sampled=COUNTS, features=3))
    with pytest.raises(ConfigError, match="counts.of: sampled, but this loss is not told"):
        build_loss(section("logit_adjustment") | {"counts": {"of": "sampled"}}, LossContext(COUNTS))
