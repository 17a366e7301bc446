"""BLV against closed forms, the paper's tables and plain cross-entropy."""

import math
import warnings

import pytest
import torch
import torch.nn.functional as F

from common.config import ConfigError
from common.losses.blv import BLV, RELEASED_COUNTS, draw_mean, variation_weights
from common.losses.build import LossContext, build_loss
from common.losses.counts import Counts
from common.losses.cross_entropy import pixel_cross_entropy

CITYSCAPES = (
    2036416525, 336090793, 1260636120, 36199498, 48454166, 67789506, 11477088, 30448193, 879783988, 63949536,
    221979646, 67326424, 7463162, 386328286, 14772328, 12990290, 12863955, 5449152, 22861233,
)  # fmt: skip
GTA5 = (
    16139327127, 4158369631, 8495419275, 927064742, 318109335, 532432540, 67453231, 40526481, 3818867486, 1081467674,
    6800402117, 182228033, 15360044, 1265024472, 567736474, 184854135, 32542442, 15832619, 2721193,
)  # fmt: skip
WARM_UP = (  # class shares of a warmed-up network's predictions on Cityscapes, as published
    0.379220, 0.049299, 0.226651, 0.015507, 0.017205, 0.014027, 0.002186, 0.002213, 0.133376, 0.024243, 0.043411,
    0.013146, 0.001615, 0.066048, 0.004075, 0.002789, 0.001847, 0.001229, 0.001912,
)  # fmt: skip
# (σ, folded: P(1), mean, std; positive part: P(1), mean, std), the exact moments of the two limited Gaussians
MOMENTS = [
    (1, 0.317, 0.631, 0.343, 0.159, 0.316, 0.398),
    (3, 0.739, 0.868, 0.266, 0.369, 0.434, 0.473),
    (4, 0.803, 0.901, 0.238, 0.401, 0.450, 0.481),
    (6, 0.868, 0.934, 0.200, 0.434, 0.467, 0.488),
]


def options(**changes):
    return BLV.from_section(changes, "test")


def make(pixels, average="valid", refresh=0, unit=None, **changes):
    section = {"logits": {"name": "blv", **changes}, "counts": {"refresh": refresh}}
    return build_loss(section, LossContext(Counts.from_pixels(pixels), average, pseudo_labels=unit), "test")


def data(shape=(2, 5, 8, 9)):
    logits = torch.randn(shape, requires_grad=True)
    label = torch.randint(-1, shape[1], (shape[0], *shape[2:]), dtype=torch.int16)
    return logits, label


def test_weights_of_published_counts():
    released = variation_weights(RELEASED_COUNTS)
    assert released[[0, 2, 12, 13, 18]].tolist() == pytest.approx([0.1028, 0.1690, 0.8214, 0.5292, 1.0], abs=1e-4)
    first = variation_weights(RELEASED_COUNTS, "max")
    assert first[[0, 2, 12, 13, 18]].tolist() == pytest.approx([0.0, 0.0738, 0.8009, 0.4753, 1.0], abs=1e-4)
    paper = variation_weights(CITYSCAPES)
    assert paper[[0, 8, 12, 14, 17]].tolist() == pytest.approx([0.1442, 0.2654, 0.9546, 0.8559, 1.0], abs=1e-4)


def test_weights_stay_finite_for_absent_equal_and_single_classes():
    assert torch.isfinite(variation_weights([10, 0, 5])).all()
    assert variation_weights([7, 7, 7]).tolist() == [1, 1, 1]
    assert variation_weights([7, 7, 7], "max").tolist() == [0, 0, 0]
    assert variation_weights([7]).tolist() == [0]


@pytest.mark.parametrize("coefficient", ["paper", "max"])
def test_absent_classes_leave_the_weights_of_the_others_alone(coefficient):
    present = variation_weights(CITYSCAPES, coefficient)
    for places in ((0,), (4, 9), (19,), (0, 10, 19)):
        counts = torch.tensor(CITYSCAPES, dtype=torch.float64)
        for place in places:
            counts = torch.cat((counts[:place], torch.zeros(1, dtype=torch.float64), counts[place:]))
        weight = variation_weights(counts, coefficient)
        assert (weight[counts == 0] == 1).all() and torch.equal(weight[counts > 0], present)


