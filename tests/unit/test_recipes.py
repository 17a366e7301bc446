"""MMSegmentation's pipeline and the colour operations against closed forms, OpenCV (where installed), brute force."""

import numpy as np
import pytest
import torch

from common.config import ConfigError, SourceConfig
from common.data import DATASETS, IGNORE, SegmentationDataset, build_transform
from common.data import colour as colours
from common.data.geometry import Geometry, nearest_crop
from common.data.labels import is_varied
from common.data.recipes.mmseg import MMSeg
from tests.unit.data_files import classes, make_folder, opened, picture

SIZE = (60, 90)


def rng(seed=0):
    return np.random.default_rng(seed)


# MMSegmentation's pipeline


def mmseg(**options):
    return build_transform({"recipe": "mmseg", "crop": [24, 30], **options})


def test_mmseg_geometry_fits_image_label_and_maps():
    """An image that is a function of its label stays that function, whatever was drawn."""
    label = classes(*SIZE, 6).astype(np.int16)
    pixels = (label[..., None] * 40).astype(np.uint8).repeat(3, 2)
    for seed in range(20):
        sample = {**opened(pixels, label), "other": label[::-1].copy(), "soft": np.zeros((6, 7, 11), np.float32)}
        out = mmseg(photometric=False)(sample, rng(seed), None, 0)
        g = Geometry(*out["geometry"].tolist())
        assert out["image"].shape == (3, 24, 30) and out["label"].shape == (24, 30)
        assert out["soft"].shape == (6, 7, 11)
        inner = out["label"] != IGNORE
        assert (g.height, g.width) != SIZE or torch.equal(out["image"][0], out["label"] * 40)
        matches = (out["image"][0].int() - out["label"] * 40).abs()[inner] <= 1
        assert matches.float().mean() > 0.5  # all but the blended borders of the regions
        expected = nearest_crop(label[::-1], g, (24, 30))
        assert np.array_equal(out["other"].numpy()[: expected.shape[0], : expected.shape[1]], expected)


def test_mmseg_ratio_and_crop_are_uniform():
    transform = mmseg(category_limit=1.0)
    drawn = [transform.draw((100, 200), None, rng(k)) for k in range(4000)]
    ratios = np.array([g.width / 200 for g in drawn])
    assert ratios.min() >= 0.5 and ratios.max() <= 2
    quartiles = np.quantile(ratios, [0.25, 0.5, 0.75])
    np.testing.assert_allclose(quartiles, [0.875, 1.25, 1.625], atol=0.04)
    place = np.array([g.x / (g.width - 30) for g in drawn])
    np.testing.assert_allclose(np.quantile(place, [0.25, 0.5, 0.75]), [0.25, 0.5, 0.75], atol=0.03)
    assert any(g.x == 0 for g in drawn) and any(g.x == g.width - 30 for g in drawn)
    assert abs(np.mean([g.flip for g in drawn]) - 0.5) < 0.03


def test_mmseg_size_rounding():
    """The box is truncated, the sides are rounded half up after scaling by the smaller of the two side ratios."""
    transform = mmseg(box=[1024, 2048])
    for seed in range(50):
        g = transform.draw((360, 480), None, rng(seed))
        ratio = rng(seed).uniform(0.5, 2.0)
        scale = min(int(2048 * ratio) / 480, int(1024 * ratio) / 360)
        assert (g.height, g.width) == (int(360 * scale + 0.5), int(480 * scale + 0.5))


def test_category_limit():
    label = np.zeros((10, 10), np.int16)
    assert not is_varied(label, 0.75)
    assert not is_varied(np.full((10, 10), IGNORE, np.int16), 0.75)
    label[:, 6:] = 1
    assert is_varied(label, 0.75) and is_varied(label, 0.61) and not is_varied(label, 0.6)
    label[:, 3:6] = IGNORE  # 30 % and 40 % remain: the larger has 4/7 of the labelled pixels
    assert is_varied(label, 4 / 7 + 1e-9) and not is_varied(label, 4 / 7 - 1e-9)


