"""Which logits, labels and weights each part of the loss sees, however a method calls it."""

import math

import pytest
import torch
import torch.nn.functional as F

from common.losses.auc import AUC
from common.losses.build import LossContext, build_loss
from common.losses.focal import Focal
from common.losses.lovasz import Lovasz
from common.losses.overlap import Dice
from tests.unit.remedy_examples import COUNTS, example, section

TERMS = {"lovasz": Lovasz(), "dice": Dice(), "auc": AUC()}
CORNERS = {"align_corners": False}


@pytest.fixture
def coarse():
    return example(size=(2, 3, 4))[0].requires_grad_()


@pytest.fixture
def label():
    return example(size=(2, 9, 12))[1]


def enlarged(logits: torch.Tensor) -> torch.Tensor:
    return F.interpolate(logits, (9, 12), mode="bilinear", align_corners=False)


def thin(label: torch.Tensor) -> torch.Tensor:
    """The middle of each cell of 3 x 3."""
    return label[:, 1::3, 1::3]


WAYS = {
    "upsampled": lambda loss, z, y: loss.upsampled(z, y, **CORNERS),
    "with weights": lambda loss, z, y: loss.upsampled(z, y, pixel_weight=torch.ones(y.shape), **CORNERS),
    "enlarged": lambda loss, z, y: loss.enlarged(z, y, **CORNERS),
    "by the method": lambda loss, z, y: loss(enlarged(z), y, small=z),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", TERMS)
@pytest.mark.parametrize("at", ["network", "label"])
def test_where_a_term_over_regions_is_made(way, name, at, coarse, label):
    """At the network's stride or at the label's size, as its `at` says, in each way that methods call the loss."""
    logits = (coarse, thin(label)) if at == "network" else (enlarged(coarse), label)
    plain = F.cross_entropy(enlarged(coarse), label.long(), ignore_index=-1)
    expected = plain + 0.5 * TERMS[name](*logits)
    loss = build_loss(section(name, at=at, weight=0.5), LossContext(COUNTS))
    found = WAYS[way](loss, coarse, label)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(*(torch.autograd.grad(value, coarse)[0] for value in (found, expected)))


@pytest.mark.parametrize("way", WAYS)
def test_each_term_has_its_own_place(way, coarse, label):
    """Beside another one, and beside hard pixels, which need the whole batch at label size."""
    terms = [{"name": "lovasz", "at": "network"}, {"name": "dice", "at": "label"}]
    loss = build_loss({"sets": terms, "focus": {"name": "hard_pixels", "fraction": 1.0}}, LossContext(COUNTS))
    plain = F.cross_entropy(enlarged(coarse), label.long(), ignore_index=-1, reduction="none").mean()
    expected = plain + Lovasz()(coarse, thin(label)) + Dice()(enlarged(coarse), label)
    torch.testing.assert_close(WAYS[way](loss, coarse, label), expected)


@pytest.mark.parametrize("name", TERMS)
@pytest.mark.parametrize("at", ["network", "label"])
def test_terms_over_regions_are_weighed_by_the_pixels(name, at, coarse, label):
    """Pixels of weight 0 have no label in them, and they count as much as the mean weight of the others."""
    loss = build_loss(section(name, at=at), LossContext(COUNTS, "all"))
    weight = torch.full(label.shape, 0.25)
    weight[:, 6:] = 0
    cut = label.masked_fill(weight == 0, -1)
    logits = (coarse, thin(cut)) if at == "network" else (enlarged(coarse), cut)
    plain = F.cross_entropy(enlarged(coarse), label.long(), ignore_index=-1, reduction="none")
    expected = (plain * weight).mean() + 0.25 * TERMS[name](*logits)
    found = loss.upsampled(coarse, label, pixel_weight=weight, **CORNERS)
    torch.testing.assert_close(found, expected)

    idle = loss.upsampled(coarse, label, pixel_weight=torch.zeros(label.shape), **CORNERS)
    assert idle == 0 and not torch.autograd.grad(idle, coarse)[0].any()


@pytest.mark.parametrize("choose", ["clean", "noisy"])
@pytest.mark.parametrize("other", ["logits", "class_weight", "pixels"])
def test_hard_pixels_are_chosen_by_the_network_s_own_answers(choose, other):
    """Whatever else changes the losses, unless the config says otherwise; then their changed losses are averaged."""
    logits, label = example(size=(2, 9, 12))
    weight = torch.rand(label.shape, generator=torch.Generator().manual_seed(4)) if other == "pixels" else None
    more = {"logits": {"name": "logit_adjustment", "tau": 2.0}, "class_weight": {"name": "inverse"}}
    chosen = {"focus": {"name": "hard_pixels", "fraction": 0.2, "choose": choose}}
    chosen |= {other: more[other]} if other in more else {}
    loss = build_loss(chosen, LossContext(COUNTS))

    clean = F.cross_entropy(logits, label.long(), ignore_index=-1, reduction="none").flatten()
    losses = loss.each_of(loss.adjust(logits, label), label, 0.0, weight).flatten()
    count = int(0.2 * len(losses))
    picked = (clean if choose == "clean" else losses).topk(count).indices
    torch.testing.assert_close(loss(logits, label, pixel_weight=weight), losses[picked].mean())
    assert set(clean.topk(count).indices.tolist()) != set(losses.topk(count).indices.tolist())


def test_pixels_that_are_surely_right_count_as_labelled():
    """Their loss is exactly 0, as that of ignored ones, which are in no mean of `threshold`."""
    logits = torch.zeros(1, 2, 1, 5)
    logits[0, 0, 0, :4] = 1000.0
    label = torch.tensor([[[0, 0, 0, -1, 1]]])
    loss = build_loss(section("hard_pixels", threshold=0.7, min_kept=100), LossContext(COUNTS))
    torch.testing.assert_close(loss(logits, label), torch.tensor(2.0).log() / 4)


# Focal loss of pixels that are nearly or surely right -----------------------------------------------------------------

MARGINS = (0.0, 1.0, 5.0, 12.0, 20.0, 100.0)


def focal(gamma: float, margin: float, dtype: torch.dtype = torch.float32) -> tuple[float, float]:
    """Loss and its derivative by the true class's logit, of two classes and a margin between their logits."""
    logits = torch.tensor([[margin, 0.0]], dtype=dtype, requires_grad=True)
    label = torch.tensor([0])
    loss = Focal(gamma)(F.cross_entropy(logits, label, reduction="none"), logits, label).sum()
    return loss.item(), torch.autograd.grad(loss, logits)[0][0, 0].item()


def closed(gamma: float, margin: float) -> tuple[float, float]:
    """With q = 1 − p and l = −ln p: q^γ · l, and −q^(γ+1) − γ · q^γ · p · l."""
    q = math.exp(-margin) / (1 + math.exp(-margin))
    l = math.log1p(math.exp(-margin))  # noqa: E741
    return q**gamma * l, -(q ** (gamma + 1)) - gamma * q**gamma * (1 - q) * l


@pytest.mark.parametrize("gamma", [0.1, 0.5, 1.0, 2.0, 5.0])
@pytest.mark.parametrize("margin", MARGINS)
def test_focal_loss_and_its_gradient_in_closed_form(gamma, margin):
    """In double precision wherever that holds the loss (to a margin of 36); in float32 to what that resolves."""
    expected = closed(gamma, margin)
    if margin < 36:
        assert focal(gamma, margin, torch.float64) == pytest.approx(expected, rel=1e-6, abs=0)
    assert focal(gamma, margin) == pytest.approx(expected, rel=1e-5, abs=1e-7)


@pytest.mark.parametrize("gamma", [0.1, 0.5, 1.0])
@pytest.mark.parametrize("margin", [20.0, 100.0])
@pytest.mark.parametrize("detach", [False, True])
def test_focal_loss_of_sure_pixels_has_a_gradient_whatever_a_clamp_does_at_its_bound(
    gamma, margin, detach, monkeypatch
):
    """1 − p is 0 in float32, where the slope of a power below 1 is infinite; some versions of torch pass it on."""

    def passing(self, min):
        return self + (torch.maximum(self, torch.full_like(self, min)) - self).detach()

    monkeypatch.setattr(torch.Tensor, "clamp", passing)
    logits = torch.tensor([[margin, 0.0]], requires_grad=True)
    label = torch.tensor([0])
    loss = Focal(gamma, detach)(F.cross_entropy(logits, label, reduction="none"), logits, label).sum()
    gradient = torch.autograd.grad(loss, logits)[0]
    assert loss == 0 and gradient.isfinite().all() and gradient.abs().max() < 1e-7


@pytest.mark.parametrize("gamma", [1.0, 2.0])
def test_focal_loss_is_the_plain_power_of_1_less_p(gamma):
    """To what float32 keeps of 1 − p."""
    generator = torch.Generator().manual_seed(5)
    logits = (4 * torch.randn(2000, 5, generator=generator)).requires_grad_()
    label = torch.randint(5, (2000,), generator=generator)
    each = F.cross_entropy(logits, label, reduction="none")
    found, expected = Focal(gamma)(each, logits, label), (1 - (-each).exp()) ** gamma * each
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    gradients = (torch.autograd.grad(loss.sum(), logits, retain_graph=True)[0] for loss in (found, expected))
    torch.testing.assert_close(*gradients, rtol=1e-6, atol=1e-6)
