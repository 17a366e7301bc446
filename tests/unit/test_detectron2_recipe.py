"""detectron2's augmentations against whole-image operations of Pillow and torch, closed forms and brute force."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from common.config import ConfigError, DataConfig, SourceConfig, StreamConfig
from common.data import DATASETS, IGNORE, build_transform, make_streams, resolve
from common.data.geometry import Geometry, nearest_crop, pillow_exact, torch_nearest_index
from common.data.images import Picture
from common.data.recipes.detectron2 import Detectron2, exchanged
from common.evaluation import mirrored_classes
from tests.unit.data_files import classes, folder_options, opened, picture, pillow_resize, save

PLAIN = SimpleNamespace(row=SimpleNamespace(flip_pairs=(), num_classes=9))


def rng(seed=0):
    return np.random.default_rng(seed)


def recipe(**options):
    return build_transform({"recipe": "detectron2", "crop": [64, 64], "max_size": 2048, **options})


def test_short_sides():
    assert recipe(crop=[512, 512]).choices == (
        *(256, 307, 358, 409, 460, 512, 563, 614, 665, 716, 768, 819, 870, 921, 972, 1024),
    )
    assert recipe(crop=[640, 640]).choices == tuple(range(320, 1281, 64))
    transform = recipe(crop=[512, 512])
    drawn = [transform.draw((600, 800), None, rng(k)) for k in range(3200)]
    shorts, counts = np.unique([g.height for g in drawn], return_counts=True)
    assert tuple(shorts) == transform.choices and counts.min() > 140 and counts.max() < 260
    assert {g.height for g in (recipe(short_edges=[100, 150]).draw((60, 80), None, rng(k)) for k in range(20))} == {
        *(100, 150)
    }


@pytest.mark.parametrize(
    ("size", "short", "max_size", "expected"),
    [
        ((480, 640), 512, 2048, (512, 683)),  # 682.67
        ((640, 480), 512, 2048, (683, 512)),
        ((500, 500), 307, 2048, (307, 307)),
        ((400, 500), 460, 1333, (460, 575)),
        ((200, 1000), 512, 1333, (267, 1333)),  # 2560 → 1333, and the short side with it: 266.6
        ((1000, 200), 1024, 2048, (2048, 410)),  # 409.6
        ((300, 301), 450, 2048, (450, 452)),  # 451.5 is rounded up
    ],
)
def test_sizes(size, short, max_size, expected):
    assert recipe(max_size=max_size).resized(size, short) == expected


def cut(array, g, crop):
    part = array[..., g.y : g.y + crop[0], g.x : g.x + crop[1]]
    return part.flip(-1) if g.flip else part


@pytest.mark.parametrize("suffix", ["png", "jpg"])
def test_image_is_the_crop_of_what_pillow_resizes_whole(tmp_path, suffix):
    path = save(picture(61, 93), tmp_path / f"a.{suffix}")
    pixels = Image.fromarray(Picture(path).pixels())
    generator = rng(3)
    for size in [(30, 47), (61, 140), (93, 61), (120, 200), (61, 93), (25, 93), (150, 31), (33, 50)]:
        whole = torch.from_numpy(np.array(pillow_resize(pixels, size[::-1], Image.Resampling.BILINEAR)))
        for flip in (0, 1):
            y, x = (int(generator.integers(max(side - 24, 0) + 1)) for side in size)
            g = Geometry(61, 93, *size, y, x, flip)
            ours = pillow_exact(Picture(path), g, (24, 24), Image.Resampling.BILINEAR)
            assert torch.equal(ours, cut(whole.permute(2, 0, 1), g, (24, 24)))


def test_label_is_the_crop_of_what_torch_resizes_whole():
    generator = rng(4)
    for _ in range(300):
        stored = int(generator.integers(10, 1500))
        size = int(stored * generator.uniform(0.15, 6))
        line = torch.arange(stored, dtype=torch.float64)[None, None, None]
        expected = F.interpolate(line, (1, size), mode="nearest")[0, 0, 0]
        assert np.array_equal(torch_nearest_index(size, stored, 0, size), expected.numpy())
    label = classes(61, 93, 9).astype(np.int16)
    g = Geometry(61, 93, 100, 150, 30, 40, 1)
    whole = F.interpolate(torch.from_numpy(label)[None, None].double(), (100, 150), mode="nearest")[0, 0]
    assert np.array_equal(nearest_crop(label, g, (24, 24), torch_nearest_index), cut(whole, g, (24, 24)))


def test_many_odd_images_become_the_crop_with_grey_and_ignored_padding():
    generator = rng(1)
    transform = recipe(colour=False, max_size=160)
    for k in range(300):
        size = tuple(int(v) for v in generator.integers(5, 90, 2))
        pixels, label = picture(*size, seed=k), classes(*size, 9, seed=k).astype(np.int16)
        out = transform(opened(pixels, label), rng(k), PLAIN, 0)
        g = Geometry(*out["geometry"].tolist())
        assert out["image"].shape == (3, 64, 64) and out["label"].shape == (64, 64) and max(g.height, g.width) <= 160
        h, w = min(64, g.height), min(64, g.width)
        for outside in (np.s_[h:, :], np.s_[:, w:]):
            assert (out["image"][:, *outside] == 128).all() and (out["label"][outside] == IGNORE).all()
        assert (out["label"][:h, :w] != IGNORE).all()
        whole = np.array(pillow_resize(Image.fromarray(pixels), (g.width, g.height), Image.Resampling.BILINEAR))
        assert torch.equal(out["image"][:, :h, :w], cut(torch.from_numpy(whole).permute(2, 0, 1), g, (h, w)))


def test_offsets_and_mirrors_are_uniform_ends_included():
    transform = recipe(crop=[8, 8], short_edges=[12], colour=False)
    label = np.arange(144).reshape(12, 12).astype(np.int16)
    sample = opened(np.zeros((12, 12, 3), np.uint8), label)
    drawn = [transform(sample, rng(k), PLAIN, 0)["geometry"].tolist() for k in range(1500)]
    places = np.bincount([5 * y + x for *_, y, x, _ in drawn], minlength=25)
    assert len(places) == 25 and places.min() > 30 and places.max() < 95
    assert abs(np.mean([flip for *_, flip in drawn]) - 0.5) < 0.05
    assert not any(recipe(flip=0.0)(sample, rng(k), PLAIN, 0)["geometry"][-1] for k in range(20))


def test_category_limit_draws_ten_crops_at_most():
    """One corner of the image holds a second class; the last of ten draws is taken as it is."""
    label = np.zeros((40, 40), np.int16)
    label[:4, :4] = 1
    transform = recipe(crop=[8, 8], short_edges=[40], category_limit=0.99, flip=0.0, colour=False)
    varied = 0
    for k in range(600):
        g = transform.draw((40, 40), label, rng(k))
        varied += len(np.unique(label[g.y : g.y + 8, g.x : g.x + 8])) > 1
    once = 16 / 33**2  # crops that reach the corner
    expected = 600 * (1 - (1 - once) ** 10)
    assert abs(varied - expected) < 4 * np.sqrt(expected)
    free = recipe(crop=[8, 8], short_edges=[40])
    same = [free.draw((40, 40), label, rng(k)) == free.draw((40, 40), None, rng(k)) for k in range(20)]
    assert all(same)


def test_the_image_is_jittered_inside_and_not_in_the_padding():
    pixels = picture(20, 90)
    changed = []
    for k in range(30):
        options = {"short_edges": [20], "flip": 0.0}
        plain = recipe(colour=False, **options)(opened(pixels), rng(k), PLAIN, 0)["image"]
        jittered = recipe(**options)(opened(pixels), rng(k), PLAIN, 0)["image"]
        assert (jittered[:, 20:] == 128).all()
        changed.append(not torch.equal(plain, jittered))
    assert sum(changed) > 20


def test_hue_is_a_whole_number_and_both_ends_occur(monkeypatch):
    hues, saturations = [], []

    def record(image, saturation=1.0, hue=0):
        (hues if saturation == 1.0 else saturations).append(hue if saturation == 1.0 else saturation)
        return image

    monkeypatch.setattr("common.data.colour.shift_hsv", record)
    sample = opened(picture(20, 20))
    for k in range(1500):
        recipe(crop=[8, 8])(sample, rng(k), PLAIN, 0)
    assert set(hues) == set(range(-18, 19)) and all(isinstance(hue, int) for hue in hues)
    assert 0.5 <= min(saturations) < 0.52 and 1.48 < max(saturations) <= 1.5
    assert abs(len(hues) / 1500 - 0.5) < 0.05 and abs(len(saturations) / 1500 - 0.5) < 0.05


def test_a_mirrored_label_exchanges_left_and_right():
    row = DATASETS["mhpv2_lt_7k"]
    dataset = SimpleNamespace(row=row)
    label = np.full((64, 64), 12, np.int16)
    label[:, :20] = row.classes.index("Left-arm")
    label[:10] = IGNORE
    label[20:30] = row.classes.index("Right-shoe")
    sample = opened(np.zeros((64, 64, 3), np.uint8), label)
    out = recipe(short_edges=[64], flip=1.0, colour=False)(sample, rng(), dataset, 0)
    new = np.array([k for k in range(59)] + [IGNORE])
    for a, b in row.flip_pairs:
        new[a], new[b] = b, a
    assert np.array_equal(out["label"], new[label[:, ::-1]])
    assert (out["label"][40:, 44:] == row.classes.index("Right-arm")).all()
    kept = recipe(short_edges=[64], flip=0.0, colour=False)(sample, rng(), dataset, 0)
    assert np.array_equal(kept["label"], label)
    twice = exchanged(exchanged(torch.from_numpy(label), row.flip_pairs, 59), row.flip_pairs, 59)
    assert np.array_equal(twice, label)


def test_a_described_folder_has_pairs_of_its_own(tmp_path):
    """Stored values 10, 20 … are classes 0, 1 …, so that pairs are seen to be class ids."""
    for k in range(2):
        save(picture(64, 64, k), tmp_path / "images" / "train" / f"im{k}.png")
        save((10 + 10 * classes(64, 64, 5, k)).astype(np.uint8), tmp_path / "labels" / "train" / f"im{k}.png")
    described = folder_options() | {
        "label_map": {str(10 + 10 * k): k for k in range(5)},
        "flip_pairs": [[4, 1], [0, 3]],
    }
    fields = {"dataset": "folder", "root": str(tmp_path), "folder": described}

    def stream(**augment):
        config = StreamConfig(**fields, augment={"crop": [64, 64], "flip": 1.0, **augment})
        return make_streams(DataConfig(streams={"labeled": config}), 0)["labeled"]

    mirrored = stream(recipe="detectron2", short_edges=[64]).sample(0, 0)["label"]
    assert np.array_equal(mirrored, np.array([3, 4, 2, 0, 1])[classes(64, 64, 5, 0)[:, ::-1]])
    row, _ = resolve(SourceConfig(**fields))
    assert mirrored_classes(row) == [3, 4, 2, 0, 1]  # for flipped test passes
    with pytest.raises(
        ValueError, match="labeled.augment.flip: 1, but this recipe does not exchange the flip_pairs of .*flip: 0.0"
    ):
        stream(recipe="mmseg")
    assert stream(recipe="mmseg", flip=0.0).dataset.row.flip_pairs == ((4, 1), (0, 3))


def test_it_is_a_function_of_its_generator():
    sample = opened(picture(50, 70), classes(50, 70, 9).astype(np.int16))
    first, again, other = (recipe()(sample, rng(k), PLAIN, 0) for k in (5, 5, 6))
    assert all(torch.equal(first[key], again[key]) for key in ("image", "label", "geometry"))
    assert not torch.equal(first["image"], other["image"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"short_edge": [1]}, "did you mean 'short_edges'"),
        ({"copy_paste": "all"}, "copy_paste"),
        ({"short_edges": [0, 64]}, r"augment.short_edges\[0\]: 0 is less than 1"),
        ({"max_size": 0}, "augment.max_size: 0 is less than 1"),
        ({"copy_paste_max": 1}, "augment.copy_paste_max: 1 is less than 2"),
        ({"crop": [0, 5]}, "augment.crop"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises((ConfigError, ValueError), match=message) as error:
        recipe(**options)
    assert "\n" not in str(error.value)


def test_defaults_are_those_of_detectron2():
    assert Detectron2((512, 512)).max_size == 1333 and Detectron2((512, 512)).copy_paste == "none"