def test_category_limit_redraws_up_to_ten_times():
    """Only one corner is varied: the share of varied crops is that of eleven draws of which the last is unchecked."""
    label = np.zeros((60, 60), np.int16)
    label[:12, :12] = 1
    transform = MMSeg((20, 20), ratio=(1.0, 1.0), category_limit=0.9)
    free = MMSeg((20, 20), ratio=(1.0, 1.0), category_limit=1.0)

    def share(t, seeds):
        return np.mean([is_varied(nearest_crop(label, t.draw((60, 60), label, rng(k)), (20, 20)), 0.9) for k in seeds])

    p = share(free, range(3000))
    assert share(transform, range(1000)) == pytest.approx(1 - (1 - p) ** 11, abs=0.05)


def test_small_images_are_padded():
    label = classes(*SIZE, 5).astype(np.int16)
    out = mmseg(crop=[80, 100], ratio=[0.5, 0.5], photometric=True)(opened(picture(*SIZE), label), rng(3), None, 0)
    assert out["image"].shape == (3, 80, 100)
    assert torch.all(out["label"][30:] == IGNORE) and torch.all(out["label"][:, 45:] == IGNORE)
    assert torch.all(out["label"][:30, :45] != IGNORE)
    assert torch.all(out["image"][:, 30:] == torch.tensor([124, 116, 104], dtype=torch.uint8)[:, None, None])


def test_full_view():
    pixels = picture(*SIZE)
    out = mmseg(full=True)(opened(pixels), rng(), None, 0)
    assert torch.equal(out["full"], torch.from_numpy(pixels).permute(2, 0, 1)) and "label" not in out


def test_transforms_are_pure(tmp_path):
    dataset = SegmentationDataset(make_folder(tmp_path), mmseg())
    a, b, c = (dataset.sample(1, rng(seed)) for seed in (3, 3, 4))
    assert all(torch.equal(a[k], b[k]) for k in ("image", "label", "geometry"))
    assert not torch.equal(a["image"], c["image"])


def test_unknown_recipe_and_option():
    with pytest.raises(ValueError, match="augment.recipe: unknown 'mmseq'; did you mean 'mmseg'"):
        build_transform({"recipe": "mmseq"})
    with pytest.raises(ConfigError, match="unknown key 'cropp'; did you mean 'crop'"):
        build_transform({"recipe": "mmseg", "cropp": [1, 2]})


def test_native_fits_a_box():
    label = classes(*SIZE, 5).astype(np.int16)
    out = build_transform({"box": [120, 240]})(opened(picture(*SIZE), label), rng(), None, 0)
    assert out["image"].shape == (3, 120, 180) and out["label"].shape == SIZE
    assert out["geometry"].tolist() == [*SIZE, 120, 180, 0, 0, 0]


# colour


def test_hsv_against_opencv():
    cv2 = pytest.importorskip("cv2")
    rgb = rng().integers(0, 256, (64, 64, 3), dtype=np.uint8)
    expected = cv2.cvtColor(rgb, cv2.COLOR_RGB2HSV).astype(int)
    hue, saturation, value = colours.rgb_to_hsv(torch.from_numpy(rgb).permute(2, 0, 1).float())
    assert np.array_equal(value.numpy(), expected[..., 2])
    assert np.abs(saturation.numpy() - expected[..., 1]).max() <= 1
    apart = np.abs(hue.numpy() % 180 - expected[..., 0])
    assert np.minimum(apart, 180 - apart).max() <= 1
    planes = torch.from_numpy(expected).permute(2, 0, 1).float()
    back = colours.hsv_to_rgb(*planes).permute(1, 2, 0).numpy().astype(int)
    reference = cv2.cvtColor(expected.astype(np.uint8), cv2.COLOR_HSV2RGB).astype(int)
    assert np.abs(back - reference).max() <= 1 and (back != reference).mean() < 0.05