def test_the_release_counts_an_absent_class_as_one_pixel():
    """Its coefficient log(Σq) is then the largest, and every other weight smaller."""
    counts = (900, 90, 6, 4, 0)
    expected = [math.log(1001 / max(q, 1)) / math.log(1001) for q in counts]
    assert variation_weights(counts, "paper", "floor").tolist() == pytest.approx(expected)
    closed = [math.log(1000 / q) / math.log(1000 / 4) for q in counts[:4]]
    assert variation_weights(counts).tolist() == pytest.approx([*closed, 1.0])
    assert variation_weights((0, 7, 7), "max").tolist() == [1, 0, 0] and variation_weights((0, 7)).tolist() == [1, 0]
    assert variation_weights((0, 0)).tolist() == [1, 1]
    for preset in ("released-head", "released-first"):
        remedy = options(preset=preset, counts=counts)
        vector = remedy.vector(Counts.from_pixels(counts))
        assert torch.equal(vector, variation_weights(counts, remedy.coefficient, "floor"))
    assert make(counts).offsets[3] == 1 > make(counts, absent="floor").offsets[3]


@pytest.mark.parametrize("sigma, f_one, f_mean, f_std, p_one, p_mean, p_std", MOMENTS)
def test_moments_of_the_limited_draw(sigma, f_one, f_mean, f_std, p_one, p_mean, p_std):
    like = torch.empty(2, 4, 300, 300)
    for limit, one, mean, std in (("folded", f_one, f_mean, f_std), ("positive", p_one, p_mean, p_std)):
        chosen = options(sigma=float(sigma), limit=limit)
        e = chosen.draw(like)
        assert (e == 1).float().mean().item() == pytest.approx(one, abs=3e-3)
        assert e.mean().item() == pytest.approx(mean, abs=3e-3)
        assert e.std().item() == pytest.approx(std, abs=3e-3)
        assert draw_mean(chosen) == pytest.approx(mean, abs=6e-4)


@pytest.mark.parametrize("noise", ["gaussian", "uniform", "beta", "exponential", "constant"])
@pytest.mark.parametrize("limit", ["positive", "folded", "signed", "none"])
def test_centred_draws_have_mean_zero(noise, limit):
    chosen = options(noise=noise, limit=limit, centre=True, sigma=2.0)
    assert chosen.draw(torch.empty(1, 2, 500, 500)).mean().item() == pytest.approx(0, abs=1e-2)


def test_vanishing_sigma_is_cross_entropy():
    logits, label = data()
    loss = make([9, 5, 3, 2, 1], sigma=1e-7)(logits, label)
    expected = F.cross_entropy(logits, label.long(), ignore_index=-1)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("sign", [1, -1])
def test_constant_offset_equals_shifted_logits(sign):
    logits, label = data()
    counts = [900, 50, 30, 20, 1]
    loss = make(counts, noise="constant", sign=sign)(logits, label)
    shifted = logits + sign * variation_weights(counts).view(1, -1, 1, 1)
    torch.testing.assert_close(loss, F.cross_entropy(shifted, label.long(), ignore_index=-1))


def test_gradient_is_softmax_of_perturbed_logits_minus_one_hot():
    logits, label = data()
    loss = make([900, 50, 30, 20, 1], average="all")
    torch.manual_seed(7)
    variation = loss.logits.draw(logits) * loss.offsets.view(1, -1, 1, 1)
    torch.manual_seed(7)
    loss(logits, label).backward()
    valid = (label >= 0).unsqueeze(1)
    one_hot = F.one_hot(label.long().clamp(min=0), 5).permute(0, 3, 1, 2)
    expected = ((logits + variation).softmax(1) - one_hot) * valid / label.numel()
    torch.testing.assert_close(logits.grad, expected.detach(), rtol=1e-5, atol=1e-7)
    assert (logits.grad * ~valid).abs().sum() == 0


def test_averages_differ_by_the_share_of_valid_pixels():
    logits, label = data()
    every, valid = (pixel_cross_entropy(logits, label, average=a) for a in ("all", "valid"))
    torch.testing.assert_close(every, valid * (label >= 0).float().mean())


@pytest.mark.parametrize("average", ["all", "valid"])
def test_all_ignored_gives_zero_and_finite_gradient(average):
    logits, label = data()
    loss = make([9, 5, 3, 2, 1], average=average)(logits, torch.full_like(label, -1))
    loss.backward()
    assert loss.item() == 0 and logits.grad.abs().sum() == 0


