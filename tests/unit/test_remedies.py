"""Every remedy of the loss: the identities of its equation, its optimum, and the rules that all of them keep."""

import math

import pytest
import torch
import torch.nn.functional as F

from common.losses.auc import AUC
from common.losses.blv import BLV
from common.losses.build import LOSSES, LossContext, build_loss
from common.losses.class_weights import EffectiveNumber, MedianFrequency, Power
from common.losses.counts import Counts
from common.losses.cross_entropy import pixel_cross_entropy
from common.losses.hard_pixel import HardPixels
from common.losses.lovasz import Lovasz
from common.losses.overlap import Dice, Tversky
from tests.unit.remedy_examples import COUNTS, PIXELS, example, make, section, value

RANDOM = ("blv", "gcl", "equalization")  # draw noise for each pixel and class


# What a classifier ends with that is a bias alone --------------------------------------------------------------------

OPTIMA = [
    (section("logit_adjustment"), (1 / 3, 1 / 3, 1 / 3)),
    (section("balanced_softmax"), (1 / 3, 1 / 3, 1 / 3)),
    (section("logit_adjustment", tau=0.5), (0.703, 0.222, 0.074)),
    (section("inverse"), (1 / 3, 1 / 3, 1 / 3)),
    (section("inverse", normalise="mean"), (1 / 3, 1 / 3, 1 / 3)),
    (section("sqrt"), (0.703, 0.222, 0.074)),
    (section("power", rho=0.5), (0.703, 0.222, 0.074)),
    (section("focal"), (0.688, 0.277, 0.034)),
    (section("focal", detach=True), (0.658, 0.286, 0.056)),
    (section("seesaw", q=0.0, p=0.8), (0.585, 0.266, 0.150)),
    (section("ldam", scale=1.0), (0.911, 0.080, 0.009)),
    (section("blv", noise="constant", limit="none"), (0.939, 0.057, 0.004)),
    (section("blv", noise="constant", limit="none", sign=-1), (0.837, 0.138, 0.025)),
    ({}, (0.9, 0.09, 0.01)),
]


@pytest.mark.parametrize(("chosen", "expected"), OPTIMA, ids=lambda v: str(v)[:60])
def test_optimum_of_a_bias(chosen, expected):
    label = torch.repeat_interleave(torch.arange(3), torch.tensor([90, 9, 1]))[None, None]
    scale = chosen.get("logits", {}).get("scale", 30.0)
    loss = build_loss(chosen, LossContext(COUNTS, cosine=scale))
    bias = torch.zeros(3, requires_grad=True)
    optimiser = torch.optim.LBFGS([bias], max_iter=300, tolerance_grad=1e-9, line_search_fn="strong_wolfe")

    def closure():
        optimiser.zero_grad()
        found = loss(bias.view(1, 3, 1, 1).expand(1, 3, 1, 100), label)
        found.backward()
        return found

    optimiser.step(closure)
    torch.testing.assert_close(bias.detach().softmax(0), torch.tensor(expected), atol=2e-3, rtol=0)


def test_optimum_of_equalization():
    label = torch.repeat_interleave(torch.arange(3), torch.tensor([9000, 900, 100]))[None, None]
    loss = make("equalization", gamma=0.9, tail=0.05)
    bias = torch.zeros(3, requires_grad=True)
    optimiser = torch.optim.LBFGS([bias], max_iter=100, line_search_fn="strong_wolfe")

    def closure():
        optimiser.zero_grad()
        torch.manual_seed(0)
        found = loss(bias.view(1, 3, 1, 1).expand(1, 3, 1, 10000), label)
        found.backward()
        return found

    optimiser.step(closure)
    assert bias.detach().softmax(0)[2].item() == pytest.approx(0.0917, abs=4e-3)


# Identities ----------------------------------------------------------------------------------------------------------

IDENTITIES = [
    section("logit_adjustment", tau=0.0),
    section("blv", amplitude=0.0),
    section("ldam", margin=0.0),
    section("equalization", gamma=0.0),
    section("seesaw", p=0.0, q=0.0),
    section("power", rho=0.0),
    section("focal", gamma=0.0),
    {},
]


@pytest.mark.parametrize("average", ["valid", "all"])
@pytest.mark.parametrize("chosen", IDENTITIES, ids=lambda v: str(v)[:50])
@pytest.mark.filterwarnings("ignore:.*changes nothing")
def test_idle_options_are_cross_entropy(chosen, average):
    logits, label = example()
    loss = build_loss(chosen, LossContext(COUNTS, average, cosine=30.0))
    torch.testing.assert_close(loss(logits, label), pixel_cross_entropy(logits, label, average=average))


