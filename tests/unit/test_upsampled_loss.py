"""The loss at label size: its definition, the noise of counters, and the kernels against both."""

import math

import pytest
import torch
import torch.nn.functional as F

from common.losses.blv import BLV, draw_mean
from common.losses.build import LossContext, build_loss
from common.losses.counts import Counts
from common.models import SegmentationModel, segmentor
from common.ops import upsampled_loss as module
from common.ops.counter_noise import Noise, draws, new_seed, philox
from common.ops.deform_attn import triton_missing
from common.ops.upsampled_loss import (
    Change,
    axis,
    fuses,
    tile_of,
    upsampled_labels,
    upsampled_loss,
)
from tests.interpreter import run_interpreted

GAUSSIAN = Noise("gaussian", "positive", 6.0, 0.467)
SEED = torch.tensor([0x0123456789ABCDEF])
# images, classes, logits, label, aligned corners: odd enlargement, more classes than a block holds, no enlargement, a
# smaller map, a map of one cell
LAYOUTS = [
    (1, 3, (3, 4), (5, 13), False),
    (1, 19, (2, 5), (4, 18), True),
    (1, 35, (2, 3), (2, 3), False),
    (2, 3, (5, 7), (2, 3), True),
    (1, 5, (1, 1), (2, 6), False),
]


def example(classes, small, large, batch=2, dtype=torch.float64):
    """Logits, label with ignored pixels, vector, class weights, pixel weights."""
    generator = torch.Generator().manual_seed(classes)
    logits = 3 * torch.randn(batch, classes, *small, generator=generator, dtype=torch.float64)
    label = torch.randint(-1, classes, (batch, *large), generator=generator, dtype=torch.int16)
    vector = torch.rand(classes, generator=generator)
    class_weight = 0.5 + torch.rand(classes, generator=generator)
    pixel_weight = torch.rand(batch, *large, generator=generator)
    return logits.to(dtype).requires_grad_(), label, vector, class_weight, pixel_weight


def value_and_gradient(logits, label, **options):
    logits = logits.detach().requires_grad_()
    loss = upsampled_loss(logits, label, **options)
    return loss.detach(), *torch.autograd.grad(1.5 * loss, logits)


# The definition -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("corners", [False, True])
def test_definition_is_weighted_cross_entropy_of_enlarged_logits(corners):
    logits, label, vector, class_weight, pixel_weight = example(4, (3, 4), (7, 9))
    change = Change(vector, Noise("uniform", "none", 0.7))
    large = F.interpolate(logits, (7, 9), mode="bilinear", align_corners=corners)
    large = large + vector.view(1, -1, 1, 1) * draws(change.noise, SEED, large.shape)

    expected = 0.0
    for b, i, j in (label >= 0).nonzero().tolist():
        y = int(label[b, i, j])
        loss = large[b, :, i, j].logsumexp(0) - large[b, y, i, j]
        expected = expected + loss * class_weight[y] * pixel_weight[b, i, j]

    options = {"change": change, "class_weight": class_weight, "pixel_weight": pixel_weight, "seed": SEED}
    torch.testing.assert_close(upsampled_loss(logits, label, align_corners=corners, **options), expected)


def test_numeric_gradients_of_the_definition():
    logits, label, vector, class_weight, pixel_weight = example(3, (2, 3), (4, 5), batch=1)
    options = {"class_weight": class_weight, "pixel_weight": pixel_weight, "seed": SEED}

    def loss(z):
        return upsampled_loss(z, label, align_corners=False, change=Change(vector, GAUSSIAN), **options)

    assert torch.autograd.gradcheck(loss, logits)


def test_shapes_that_do_not_fit_are_refused():
    logits, label, vector, *_ = example(3, (2, 3), (4, 5))
    with pytest.raises(ValueError, match=r"\(B, K, h, w\) and \(B, H, W\) are expected"):
        upsampled_loss(logits, label[:1], align_corners=False)
    with pytest.raises(ValueError, match="change .2,.: one number a class"):
        upsampled_loss(logits, label, align_corners=False, change=Change(vector[:2]))
    with pytest.raises(ValueError, match="class_weight .2,.: one number a class"):
        upsampled_loss(logits, label, align_corners=False, class_weight=vector[:2])
    with pytest.raises(ValueError, match="does not fit the label"):
        upsampled_loss(logits, label, align_corners=False, pixel_weight=torch.ones(2, 4, 4))