def test_pixel_weight_scales_each_pixel():
    logits, label = data()
    weight = torch.rand(label.shape)
    each = F.cross_entropy(logits, label.long(), ignore_index=-1, reduction="none")
    expected = (each * weight).sum() / (label >= 0).sum()
    torch.testing.assert_close(pixel_cross_entropy(logits, label, pixel_weight=weight), expected)


def test_sigma_schedule_rises_and_falls():
    chosen = options(noise="constant", limit="none", schedule="rise_fall")
    means = [chosen.draw(torch.empty(1, 2, 2, 2), p).mean().item() for p in (0, 0.25, 0.5, 0.75, 1)]
    assert means == pytest.approx([0, 0.5, 1, 0.5, 0])


def test_half_precision_and_compile_give_the_float32_loss():
    logits, label = data()
    loss = make([9, 5, 3, 2, 1], noise="constant")
    with torch.autocast("cpu", torch.bfloat16):
        assert loss(logits, label).dtype == torch.float32
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(logits, label), loss(logits, label))


def quarter_grid(images=4):
    """Pseudo-labels of some crops at the paper's size: 128 × 224 cells each, some of them ignored."""
    generator = torch.Generator().manual_seed(0)
    label = torch.multinomial(torch.tensor(WARM_UP), images * 128 * 224, True, generator=generator)
    return label.view(images, 128, 224).masked_fill(torch.rand(images, 128, 224, generator=generator) < 0.2, -1)


def test_pseudo_labels_of_another_domain_weigh_like_all_source_pixels():
    """A thousand steps of quarter grids beside GTA5's 44 · 10⁹ pixels: class shares count, not the number of cells."""
    label = quarter_grid()
    shares = torch.bincount(label[label >= 0], minlength=19).double()
    shares /= shares.sum()
    source = torch.tensor(GTA5, dtype=torch.float64)
    start, expected = variation_weights(GTA5), variation_weights(source + source.sum() * shares)
    for steps in (1, 3):
        refreshed = make(GTA5, refresh=steps, unit="shares")
        for step in range(steps):
            refreshed.count(label, area=16.0)
            assert torch.equal(refreshed.offsets, start)
            refreshed.after_step(step)
        torch.testing.assert_close(refreshed.offsets, expected, rtol=1e-6, atol=0)
    assert start.argmax() == 18 and expected.argmax() == 17, "a bicycle is the rarest in GTA5, a motorcycle in both"
    assert (expected - start).abs().max() > 0.1
    as_pixels = make(GTA5, refresh=1, unit="pixels")
    as_pixels.count(label, area=1000)  # of a thousand steps
    as_pixels.after_step(0)
    assert (as_pixels.offsets - start).abs().max() < 0.01


def test_pseudo_labels_of_the_same_domain_count_as_pixels():
    label = quarter_grid(1)
    refreshed = make(CITYSCAPES, refresh=1, unit="pixels")
    refreshed.count(label, area=64.0)
    refreshed.after_step(0)
    pixels = 64 * torch.bincount(label[label >= 0], minlength=19)
    torch.testing.assert_close(refreshed.offsets, variation_weights(torch.tensor(CITYSCAPES) + pixels))
    refreshed.after_step(1)  # nothing was counted since
    assert torch.equal(refreshed.offsets, variation_weights(CITYSCAPES))


@pytest.mark.parametrize("unit", ["pixels", "shares"])
@pytest.mark.parametrize("counts", ["released", tuple(range(100, 119)), "dataset"])
def test_refreshed_counts_start_from_those_in_use(unit, counts):
    """What the options choose, not always the data set's: before and after a refresh, and after a resume."""
    used = {"released": RELEASED_COUNTS, "dataset": CITYSCAPES}.get(counts, counts)
    section = {} if counts == "dataset" else {"counts": counts}
    label = quarter_grid(1)

    def student_loss():
        return make(CITYSCAPES, refresh=2, unit=unit, **section)

    student = student_loss()
    student.count(label, 4.0)
    student.after_step(0)
    resumed = student_loss()
    resumed.load_state_dict(student.state_dict())
    assert torch.equal(student.offsets, variation_weights(used)) and torch.equal(resumed.offsets, student.offsets)
    for each in (student, resumed):
        each.count(label, 4.0)
        each.after_step(1)
    pseudo = 8 * torch.bincount(label[label >= 0], minlength=19).double()
    pseudo *= sum(used) / pseudo.sum() if unit == "shares" else 1
    torch.testing.assert_close(student.offsets, variation_weights(torch.tensor(used) + pseudo))
    assert torch.equal(resumed.offsets, student.offsets)


