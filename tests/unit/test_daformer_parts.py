"""The parts of DAFormer's step in closed form: mixing, colour, blur, masks, margins, feature distance."""

import colorsys

import numpy as np
import pytest
import torch

from common.data.geometry import Geometry, nearest_crop
from common.losses.feature_distance import cells_of, feature_distance, main_class
from common.ops.block_mask import block_mask, block_noise
from common.ops.class_mix import choose_classes, class_mask, paste
from common.ops.colour import Jitter, blur, draw_jitter, jitter, taps, to_hsv, to_rgb
from uda.confidence import Margins, confident_share, crop_margins, image_margins, shown_pixels, valid_pixels

NEUTRAL = (1.0, 1.0, 1.0, 0.0)


def factors(*values, batch=2):
    return Jitter(*(torch.full((batch,), value) for value in values))


# ClassMix ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("classes, half", [((0, 1, 2, 3), 2), ((0, 1, 2, 3, 4), 3), ((2,), 1), ((-1, 3, 4), 2)])
def test_half_of_the_classes_of_the_batch(classes, half):
    """Each image draws among all of them, whichever it shows itself."""
    label = torch.tensor(classes)[torch.randint(len(classes), (2, 8, 8))]
    label[0, 0, : len(classes)] = torch.tensor(classes)
    drawn = torch.stack([choose_classes(label, 6) for _ in range(200)])
    assert (drawn.sum(2) == half).all()
    columns = [6 if c < 0 else c for c in classes]
    rates = drawn.float().mean((0, 1))
    assert rates[columns].sub(half / len(classes)).abs().max() < 0.15
    assert drawn[..., [c for c in range(7) if c not in columns]].sum() == 0


def test_what_an_image_does_not_show_pastes_nothing():
    label = torch.randint(0, 3, (2, 4, 5))
    none, every = torch.zeros(2, 6, dtype=torch.bool), torch.ones(2, 6, dtype=torch.bool)
    none[:, 4] = True
    source, target = torch.rand(2, 3, 4, 5), torch.rand(2, 3, 4, 5)
    assert torch.equal(paste(class_mask(label, none), source, target), target)
    assert torch.equal(paste(class_mask(label, every), source, target), source)


def test_ignored_pixels_are_pasted_like_a_class():
    label = torch.tensor([[[-1, 0]]])
    chosen = torch.tensor([[False, False, True]])
    assert torch.equal(paste(class_mask(label, chosen), label, torch.full_like(label, 1)), torch.tensor([[[-1, 1]]]))


# Colour --------------------------------------------------------------------------------------------------------------


def test_neutral_factors_change_nothing():
    rgb = torch.rand(2, 3, 7, 9)
    torch.testing.assert_close(jitter(rgb, factors(*NEUTRAL), (3, 1, 0, 2)), rgb, atol=1e-5, rtol=0)


def test_brightness_is_added_and_contrast_scales_about_black():
    grey = torch.full((2, 3, 2, 2), 0.5)
    torch.testing.assert_close(jitter(grey, factors(1.2, 1, 1, 0), (0,)), grey + 0.2)
    torch.testing.assert_close(jitter(grey, factors(1, 0.8, 1, 0), (1,)), grey * 0.8)


def test_colours_are_those_of_colorsys():
    rgb = torch.rand(1, 3, 5, 6, dtype=torch.float64)
    rgb[..., 0, 0] = 0.3  # grey
    hue, saturation, value = to_hsv(rgb)
    expected = [colorsys.rgb_to_hsv(*pixel) for pixel in rgb[0].flatten(1).T.tolist()]
    found = torch.cat((hue, saturation, value), 1)[0].flatten(1).T
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), atol=1e-4, rtol=0)
    torch.testing.assert_close(to_rgb(hue + 2, saturation, value), rgb, atol=1e-4, rtol=0)


def test_drawn_factors_lie_within_the_strength():
    torch.manual_seed(0)
    drawn = torch.stack(draw_jitter(1000, 0.2, torch.device("cpu")))
    centre = torch.tensor(NEUTRAL)[:, None]
    assert 0.19 < (drawn - centre).abs().max() <= 0.2
    assert (drawn - centre).mean(1).abs().max() < 0.02


def test_blur_keeps_constants_and_is_a_gaussian():
    torch.testing.assert_close(blur(torch.ones(2, 3, 64, 80), torch.tensor([0.2, 1.1])), torch.ones(2, 3, 64, 80))
    point = torch.zeros(1, 1, 161, 161)
    point[..., 80, 80] = 1
    spread = blur(point, torch.tensor([1.0]))[0, 0]
    y, x = torch.meshgrid(*2 * [torch.arange(161.0) - 80], indexing="ij")
    torch.testing.assert_close(spread, torch.exp(-(x**2 + y**2) / 2) / (2 * np.pi), atol=1e-6, rtol=0)


def test_length_of_the_kernel():
    assert [taps(side) for side in (8, 45, 64, 128, 512, 1024)] == [1, 5, 7, 13, 15, 15]


# Masks of blocks -----------------------------------------------------------------------------------------------------


def test_share_of_visible_blocks():
    torch.manual_seed(0)
    noise = block_noise(torch.zeros(4, 3, 640, 640), 16)
    assert noise.shape == (4, 1, 40, 40)
    mask = block_mask(noise, (640, 640), 0.7)
    assert mask.float().mean().item() == pytest.approx(0.3, abs=0.02)
    assert not block_mask(noise, (64, 64), 1.0).any() and block_mask(noise.clamp(min=0.1), (64, 64), 0.0).all()
    blocks = mask.unflatten(2, (40, 16)).unflatten(4, (40, 16))
    assert torch.equal(blocks, blocks[:, :, :, :1, :, :1].expand_as(blocks))