@pytest.mark.parametrize("size", [(1, 7), (3, 12), (5, 13), (7, 7), (9, 4), (6, 1)])
@pytest.mark.parametrize("corners", [False, True])
def test_an_axis_is_that_of_interpolate(size, corners):
    """An enlarged unit vector is the weights of its cell, the first one of pixels start[i] … start[i + 1] − 1."""
    cells, pixels = size
    low, share, start = axis(cells, pixels, corners, torch.device("cpu"))
    weights = torch.zeros(pixels, cells)
    weights[range(pixels), low.long()] += 1 - share
    weights[range(pixels), (low.long() + 1).clamp(max=cells - 1)] += share

    units = torch.eye(cells).view(cells, 1, 1, cells)
    expected = F.interpolate(units, (1, pixels), mode="bilinear", align_corners=corners)
    torch.testing.assert_close(weights, expected.view(cells, pixels).T)
    for i in range(cells):
        assert (low[start[i] : start[i + 1]] == i).all()
    assert start[0] == 0 and start[-1] == pixels


@pytest.mark.parametrize("corners", [False, True])
def test_tiles_hold_all_columns_of_their_cells(corners):
    for cells, pixels in ((1, 7), (32, 128), (128, 512), (65, 513), (128, 128), (40, 13), (16, 512), (6, 800)):
        tile, width = tile_of(cells, pixels, corners)
        low = axis(cells, pixels, corners, torch.device("cpu")).low
        for x in range(0, cells, width):
            reached = ((low >= x - 1) & (low < x + width)).nonzero()
            assert not len(reached) or reached[-1] - reached[0] // 4 * 4 < tile
    assert tile_of(1, 600, corners) is None


def test_the_cpu_keeps_its_form():
    assert not fuses(torch.empty(1, 3, 4, 4), (16, 16), False)
    assert not fuses(torch.empty(1, 3, 4, 4, device="meta"), (16, 16), False)


def test_compiles_in_one_graph():
    """With the trace's own backward; no code is generated, so it needs no compiler."""
    logits, label, vector, *_ = example(3, (2, 3), (4, 5))

    def loss(z):
        assert module.tile_of(z.shape[-1], 5, False) == (128, 3)
        return upsampled_loss(z, label, align_corners=False, change=Change(vector, GAUSSIAN), seed=SEED)

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    ours, theirs = (torch.autograd.grad(call(logits), logits)[0] for call in (compiled, loss))
    torch.testing.assert_close(ours, theirs)


# Noise --------------------------------------------------------------------------------------------------------------


def test_philox_gives_the_published_words():
    """Known answers of its authors' library Random123."""

    def words(counter, key, rounds):
        counter = [torch.tensor([c]) for c in counter]
        return [f"{int(w):08x}" for w in philox(counter, torch.tensor([key[0] + (key[1] << 32)]), rounds)]

    ones, pi = 0xFFFFFFFF, (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344)
    assert words([0] * 4, (0, 0), 7) == ["5f6fb709", "0d893f64", "4f121f81", "4f730a48"]
    assert words([0] * 4, (0, 0), 10) == ["6627e8d5", "e169c58d", "bc57ac4c", "9b00dbd8"]
    assert words(pi, (0xA4093822, 0x299F31D0), 10) == ["d16cfe09", "94fdcceb", "5001e420", "24126ea1"]
    assert max(int(w, 16) for w in words([ones] * 4, (ones, 0), 7)) <= ones


@pytest.mark.parametrize("limit", ["positive", "folded", "signed", "none"])
@pytest.mark.parametrize("law", ["gaussian", "uniform", "beta", "exponential"])
def test_noise_has_the_law_of_blv(law, limit):
    """Mean, spread and the share of exact values of BLV's own draws."""
    remedy = BLV(noise=law, limit=limit, sigma=2.0)
    change = remedy.change(torch.ones(4), 0.0)
    e = draws(change.noise, SEED, (1, 4, 250, 250))
    reference = remedy.draw(e)
    assert e.mean().item() == pytest.approx(draw_mean(remedy), abs=1.5e-2)
    assert e.std().item() == pytest.approx(reference.std().item(), abs=1.5e-2)
    for value in (0, 1, -1):
        expected = (reference == value).float().mean().item()
        assert (e == value).float().mean().item() == pytest.approx(expected, abs=5e-3)


def test_places_and_seeds_are_independent():
    noise = Noise("gaussian", "none", 1.0)
    e = draws(noise, SEED, (2, 4, 40, 42))
    assert torch.equal(e, draws(noise, SEED, (2, 4, 40, 42)))
    assert torch.equal(e[:1, :3, :7, :9], draws(noise, SEED, (1, 3, 7, 9)))
    for other in (SEED + 1, SEED + 2**32):
        assert abs(torch.corrcoef(torch.stack((e.flatten(), draws(noise, other, e.shape).flatten())))[0, 1]) < 0.03
    for shifted in (e[1:], e[:, 1:], e[:, :, 1:], e[..., 1:], e[..., 2:], e[..., 4:]):
        first = e[tuple(slice(n) for n in shifted.shape)]
        assert abs(torch.corrcoef(torch.stack((first.flatten(), shifted.flatten())))[0, 1]) < 0.03