@pytest.mark.parametrize("given", [{"preset": "released-head"}, {"counts": list(range(100, 119))}])
def test_given_counts_are_its_own(given):
    """Class weights beside it go by the training labels, as without it, before a refresh and after."""
    sampled = Counts.from_pixels(CITYSCAPES[::-1])
    context = LossContext(Counts.from_pixels(CITYSCAPES), pseudo_labels="shares", sampled=sampled)
    section = {"class_weight": {"name": "inverse"}, "counts": {"of": "sampled", "refresh": 1}}
    both = build_loss({**section, "logits": {"name": "blv", **given}}, context)
    alone = build_loss(section, context)
    unchanged = build_loss({"logits": {"name": "blv", **given}}, context)
    assert torch.equal(both.weights, alone.weights) and torch.equal(both.offsets, unchanged.offsets)
    assert not torch.equal(both.offsets, build_loss({"logits": {"name": "blv"}}, context).offsets)

    label = quarter_grid(1)
    for loss in (both, alone):
        loss.count(label)
        loss.after_step(0)
    assert torch.equal(both.weights, alone.weights)


@pytest.mark.parametrize("wrong", ["5", -1, 0.5])
def test_refresh_is_a_number_of_steps(wrong):
    with pytest.raises(ConfigError, match="test.counts.refresh"):
        make([1, 2], refresh=wrong, unit="pixels")


@pytest.mark.parametrize(
    "section, message",
    [
        ({"noise": "uniform", "sigma": 4.0}, "head.sigma: has no effect with noise: uniform; leave one of them out"),
        ({"noise": "beta", "limit": "folded"}, "head.limit: has no effect with noise: beta"),
        ({"coefficient": "none", "counts": [1, 2]}, "head.counts: has no effect with coefficient: none"),
        ({"coefficient": "none", "absent": "floor"}, "head.absent: has no effect with coefficient: none"),
    ],
)
def test_options_that_nothing_reads_are_said(section, message):
    with pytest.warns(UserWarning, match=message):
        BLV.from_section(section, "head")


def test_a_preset_may_hold_what_nothing_reads():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert options(preset="released-head", noise="uniform").noise == "uniform"
        assert options(preset="paper", sigma=6.0, noise="constant").noise == "constant"  # as a base config has it
        assert options(preset="released-head", coefficient="none").coefficient == "none"


@pytest.mark.parametrize(("preset", "denominator"), [("paper", "valid"), ("released-head", "all")])
def test_the_preset_says_how_to_average(preset, denominator):
    logits, label = data((2, 19, 8, 9))
    loss = make(CITYSCAPES, preset=preset, noise="constant")
    perturbed = loss.adjust(logits, label)
    expected = pixel_cross_entropy(perturbed, label, average=denominator)
    torch.testing.assert_close(loss(logits, label), expected)


@pytest.mark.parametrize(
    "section, words",
    [
        ({"preset": "papr"}, "head.preset: unknown 'papr'; did you mean 'paper'"),
        ({"preset": []}, r"head.preset: unknown \[\]"),
        ({"sgima": 3.0}, "did you mean 'sigma'"),
        ({"sigma": 0.0}, "head.sigma: 0.0 is not above 0"),
        ({"noise": "beta", "sigma": -1.0}, "head.sigma: -1.0 is not above 0"),
        ({"counts": [5, -1]}, r"head.counts\[1\]: -1.0 is less than 0"),
        ({"counts": [0, 0]}, r"head.counts: \(0.0, 0.0\) has no class with pixels"),
        ({"counts": [1, float("nan")]}, r"head.counts\[1\]: nan is not finite"),
        ({"absent": "drop"}, "head.absent: 'drop' is not one of ignore, floor"),
        ({"counts": "gta5"}, "head.counts: expected dataset or released or a list, got 'gta5'"),
        ({"sign": 2}, "not one of 1, -1"),
    ],
)
def test_bad_options_are_named(section, words):
    with pytest.raises(ConfigError, match=words):
        BLV.from_section(section, "head")


def test_released_counts_need_nineteen_classes():
    with pytest.raises(ConfigError, match="19 given for 11"):
        make([1] * 11, preset="released-head")