def test_hsv_round_trip_of_pure_colours():
    """Greys and the six corners of the colour cube have exact 8-bit HSV values."""
    corners = [[255, 0, 0], [255, 255, 0], [0, 255, 0], [0, 255, 255], [0, 0, 255], [255, 0, 255], [9, 9, 9], [0, 0, 0]]
    rgb = torch.tensor(corners, dtype=torch.uint8).T[:, None].contiguous()
    hue, saturation, _ = colours.rgb_to_hsv(rgb.float())
    assert (hue[0] % 180).tolist() == [0, 30, 60, 90, 120, 150, 0, 0]
    assert saturation[0].tolist() == [255] * 6 + [0, 0]
    assert torch.equal(colours.shift_hsv(rgb, saturation=1.4), rgb)
    shifted = colours.shift_hsv(rgb, hue=-30)
    assert shifted[:, 0, 2].tolist() == [255, 255, 0] and shifted[:, 0, 0].tolist() == [255, 0, 255]
    assert torch.equal(shifted[..., 6:], rgb[..., 6:])


class Scripted:
    """A generator that gives prepared values."""

    def __init__(self, integers, uniforms):
        self._integers, self._uniforms = iter(integers), iter(uniforms)

    def integers(self, *bounds):
        return next(self._integers)

    def uniform(self, *bounds):
        return next(self._uniforms)


def test_brightness_and_contrast_clip_and_truncate():
    image = torch.arange(256, dtype=torch.uint8).view(1, 16, 16).repeat(3, 1, 1)
    values = np.arange(256, dtype=np.float64)
    bright = np.clip(values - 20.3, 0, 255).astype(int)
    contrast_first = colours.photometric_distortion(image, Scripted([1, 1, 1, 0, 0], [-20.3, 1.37]))
    assert contrast_first[0].flatten().tolist() == np.clip(bright * np.float32(1.37), 0, 255).astype(int).tolist()
    contrast_last = colours.photometric_distortion(image, Scripted([0, 0, 0, 0, 1], [0.6]))
    assert contrast_last[1].flatten().tolist() == np.floor(values.astype(np.float32) * np.float32(0.6)).tolist()
    untouched = colours.photometric_distortion(image, Scripted([0, 0, 0, 0, 0], []))
    assert torch.equal(untouched, image)


def test_photometric_steps_fire_half_of_the_time():
    image = torch.from_numpy(picture(8, 8)).permute(2, 0, 1).contiguous()
    same = np.mean([torch.equal(colours.photometric_distortion(image, rng(k)), image) for k in range(2000)])
    assert abs(same - 1 / 16) < 0.02  # none of four independent steps (a step may also round to nothing)


def test_blur_against_opencv():
    cv2 = pytest.importorskip("cv2")
    pixels = rng().integers(0, 256, (23, 31, 3), dtype=np.uint8)
    expected = torch.from_numpy(cv2.GaussianBlur(pixels, (5, 5), 0)).permute(2, 0, 1)
    assert torch.equal(colours.binomial_blur(torch.from_numpy(pixels).permute(2, 0, 1)), expected)


def test_blur_by_hand():
    taps = np.outer([1, 4, 6, 4, 1], [1, 4, 6, 4, 1])
    pixels = rng().integers(0, 256, (3, 9, 8), dtype=np.uint8)
    padded = np.pad(pixels, ((0, 0), (2, 2), (2, 2)), mode="reflect").astype(int)
    window = np.lib.stride_tricks.sliding_window_view(padded, (5, 5), axis=(1, 2))
    expected = ((window * taps).sum((-1, -2)) + 128) // 256
    assert np.array_equal(colours.binomial_blur(torch.from_numpy(pixels)), expected)


def test_mmseg_on_camvid(camvid):
    source = SourceConfig(dataset="camvid", root=str(camvid))
    dataset = SegmentationDataset(source, mmseg(crop=[180, 240]))
    for index in range(4):
        sample = dataset.sample(index, rng(index))
        assert sample["image"].shape == (3, 180, 240)
        assert -1 <= sample["label"].min() and sample["label"].max() < DATASETS["camvid"].num_classes