def test_seeds_follow_torch_s_generator():
    torch.manual_seed(5)
    first, second = new_seed(torch.device("cpu")), new_seed(torch.device("cpu"))
    torch.manual_seed(5)
    assert torch.equal(new_seed(torch.device("cpu")), first) and first != second


def test_constant_noise_and_schedules_of_blv():
    """Without noise the change is a vector; at the ends of rise and fall there is none."""
    vector = torch.tensor([0.2, 1.0])
    plain = BLV(noise="constant", sign=-1, amplitude=3.0).change(vector, 0.3)
    assert plain.noise is None and plain.vector.tolist() == pytest.approx([-0.6, -3.0])
    assert not BLV(noise="constant", centre=True).change(vector, 0.3).vector.any()
    late = BLV(schedule="rise_fall", sigma=4.0).change(vector, 0.75)
    assert late.noise.scale == pytest.approx(2.0)
    centred = BLV(centre=True).change(vector, 0.0)
    assert centred.noise.shift == pytest.approx(draw_mean(BLV()))


# Labels -------------------------------------------------------------------------------------------------------------


def test_labels_are_those_of_enlarged_logits():
    logits, *_ = example(5, (3, 4), (11, 14))
    label, confidence = upsampled_labels(logits, (11, 14), align_corners=True, shown=(10, 12))
    large = F.interpolate(logits, (11, 14), mode="bilinear", align_corners=True)[..., :10, :12].softmax(1)
    assert torch.equal(label, large.argmax(1)) and torch.equal(confidence, large.amax(1))


# Kernels ------------------------------------------------------------------------------------------------------------

needs_triton = pytest.mark.skipif(triton_missing() is not None, reason="Triton cannot run")


@needs_triton
def test_kernels_under_the_interpreter():
    run_interpreted(__name__, "check_kernels")


@needs_triton
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_kernels_on_the_gpu():
    check_kernels("cuda")


def check_kernels(device):
    check_model(device)
    check_values(device)
    check_care(device)
    check_methods(device)


def check_values(device):
    """Loss, gradients, labels and confidence against the definition in float64."""
    uniform, beta, exponential = (
        Noise("uniform", "none", 1.0), Noise("beta", "signed", 1.0), Noise("exponential", "folded", 1.0)
    )  # fmt: skip
    laws = [GAUSSIAN, None, uniform, beta, exponential]
    for (batch, classes, small, large, corners), noise in zip(LAYOUTS, laws, strict=True):
        exact, *others = (t.detach().to(device) for t in example(classes, small, large, batch))
        label, vector, class_weight, pixel_weight = others
        options = {"align_corners": corners, "class_weight": class_weight, "pixel_weight": pixel_weight}
        options |= {"change": Change(vector, noise), "seed": SEED.to(device)}
        loss, gradient = value_and_gradient(exact.float(), label, form="triton", **options)
        expected, slope = value_and_gradient(exact, label, form="torch", **options)
        assert abs(loss - expected) <= 1e-6 * expected
        assert (gradient - slope).norm() <= 2e-6 * slope.norm()

        form = {"align_corners": corners, "shown": (large[0], large[1] - 1)}
        label, confidence = upsampled_labels(exact.float(), large, form="triton", **form)
        best, expected = upsampled_labels(exact, large, form="torch", **form)
        assert torch.equal(label, best)
        torch.testing.assert_close(confidence.double(), expected, rtol=1e-5, atol=1e-6)


class Given(SegmentationModel):
    """A network whose logits are given; it pads images to a multiple of 4."""

    def __init__(self, logits):
        super().__init__(logits.shape[1], (0, 0, 0), (1, 1, 1), divisor=4)
        self.logits = logits

    def segment(self, x):
        return {"logits": self.logits}


def check_model(device):
    """A network's labels and confidence are those of its bands, padding left out; resized twice they are not fused."""
    logits = example(4, (1, 2), (2, 5), 1, torch.float32)[0].detach().to(device)
    model, images = Given(logits).to(device), torch.zeros(1, 3, 3, 5, device=device)
    offsets = torch.tensor([0.0, 3.0, 0.0, -1.0])
    choose = module.choose_form
    for size, fused in ((None, True), ((2, 3), False)):
        found = []
        for form in ("torch", "triton"):
            module.choose_form = segmentor.choose_form = lambda logits, form=form: form
            found.append(model.labels(images, size, offsets))
        assert model._fuses({"logits": logits}, model._geometry(images, size)) == fused
        module.choose_form = segmentor.choose_form = choose
        assert torch.equal(found[0][0], found[1][0])
        torch.testing.assert_close(found[0][1], found[1][1])