def test_without_remedies_it_is_cross_entropy_exactly():
    logits, label = example()
    loss = build_loss({}, LossContext(COUNTS))
    assert torch.equal(loss(logits, label), pixel_cross_entropy(logits, label))
    weight = torch.rand(label.shape)
    expected = pixel_cross_entropy(logits, label, pixel_weight=weight)
    torch.testing.assert_close(loss(logits, label, pixel_weight=weight), expected)


def test_all_hard_pixels_are_the_mean_over_all():
    logits, label = example()
    expected = pixel_cross_entropy(logits, label, average="all")
    torch.testing.assert_close(make("hard_pixels", fraction=1.0)(logits, label), expected)


def test_blv_of_full_amplitude_is_logit_adjustment():
    logits, label = example()
    largest = math.log(1000 / 10)
    blv = make("blv", noise="constant", limit="none", sign=-1, amplitude=largest)
    torch.testing.assert_close(blv(logits, label), make("logit_adjustment")(logits, label))


def test_gcl_is_a_preset_of_blv():
    remedy = make("gcl").logits
    assert remedy == BLV(coefficient="max", limit="folded", sigma=1 / 3, sign=-1, amplitude=15.0, scale=30.0)
    torch.manual_seed(0)
    draws = remedy.draw(torch.empty(1, 1, 400, 400))
    assert draws.mean().item() == pytest.approx(0.266, abs=2e-3)


@pytest.mark.parametrize("chosen", [section("gcl"), section("blv", preset="gcl")], ids=str)
def test_gcl_of_another_scale_has_another_amplitude(chosen):
    """s / 2 unless it is given; a preset for any classifier keeps its own."""

    def amplitude(**options):
        logits = chosen["logits"] | options
        return build_loss({"logits": logits}, LossContext(COUNTS, cosine=logits.get("scale", 30.0))).logits.amplitude

    assert [amplitude(), amplitude(scale=30), amplitude(scale=20), amplitude(scale=7.0)] == [15, 15, 10, 3.5]
    assert amplitude(scale=20, amplitude=15) == 15
    assert amplitude(scale=None) == 15
    assert BLV.from_section({"scale": 20.0}, "test").amplitude == 1


def test_closed_forms():
    two = torch.zeros(1, 2, 1, 1)
    label = torch.zeros(1, 1, 1, dtype=torch.long)
    counts = Counts.from_pixels([1, 1])

    assert make("focal", counts)(two, label).item() == pytest.approx(0.25 * math.log(2))
    assert make("pat", counts)(two, label).item() == pytest.approx(0.5 * math.exp(0.5) * math.log(2))
    assert make("pat", counts, temperature=2.0)(two, label).item() == pytest.approx(0.5 * math.exp(0.5) * math.log(2))
    assert make("ldam", counts)(two, label).item() == pytest.approx(math.log1p(math.exp(15.0)))


def test_median_frequency_of_a_class_that_only_pseudo_labels_show():
    """No image is counted of it: it keeps the weight of a class without one, and moves no other's."""
    pixels = torch.tensor([900.0, 90.0, 30.0], dtype=torch.float64)
    counts = Counts(pixels, torch.tensor([5.0, 5.0, 0.0], dtype=torch.float64), 5.0)
    raw = MedianFrequency(normalise="none").vector(counts)
    assert raw[2] == 1 and raw[1] / raw[0] == pytest.approx(10)
    assert float(raw[0]) == pytest.approx(495 / 900), "the median of the two that labels show"


def test_weights_by_hand():
    prior = PIXELS / PIXELS.sum()
    inverse = Power(rho=1.0, normalise="expected").vector(COUNTS)
    torch.testing.assert_close(inverse, 1 / prior / 3)
    mean = Power(rho=1.0, normalise="mean").vector(COUNTS)
    assert mean.mean().item() == pytest.approx(1.0)

    frequency = PIXELS / (COUNTS.images * 100)
    expected = frequency.median() / frequency
    torch.testing.assert_close(MedianFrequency(normalise="none").vector(COUNTS), expected)

    beta = 0.9
    expected = (1 - beta) / (1 - beta**COUNTS.images)
    torch.testing.assert_close(EffectiveNumber(beta=beta, normalise="none").vector(COUNTS), expected)
    nearly_inverse = EffectiveNumber(beta=None, of="pixels").vector(COUNTS)
    torch.testing.assert_close(nearly_inverse, inverse, rtol=0.5, atol=0)


