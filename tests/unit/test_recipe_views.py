"""The views of USRN and CPSL against Pillow, torchvision and closed forms."""

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from common.data import IGNORE, SegmentationDataset, build_transform
from common.data import colour as colours
from common.data.colour_transfer import Recoloured, colour_statistics, lab_to_rgb, rgb_to_lab
from common.data.geometry import Geometry, nearest_crop
from common.data.images import Picture
from common.data.recipes import cpsl as cpsl_views
from tests.unit.data_files import assert_close, classes, make_folder, opened, picture, pillow_resize, save

SIZE = (60, 90)


def rng(seed=0):
    return np.random.default_rng(seed)


# USRN


def usrn(**options):
    return build_transform({"recipe": "usrn", "crop": [40, 40], "base": 80, **options})


def test_usrn_sizes_and_crops():
    for size in ((50, 75), (75, 50)):
        drawn = [usrn().draw(size, rng(k)) for k in range(3000)]
        longest = {max(g.height, g.width) for g in drawn}
        assert (min(longest), max(longest)) == (40, 160)
        assert all((g.width >= g.height) == (size[1] >= size[0]) for g in drawn)
        assert all(min(g.height, g.width) == int(50 / 75 * max(g.height, g.width) + 0.5) for g in drawn)


def test_usrn_labelled_sample_against_pillow():
    """Resize, pad, crop and mirror done one after the other on whole images."""
    pixels, label = picture(*SIZE), classes(*SIZE, 9).astype(np.int16)
    for seed in range(12):
        out = usrn()(opened(pixels, label), rng(seed), None, 0)
        g = Geometry(*out["geometry"].tolist())
        image = np.array(pillow_resize(Image.fromarray(pixels), (g.width, g.height), Image.Resampling.BICUBIC))
        short = [(0, max(40 - g.height, 0)), (0, max(40 - g.width, 0))]
        planes = [np.pad(image[..., c], short, constant_values=v) for c, v in enumerate((124, 116, 104))]
        expected = np.stack(planes)[:, g.y : g.y + 40, g.x : g.x + 40]
        whole = nearest_crop(label, g._replace(y=0, x=0, flip=0), (g.height, g.width))
        classes_ = np.pad(whole, short, constant_values=IGNORE)[g.y : g.y + 40, g.x : g.x + 40]
        step = -1 if g.flip else 1
        assert_close(out["image"], expected[..., ::step])
        assert np.array_equal(out["label"], classes_[..., ::step])


def test_usrn_views_are_aligned():
    pixels = picture(*SIZE)
    transform = usrn(views=True, ratio=[0.8, 2.0])
    outs = [transform(opened(pixels), rng(k), None, 0) for k in range(200)]
    assert all("image" not in out and out["weak"].shape == out["strong"].shape == (3, 40, 40) for out in outs)
    grey = np.mean([torch.equal(out["strong"][0], out["strong"][1]) for out in outs])
    same = np.mean([torch.equal(out["strong"], out["weak"]) for out in outs])
    assert abs(grey - 0.2) < 0.09 and abs(same - 0.5 * 0.2 * 0.8) < 0.06
    assert torch.equal(outs[0]["weak"], usrn(ratio=[0.8, 2.0])(opened(pixels), rng(0), None, 0)["image"])
    likeness = [
        np.corrcoef(o["weak"].float().mean(0).flatten(), o["strong"].float().mean(0).flatten())[0, 1] for o in outs
    ]
    assert np.median(likeness) > 0.9


def test_colour_jitter_against_torchvision():
    """The same factors and order through torchvision's functions, drawn in the documented sequence."""
    from torchvision.transforms import functional

    image, generator = Image.fromarray(picture(*SIZE)), rng(7)
    brightness, contrast, saturation = generator.uniform(0.6, 1.4, 3)
    hue = generator.uniform(-0.1, 0.1)
    expected = image
    for k in generator.permutation(4):
        name, factor = [("brightness", brightness), ("contrast", contrast), ("saturation", saturation), ("hue", hue)][k]
        expected = getattr(functional, f"adjust_{name}")(expected, factor)
    assert np.array_equal(colours.colour_jitter(image, rng(7), 0.4, 0.1), expected)


# CPSL


def cpsl(**options):
    return build_transform({"recipe": "cpsl", "crop": [32, 48], "width": 120, **options})


