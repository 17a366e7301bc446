"""Resize, crop and mirror against the whole-image operations of torch, OpenCV (where installed) and Pillow."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from common.data.geometry import Geometry, bilinear, fit, nearest_crop, pillow, pillow_nearest_index
from common.data.images import Picture
from tests.unit.data_files import assert_close, classes, picture, pillow_resize, save

SIZE = (60, 90)


def rng(seed=0):
    return np.random.default_rng(seed)


def geometries(crop, count=12):
    generator = rng(5)
    for k in range(count):
        height, width = (int(s * generator.uniform(0.5, 2)) for s in SIZE)
        y, x = (int(generator.integers(max(s - c, 0) + 1)) for s, c in zip((height, width), crop, strict=True))
        yield Geometry(*SIZE, height, width, y, x, k % 2)


def cut(array, g, crop):
    """The crop of a whole resized image (..., h, w), mirrored."""
    part = array[..., g.y : g.y + crop[0], g.x : g.x + crop[1]]
    return part.flip(-1) if g.flip else part


@pytest.mark.parametrize("suffix", ["png", "jpg"])
def test_bilinear_crop_is_the_crop_of_the_whole_resize(tmp_path, suffix):
    path = save(picture(*SIZE), tmp_path / f"a.{suffix}")
    image = torch.from_numpy(Picture(path).pixels()).permute(2, 0, 1)[None].double()
    for g in geometries((24, 30)):
        whole = F.interpolate(image, (g.height, g.width), mode="bilinear", align_corners=False)[0]
        ours = bilinear(Picture(path), g, (24, 30))
        assert ours.dtype == torch.uint8
        difference = (ours - cut(whole, g, (24, 30))).abs()
        assert difference.max() <= 0.5 + 1e-3  # rounded to the nearest


def test_bilinear_and_nearest_against_opencv():
    cv2 = pytest.importorskip("cv2")
    pixels, label = picture(*SIZE), classes(*SIZE, 9).astype(np.int16)
    for g in geometries((24, 30), 40):
        whole = torch.from_numpy(cv2.resize(pixels, (g.width, g.height))).permute(2, 0, 1).int()
        assert (bilinear(Picture.of(pixels), g, (24, 30)).int() - cut(whole, g, (24, 30))).abs().max() <= 1
        expected = torch.from_numpy(cv2.resize(label, (g.width, g.height), interpolation=cv2.INTER_NEAREST))
        assert np.array_equal(nearest_crop(label, g, (24, 30)), cut(expected, g, (24, 30)))


def test_nearest_rule_on_many_sizes():
    cv2 = pytest.importorskip("cv2")
    generator = rng(1)
    for _ in range(300):
        stored, size = (int(v) for v in generator.integers(2, 3000, 2))
        line = np.arange(stored, dtype=np.int16)[None]
        g = Geometry(1, stored, 1, size, 0, 0, 0)
        expected = cv2.resize(line, (size, 1), interpolation=cv2.INTER_NEAREST)
        assert np.array_equal(nearest_crop(line, g, (1, size)), expected), (stored, size)


def test_pillow_nearest_rule():
    generator = rng(2)
    for _ in range(100):
        stored, size = (int(v) for v in generator.integers(2, 2500, 2))
        line = Image.fromarray(np.arange(stored, dtype=np.int32)[None])
        expected = np.array(line.resize((size, 1), Image.Resampling.NEAREST))[0]
        assert np.array_equal(pillow_nearest_index(size, stored, 0, size), expected), (stored, size)
        assert np.array_equal(pillow_nearest_index(size, stored, size // 2, 1), expected[size // 2 : size // 2 + 1])


@pytest.mark.parametrize("kernel", [Image.Resampling.BILINEAR, Image.Resampling.BICUBIC])
def test_pillow_crop_is_the_crop_of_the_whole_resize(tmp_path, kernel):
    path = save(picture(*SIZE), tmp_path / "a.png")
    for g in geometries((24, 30)):
        whole = pillow_resize(Image.open(path), (g.width, g.height), kernel)
        expected = cut(torch.from_numpy(np.array(whole)).permute(2, 0, 1), g, (24, 30))
        assert_close(pillow(Picture(path), g, (24, 30), kernel), expected)


def test_fit_keeps_the_aspect():
    assert fit((1024, 2048), (1024, 2048)) == (1024, 2048)
    assert fit((360, 480), (1024, 2048)) == (1024, 1365)
    assert fit((480, 360), (1024, 2048)) == (1365, 1024)