def test_deferred_weights():
    logits, label = example()
    loss = make("inverse", start=0.8)
    assert torch.equal(loss(logits, label, progress=0.79), pixel_cross_entropy(logits, label))
    torch.testing.assert_close(loss(logits, label, progress=0.8), make("inverse")(logits, label))


def test_weights_against_torch():
    logits, label = example()
    weights = make("inverse").weights
    each = F.cross_entropy(logits, label, weights, ignore_index=-1, reduction="none")
    torch.testing.assert_close(make("inverse")(logits, label), each.sum() / (label >= 0).sum())


def test_online_hard_examples():
    logits, label = example()
    losses = F.cross_entropy(logits, label, ignore_index=-1, reduction="none").flatten()
    valid = label.flatten() >= 0
    below = losses[losses > -math.log(0.3)]
    found = HardPixels(threshold=0.3, min_kept=1).mean(losses, valid, losses)
    assert found.item() == pytest.approx(below.mean().item())
    expected = losses.topk(70).values
    got = HardPixels(threshold=1e-6, min_kept=70).mean(losses, valid, losses)
    assert got.item() == pytest.approx(expected[expected > 0].mean().item())


@pytest.mark.parametrize(
    "options, message",
    [
        ({"fraction": 0.3, "threshold": 0.7}, "fraction: 0.3 has no effect where threshold: 0.7 chooses"),
        ({"min_kept": 10}, "min_kept: 10 has no effect where fraction: 0.2 chooses"),
    ],
)
def test_hard_pixels_are_chosen_by_one_rule(options, message):
    with pytest.warns(UserWarning, match=message):
        build_loss({"focus": {"name": "hard_pixels", **options}}, LossContext(Counts.from_pixels([3, 1])), "test")


# Terms over regions --------------------------------------------------------------------------------------------------


def test_lovasz_of_hard_predictions_is_one_minus_iou():
    _, label = example(4)
    predicted = torch.randint(0, 3, label.shape, generator=torch.Generator().manual_seed(3))
    logits = 200.0 * F.one_hot(predicted, 4).permute(0, 3, 1, 2).float()
    valid = label >= 0
    ious = []
    for k in label[valid].unique():
        hit = ((predicted == k) & (label == k)).sum()
        union = ((predicted == k) & valid | (label == k)).sum()
        ious.append(hit / union)
    assert Lovasz()(logits, label).item() == pytest.approx(1 - torch.stack(ious).mean().item(), abs=1e-6)


def test_lovasz_of_uniform_predictions():
    label = torch.tensor([[[0, 1, 2, 0, 1, 2]]])
    assert Lovasz()(torch.zeros(1, 4, 1, 6), label).item() == pytest.approx(0.75)


def test_lovasz_per_image():
    logits, label = example()
    single = [Lovasz()(z[None], y[None]) for z, y in zip(logits, label, strict=True)]
    torch.testing.assert_close(Lovasz(per_image=True)(logits, label), torch.stack(single).mean())


@pytest.mark.parametrize("absent", ["skip", "include"])
def test_overlap_by_hand(absent):
    logits, label = example(4)
    label[label == 3] = 0  # a class without a pixel
    p, valid = logits.softmax(1), label >= 0
    losses = []
    for k in range(4):
        q, t = p[:, k][valid], (label == k)[valid].float()
        if absent == "skip" and t.sum() == 0:
            continue
        hit, fp, fn = (q * t).sum(), (q * (1 - t)).sum(), ((1 - q) * t).sum()
        losses.append(1 - (hit + 1) / (hit + 0.3 * fp + 0.7 * fn + 1))
    torch.testing.assert_close(Tversky(absent=absent)(logits, label), torch.stack(losses).mean())


def test_dice_is_tversky_and_perfect_at_the_truth():
    logits, label = example()
    torch.testing.assert_close(Dice()(logits, label), Tversky(0.5, 0.5, smooth=0.5)(logits, label))
    perfect = 200.0 * F.one_hot(label.clamp(min=0), 3).permute(0, 3, 1, 2).float()
    assert Dice()(perfect, label).item() == pytest.approx(0, abs=1e-6)
    assert Lovasz()(perfect, label).item() == pytest.approx(0, abs=1e-6)


def test_auc_against_all_pairs():
    logits, label = example(4)
    label[label == 2] = -1  # K_b = 3 of 4
    f, y = logits.sigmoid().transpose(0, 1).flatten(1), label.flatten()
    present = [k for k in range(4) if (y == k).any()]
    total = 0.0
    for i in present:
        for j in present:
            if i != j:
                difference = f[i][y == i][:, None] - f[i][y == j][None]
                total = total + (0.5 * (1 - difference).square()).mean()
    expected = total / (len(present) * (len(present) - 1))
    torch.testing.assert_close(AUC()(logits, label), expected)