def test_cpsl_weak_crop_against_pillow():
    """Load at another size, resize and crop: three whole-image Pillow operations."""
    pixels, label = picture(*SIZE), classes(*SIZE, 9).astype(np.uint8)
    for seed in range(10):
        out = cpsl(base=[64, 128])(opened(pixels, label.astype(np.int16)), rng(seed), None, 0)
        g = Geometry(*out["geometry"].tolist())
        assert (g.height0, g.width0) == (64, 128) and g.height == g.width // 2 and 60 <= g.width < 180
        image, classes_ = Image.fromarray(pixels), Image.fromarray(label)
        for size in ((128, 64), (g.width, g.height)):
            image = pillow_resize(image, size, Image.Resampling.BILINEAR)
            classes_ = classes_.resize(size, Image.Resampling.NEAREST)
        box = (g.x, g.y, g.x + 48, g.y + 32)
        image, classes_ = image.crop(box), classes_.crop(box)
        if g.flip:
            image, classes_ = ImageOps.mirror(image), ImageOps.mirror(classes_)
        h, w = g.extent((32, 48))
        x = slice(48 - w, 48) if g.flip else slice(w)
        assert_close(out["image"].permute(1, 2, 0)[:h, x], np.array(image)[:h, x])
        assert np.array_equal(out["label"][:h, x], np.array(classes_)[:h, x])


def test_cpsl_full_and_strong_views():
    pixels = picture(64, 128)
    out = cpsl(strong=True, full=True)(opened(pixels), rng(), None, 0)
    assert set(out) == {"name", "index", "geometry", "weak", "strong", "warp", "cutout", "full"}
    assert torch.equal(out["full"], torch.from_numpy(pixels).permute(2, 0, 1))


def sample_at(image, warp, grid):
    """Nearest pixel of `image` (H, W) at the warped centres of `grid`; and which of them lie inside."""
    x, y, _ = warp @ grid
    inside = (x >= 1) & (x < image.shape[1] - 1) & (y >= 1) & (y < image.shape[0] - 1)
    return image[np.clip(y.astype(int), 0, image.shape[0] - 1), np.clip(x.astype(int), 0, image.shape[1] - 1)], inside