# Pseudo-labels -------------------------------------------------------------------------------------------------------


def test_a_probability_equal_to_the_threshold_is_confident():
    probability = torch.full((1, 2, 2), 0.25)
    assert confident_share(probability, 0.25) == 1 and confident_share(probability, 0.2500001) == 0


def test_one_share_for_the_whole_batch():
    probability = torch.stack((torch.ones(4, 4), torch.full((4, 4), 0.5)))
    assert confident_share(probability, 0.968) == 0.5


def test_margins_of_the_crop():
    inside = crop_margins((6, 5), Margins(top=1, bottom=2, left=1), torch.device("cpu"))
    assert inside.shape == (1, 6, 5) and inside.sum() == 3 * 4
    assert inside[0, 1:4, 1:].all()


@pytest.mark.parametrize("flip", [0, 1])
@pytest.mark.parametrize("size", [(40, 60), (80, 120), (20, 30)])
def test_margins_of_the_image_are_a_map_of_it_that_is_cut_as_labels_are(size, flip):
    """At integer scales the rule of nearest neighbours is exact; a crop larger than the image is 0 in its padding."""
    margins, crop = Margins(top=6, bottom=10, left=4, right=8, of="image"), (32, 48)
    stored = np.zeros((40, 60), np.float32)
    stored[6:-10, 4:-8] = 1
    g = Geometry(40, 60, *size, min(4, max(size[0] - 32, 0)), min(8, max(size[1] - 48, 0)), flip)
    expected = np.zeros(crop, np.float32)
    cut = nearest_crop(stored, g, crop)
    expected[: cut.shape[0], : cut.shape[1]] = cut
    assert torch.equal(image_margins(g.array()[None], crop, margins)[0], torch.from_numpy(expected))


@pytest.mark.parametrize("of", ["crop", "image"])
@pytest.mark.parametrize("flip", [0, 1])
def test_what_the_network_pads_never_counts(of, flip):
    """A crop of 100², the lower left quarter of its image, of which the network makes 104²."""
    geometry = Geometry(200, 200, 200, 200, 100, 0, flip).array()[None]
    target = {"image": torch.zeros(1, 3, 100, 100), "geometry": geometry, "extent": torch.tensor([[100, 100]])}
    size = (104, 104)
    valid = valid_pixels(target, size, Margins(bottom=10, left=10, of=of), shown_pixels(target, size))
    expected = torch.zeros(1, 104, 104)
    across = slice(90) if flip and of == "image" else slice(10, 100)
    expected[:, :90, across] = 1
    assert torch.equal(valid, expected)


def test_padding_of_small_images_never_counts():
    target = {"image": torch.zeros(2, 3, 100, 100), "extent": torch.tensor([[60, 100], [100, 50]])}
    expected = torch.zeros(2, 104, 104)
    expected[0, :60, :100] = 1
    expected[1, :100, :50] = 1
    shown = shown_pixels(target, (104, 104))
    assert torch.equal(shown, expected)
    for margins in (Margins(), Margins(top=5), Margins(top=5, of="image")):
        target["geometry"] = torch.tensor([[60, 100, 60, 100, 0, 0, 0], [100, 50, 100, 50, 0, 0, 0]])
        valid = valid_pixels(target, (104, 104), margins, shown)
        expected[:, : margins.top] = 0
        assert torch.equal(valid, expected)

    free = {"image": torch.zeros(2, 3, 104, 104)}
    assert torch.equal(valid_pixels(free, (104, 104), Margins(), None), torch.ones(1, 104, 104))


@pytest.mark.parametrize("small", [True, False])
def test_padding_has_no_part_in_the_confident_share(small):
    """It is that of the images alone, whatever the teacher says of padding, by the recipe or by the network."""
    g = torch.Generator().manual_seed(0)
    probability = (3 * torch.randn(2, 4, 32, 32, generator=g)).softmax(1).amax(1)
    extents = [(20, 30), (30, 12)] if small else [(30, 30), (30, 30)]
    target = {"image": torch.zeros(2, 3, 30, 30)}
    if small:
        target["extent"] = torch.tensor(extents)
    confident = [(probability[i, :h, :w] >= 0.9).flatten() for i, (h, w) in enumerate(extents)]
    share = confident_share(probability, 0.9, shown_pixels(target, (32, 32)))
    torch.testing.assert_close(share, torch.cat(confident).float().mean())
    assert shown_pixels({"image": torch.zeros(2, 3, 32, 32)}, (32, 32)) is None


# Feature distance ----------------------------------------------------------------------------------------------------


def test_equal_features_have_no_distance_and_no_gradient():
    features = torch.rand(1, 4, 2, 2, requires_grad=True)
    loss = feature_distance(features, features.detach().clone(), torch.ones(1, 2, 2, dtype=torch.bool))
    assert loss == 0 and not torch.autograd.grad(loss, features)[0].any()


def test_distance_is_that_of_euclid():
    a, b = torch.zeros(1, 2, 1, 2), torch.tensor([[[[3.0, 1.0]], [[4.0, 1.0]]]])
    assert feature_distance(a, b, torch.tensor([[[True, False]]])) == 5


def test_share_of_a_cell():
    """12 of 16 pixels are three quarters exactly."""
    label = torch.zeros(1, 4, 8, dtype=torch.int64)
    label[0, 0, :4] = 1
    label[0, 0, 4:] = 1
    label[0, 1, 4] = 1
    assert main_class(label, (1, 2), 2, 0.75).tolist() == [[[0, -1]]]
    assert cells_of(label, (1, 2), torch.tensor([True, False]), 0.75).tolist() == [[[True, False]]]
    assert (main_class(torch.full((1, 4, 8), -1), (1, 2), 2, 0.75) == -1).all()