def test_auc_is_the_same_under_autocast():
    """Numbers of pixels have no place in 8 bits."""
    logits, label = example(5, (2, 101, 103))
    plain = AUC()(logits, label)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(AUC()(logits, label), plain, rtol=1e-6, atol=0)


def test_auc_of_a_constant_is_a_half():
    _, label = example()
    assert AUC()(torch.zeros(2, 3, 6, 7), label).item() == pytest.approx(0.5)
    assert AUC()(torch.randn(2, 3, 6, 7), torch.ones_like(label)).item() == 0


# Rules for all -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.filterwarnings("ignore:.*changes nothing")
def test_no_labelled_pixel_is_no_loss(name):
    logits = torch.randn(2, 3, 4, 5, requires_grad=True)
    loss = value(make(name), logits, torch.full((2, 4, 5), -1))
    loss.backward()
    assert loss.item() == 0 and not logits.grad.any()


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.filterwarnings("ignore:.*changes nothing")
def test_half_precision(name):
    logits, label = example()
    half = logits.bfloat16().requires_grad_()
    torch.manual_seed(0)
    loss = value(make(name), half, label)
    loss.backward()
    torch.manual_seed(0)
    expected = value(make(name), half.detach().float(), label)
    assert loss.dtype == torch.float32 and half.grad.isfinite().all()
    torch.testing.assert_close(loss.detach(), expected, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.filterwarnings("ignore:.*changes nothing")
def test_ignored_pixels_play_no_part(name):
    logits, label = example()
    moved = torch.where((label < 0)[:, None], logits + 3 * torch.randn_like(logits), logits)
    torch.manual_seed(0)
    first = value(make(name), logits, label)
    torch.manual_seed(0)
    torch.testing.assert_close(value(make(name), moved, label), first)


@pytest.mark.parametrize("name", [name for name in LOSSES if name not in (*RANDOM, "region")])
@pytest.mark.filterwarnings("ignore:.*changes nothing")
def test_the_order_of_classes_is_free(name):
    logits, label = example()
    order = torch.tensor([2, 0, 1])  # new class k is the old order[k]
    places = order.argsort()
    permuted = torch.where(label < 0, label, places[label.clamp(min=0)])
    counts = Counts(PIXELS[order], COUNTS.images[order], 10.0)
    first = make(name)(logits, label)
    torch.testing.assert_close(make(name, counts)(logits[:, order], permuted), first)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.filterwarnings("ignore:.*changes nothing")
def test_a_class_without_labels_does_not_touch_the_others(name):
    """Vectors of the classes that occur are those without the absent class; it gets no advantage itself."""
    absent = Counts(torch.cat((PIXELS, torch.zeros(1).double())), torch.cat((COUNTS.images, torch.zeros(1))), 10.0)
    with_it, without = make(name, absent), make(name)
    for ours, theirs in ((with_it.offsets, without.offsets), (with_it.weights, without.weights)):
        if ours is not None and name not in ("blv", "gcl"):  # theirs: test_blv
            torch.testing.assert_close(ours[:3], theirs)
            assert ours.isfinite().all()


@pytest.mark.parametrize("name", [n for n in LOSSES if LOSSES[n].slot != "sets" and n not in (*RANDOM, "hard_pixels")])
@pytest.mark.filterwarnings("ignore:.*changes nothing")
def test_image_by_image_is_the_whole_batch(name):
    coarse, _ = example(size=(2, 3, 4))
    _, label = example(size=(2, 9, 13))
    whole, single = coarse.clone().requires_grad_(), coarse.clone().requires_grad_()
    loss = make(name)
    expected = loss(F.interpolate(whole, (9, 13), mode="bilinear", align_corners=False), label)
    expected.backward()
    found = loss.upsampled(single, label, align_corners=False)
    found.backward()
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(single.grad, whole.grad)


def test_set_terms_at_the_network_s_stride():
    coarse, _ = example(size=(2, 3, 4))
    _, label = example(size=(2, 9, 12))
    loss = build_loss(section("lovasz", at="network", weight=0.5), LossContext(COUNTS, full_size=False))
    plain = build_loss({}, LossContext(COUNTS))
    small = label[:, 1::3, 1::3]
    expected = plain.upsampled(coarse, label, align_corners=False) + 0.5 * Lovasz()(coarse, small)
    torch.testing.assert_close(loss.upsampled(coarse, label, align_corners=False), expected)