def check_care(device):
    """Half precision, memory formats, ignored and impossible labels, seeds, and the operator's registration."""
    logits, label, vector, *_ = (t.detach().to(device) for t in example(4, (2, 3), (2, 7), 1, torch.float32))
    options = {"align_corners": False, "form": "triton"}
    loss, gradient = value_and_gradient(logits, label, **options)

    for dtype in (torch.bfloat16, torch.float16):  # sums in float32, only the gradient is rounded
        wide, slope = value_and_gradient(logits.to(dtype).float(), label, **options)
        half, rounded = value_and_gradient(logits.to(dtype), label, **options)
        assert torch.equal(half, wide) and rounded.dtype == dtype
        torch.testing.assert_close(rounded.float(), slope, rtol=torch.finfo(dtype).eps, atol=1e-6)

    last = logits.contiguous(memory_format=torch.channels_last)
    same, slope = value_and_gradient(last, label.long(), **options)
    assert torch.equal(same, loss) and torch.equal(slope, gradient)
    assert slope.is_contiguous(memory_format=torch.channels_last)

    every = label.clamp(min=0)  # of a width that is no multiple of a tile's
    pairs = (value_and_gradient(logits, every.to(kind), **options) for kind in (torch.uint8, torch.int16))
    assert all(map(torch.equal, *pairs))

    nothing, zero = value_and_gradient(logits, torch.full_like(label, -1), **options)
    assert nothing == 0 and not zero.any()
    for wrong in (4, -2):
        assert upsampled_loss(logits, torch.full_like(label, wrong), **options).isnan()

    noisy = {**options, "change": Change(vector, GAUSSIAN)}
    first = value_and_gradient(logits, label, seed=SEED.to(device), **noisy)
    again = value_and_gradient(logits, label, seed=SEED.to(device), **noisy)
    assert all(map(torch.equal, first, again))
    assert value_and_gradient(logits, label, seed=SEED.to(device) + 1, **noisy)[0] != first[0]
    torch.manual_seed(1)
    drawn = value_and_gradient(logits, label, **noisy)
    torch.manual_seed(1)
    assert all(map(torch.equal, drawn, value_and_gradient(logits, label, **noisy)))

    check_registration(logits, label, vector, device)


def check_registration(logits, label, vector, device):
    """Schema, fake tensors and autograd, which torch.compile relies on; one graph; no second derivative."""
    logits = logits.requires_grad_()
    arguments = (logits, label, vector, None, None, SEED.to(device), True, *GAUSSIAN[:2], 6.0, 0.5)
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(module._fused, arguments, test_utils=checks)
    torch.library.opcheck(module._fused_labels, (logits.detach(), [2, 7], [1, 7], True), test_utils=checks)

    def doubled(z):
        return upsampled_loss(2 * z, label, align_corners=False, form="triton")

    compiled = torch.compile(doubled, fullgraph=True, backend="aot_eager")
    pair = (torch.autograd.grad(call(logits), logits)[0] for call in (compiled, doubled))
    torch.testing.assert_close(*pair)

    loss = upsampled_loss(logits, label, align_corners=False, form="triton")
    (gradient,) = torch.autograd.grad(loss.square(), logits, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiated once only"):
        gradient.sum().backward()


def check_methods(device):
    """`PixelLoss` gives what it gives without the kernels, whatever they can be used for."""
    counts = Counts(torch.tensor([900.0, 90, 9, 1]).double(), torch.tensor([10.0, 9, 4, 2]), 10.0)
    logits, label, _, _, weight = (t.detach().to(device) for t in example(4, (2, 3), (2, 7), 1, torch.float32))
    choose = module.choose_form
    sections = [
        ({}, {"pixel_weight": weight}),
        ({"logits": {"name": "logit_adjustment"}}, {}),
        ({"logits": {"name": "blv", "noise": "constant"}, "class_weight": {"name": "inverse"}}, {}),
        ({"logits": {"name": "ldam"}}, {}),
        ({"focus": {"name": "focal"}}, {}),
    ]
    for section, extra in sections:
        loss = build_loss(section, LossContext(counts, cosine=30.0)).to(device)
        found = []
        for form in ("torch", "triton"):
            module.choose_form = lambda logits, form=form: form
            z = logits.clone().requires_grad_()
            value = loss.upsampled(z, label, align_corners=True, progress=0.5, **extra)
            same = value if extra else loss.enlarged(z, label, align_corners=True, progress=0.5)
            torch.testing.assert_close(same, value)
            found.append((value.detach(), *torch.autograd.grad(value, z)))
        fused = loss.fuses(logits, label, True)
        module.choose_form = choose
        assert fused == (section.get("logits", {}).get("name") != "ldam" and "focus" not in section)
        for ours, theirs in zip(*found, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    assert math.isfinite(found[0][0])