def test_warp_relates_the_strong_view_to_the_weak_view(monkeypatch):
    """With the colour operations off, a smooth weak view read through the warp is the strong view."""
    monkeypatch.setattr(cpsl_views, "colour_jitter", lambda image, *_: image)
    identity = dict.fromkeys(cpsl_views.COLOUR_OPERATIONS, lambda image, level: image)
    monkeypatch.setattr(cpsl_views, "COLOUR_OPERATIONS", identity)
    height, width = 96, 160
    ramp = np.stack(np.meshgrid(np.arange(width), np.arange(height)), 0)
    weak = np.stack((ramp[0] + 40, ramp[1] + 90, ramp[0] // 2 + 100)).astype(np.uint8)
    rows, columns = np.mgrid[:height, :width] + 0.5
    grid = np.stack((columns.ravel(), rows.ravel(), np.ones(rows.size)))
    moved = 0
    for seed in range(150):
        view = cpsl_views.strong_view(torch.from_numpy(weak), rng(seed))
        warp = view["warp"].double().numpy()
        moved += not np.allclose(np.abs(warp[:2, :2]), np.eye(2))
        y0, x0, y1, x1 = view["cutout"].tolist()
        outside_box = np.ones((height, width), bool)
        outside_box[y0 : y1 + 1, x0 : x1 + 1] = False
        for channel in range(2):
            expected, inside = sample_at(weak[channel], warp, grid)
            valid = inside & outside_box.ravel()
            got = view["strong"][channel].flatten().numpy()
            apart = np.abs(got.astype(int) - expected)[valid]
            assert apart.size == 0 or np.quantile(apart, 0.98) <= 2, (seed, channel)
    assert moved > 20


def test_two_geometric_operations_compose():
    shift = cpsl_views.GEOMETRIC_OPERATIONS["translate_x"](5, 1, 100, 60)
    back = cpsl_views.GEOMETRIC_OPERATIONS["translate_x"](5, -1, 100, 60)
    assert shift[0, 2] == 15 and np.array_equal(shift @ back, np.eye(3))
    turn = cpsl_views.GEOMETRIC_OPERATIONS["rotate"](9, 1, 100, 60)
    np.testing.assert_allclose(turn @ [50, 30, 1], [50, 30, 1])
    image = Image.fromarray(picture(60, 100))
    expected = np.array(image.rotate(27, Image.Resampling.BILINEAR, fillcolor=(127, 127, 127))).astype(int)
    assert np.abs(np.array(cpsl_views._resample(image, turn)).astype(int) - expected).max() <= 1


def test_cutout_box():
    weak = torch.from_numpy(picture(96, 160)).permute(2, 0, 1)
    boxes = np.array([cpsl_views.strong_view(weak, rng(k))["cutout"].tolist() for k in range(400)])
    heights, widths = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    assert boxes.min() == 0 and heights.max() == widths.max() == 32
    assert min(heights.min(), widths.min()) >= 16
    assert boxes[:, 2].max() == 96 and boxes[:, 3].max() == 160
    view = cpsl_views.strong_view(weak, rng(1))
    y0, x0, y1, x1 = view["cutout"].tolist()
    assert torch.all(view["strong"][:, y0:y1, x0:x1] == 127)


def test_colour_operations_do_what_pillow_does():
    image = Image.fromarray(picture(*SIZE))
    operations = cpsl_views.COLOUR_OPERATIONS
    assert len(operations) + len(cpsl_views.GEOMETRIC_OPERATIONS) == 14
    values = np.array(image)
    for level in range(1, 10):
        bits = 4 + int(0.4 * level)
        assert np.array_equal(operations["posterize"](image, level), values & (256 - 2 ** (8 - bits)))
        threshold = 256 - int(25.6 * level)
        solarized = np.where(values < threshold, values, 255 - values)
        assert np.array_equal(operations["solarize"](image, level), solarized)
        dark = np.array(operations["brightness"](image, level)).astype(float)
        assert np.abs(dark - values * (0.05 + 0.09 * level)).max() <= 1 + 1e-6


def test_lab_of_a_known_colour():
    lab = rgb_to_lab(np.array([[[200, 30, 60]]], np.uint8))
    np.testing.assert_allclose(lab.flatten(), [43.5630, 64.0570, 28.4723], atol=2e-4)


def test_lab_round_trip():
    pixels = rng().integers(0, 256, (40, 40, 3), dtype=np.uint8)
    assert np.abs(lab_to_rgb(rgb_to_lab(pixels)).astype(int) - pixels).max() <= 1  # truncation may lose one level


def test_colour_transfer_of_known_images():
    source = np.array([[(200, 30, 60), (0, 0, 255), (12, 200, 99)], [(128, 128, 128), (90, 60, 30), (250, 240, 10)]])
    target = np.array([[(40, 60, 50), (100, 110, 90), (70, 75, 80)], [(20, 25, 22), (180, 190, 185), (60, 50, 45)]])
    expected = [[(62, 57, 52), (35, 34, 42), (104, 127, 113)], [(73, 83, 77), (23, 28, 22), (170, 180, 161)]]
    colours_ = colour_statistics(rgb_to_lab(target.astype(np.uint8)))
    result = Recoloured(Picture.of(source.astype(np.uint8)), colours_)
    assert np.array_equal(result.pixels(), expected)
    assert np.array_equal(result.window(slice(1, 2), slice(0, 2)), [expected[1][:2]])


def test_colour_transfer_takes_the_colours_of_the_other_set(tmp_path):
    other = make_folder(tmp_path / "other")
    for k in range(6):
        save(picture(48, 64, k) // 8 + 20, tmp_path / "other" / "images" / "train" / f"im{k}.png")
    reference = {"dataset": "folder", "root": other.root, "folder": other.folder}
    dataset = SegmentationDataset(make_folder(tmp_path / "own"), cpsl(colour_from=reference))
    plain = SegmentationDataset(make_folder(tmp_path / "own"), cpsl())
    a, b = dataset.sample(0, rng(1)), dataset.sample(0, rng(1))
    assert torch.equal(a["image"], b["image"])
    assert a["image"].float().mean() < 60 < plain.sample(0, rng(1))["image"].float().mean()
    with pytest.raises(ValueError, match="no folder"):
        cpsl(colour_from={**reference, "root": str(tmp_path / "nowhere")})
