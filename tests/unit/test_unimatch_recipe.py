"""UniMatch's views against Pillow, closed forms and the statistics of the release."""

import numpy as np
import pytest
import torch
from PIL import Image

from common.config import ConfigError
from common.data import IGNORE, build_transform
from common.data.geometry import Geometry
from common.data.recipes.unimatch import draw_box, shown
from tests.unit.data_files import classes, opened, picture, pillow_resize

SIZE = (60, 90)
CROP = (40, 40)


def rng(seed=0):
    return np.random.default_rng(seed)


def views(**options):
    return build_transform({"recipe": "unimatch", "crop": CROP, **options})


def test_sizes():
    for size in ((50, 75), (75, 50)):
        drawn = [views().draw(size, rng(k)) for k in range(3000)]
        longest = {max(g.height, g.width) for g in drawn}
        assert (min(longest), max(longest)) == (37, 150)
        assert all((g.width >= g.height) == (size[1] >= size[0]) for g in drawn)
        assert all(min(g.height, g.width) == int(50 * max(g.height, g.width) / 75 + 0.5) for g in drawn)


def test_labelled_sample_against_pillow():
    """Resize, pad with black, crop and mirror done one after the other on whole images."""
    pixels, label = picture(*SIZE), classes(*SIZE, 9).astype(np.int16)
    for seed in range(12):
        out = views()(opened(pixels, label), rng(seed), None, 0)
        g = Geometry(*out["geometry"].tolist())
        size = (g.width, g.height)
        image = np.array(pillow_resize(Image.fromarray(pixels), size, Image.Resampling.BILINEAR))
        target = np.array(Image.fromarray(label.astype(np.uint8)).resize(size, Image.Resampling.NEAREST)).astype(int)
        short = [(0, max(40 - g.height, 0)), (0, max(40 - g.width, 0))]
        image = np.pad(image, (*short, (0, 0)))[g.y : g.y + 40, g.x : g.x + 40].transpose(2, 0, 1)
        target = np.pad(target, short, constant_values=IGNORE)[g.y : g.y + 40, g.x : g.x + 40]
        step = -1 if g.flip else 1
        apart = np.abs(out["image"].numpy().astype(int) - image[..., ::step])
        assert apart.max() <= 2 and (apart > 0).mean() < 0.15  # roundings
        assert np.array_equal(out["label"], target[..., ::step])
        assert torch.equal(shown(g, CROP), out["label"] != IGNORE)


def test_views_are_of_one_crop_and_the_partner_of_another():
    pixels = picture(*SIZE)
    out = views(views=2, partner=True)(opened(pixels), rng(3), None, 0)
    keys = {"weak", "strong1", "strong2", "shown"}
    assert {key for key in out if key.startswith("partner_")} == {f"partner_{key}" for key in keys}
    assert keys | {"box1", "box2"} <= set(out) and "image" not in out
    assert not torch.equal(out["weak"], out["partner_weak"])
    assert torch.equal(out["weak"], views()(opened(pixels), rng(3), None, 0)["image"])
    assert out["shown"].dtype == torch.bool and out["shown"].shape == CROP and out["box1"].dtype == torch.int32

    outs = [views(views=1)(opened(pixels), rng(k), None, 0) for k in range(300)]
    assert all("strong2" not in out and "partner_weak" not in out for out in outs)
    grey = np.mean([bool((out["strong1"] == out["strong1"][:1]).all()) for out in outs])
    same = np.mean([torch.equal(out["strong1"], out["weak"]) for out in outs])
    assert grey == pytest.approx(0.2, abs=0.07) and same == pytest.approx(0.2 * 0.8 * 0.5, abs=0.05)


def test_boxes_have_the_statistics_of_the_release():
    boxes = np.array([draw_box((321, 321), rng(k)) for k in range(10_000)])
    top, left, bottom, right = boxes.T
    area = (bottom - top) * (right - left) / 321**2
    some = area > 0
    assert (boxes >= 0).all() and (boxes <= 321).all() and (boxes[~some] == 0).all()
    assert some.mean() == pytest.approx(0.5, abs=0.02) and area[some].mean() == pytest.approx(0.207, abs=0.005)
    assert area[some].min() > 0.019 and area[some].max() < 0.4
    assert ((bottom - top) > (right - left))[some].mean() > 0.6  # aspects are uniform in height over width


@pytest.mark.parametrize("crop", [(64, 640), (640, 64)])
def test_boxes_of_a_long_crop(crop):
    """An area that has no place at any aspect is drawn again: without that, one of seven boxes never comes."""
    boxes = np.array([draw_box(crop, rng(k)) for k in range(60)])
    area = (boxes[:, 2:] - boxes[:, :2]).prod(1)
    assert (boxes >= 0).all() and (boxes[:, 2:] <= crop).all()
    assert (area > 0).mean() == pytest.approx(0.5, abs=0.2) and area.max() <= 0.4 * 64 * 640


def test_a_crop_that_is_too_long_for_boxes():
    message = r"augment.crop: \[8, 121\] is too long for CutMix's boxes; its sides may differ by a factor of 15"
    with pytest.raises(ConfigError, match=message):
        build_transform({"recipe": "unimatch", "crop": (8, 121), "views": 1})
    build_transform({"recipe": "unimatch", "crop": (8, 120), "views": 1})
    build_transform({"recipe": "unimatch", "crop": (8, 121)})  # of labelled images, without boxes


def test_partner_needs_views():
    with pytest.raises(ValueError, match="partner: true needs views"):
        views(partner=True)
