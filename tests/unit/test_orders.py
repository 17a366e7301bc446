"""Orders by class: probabilities, images, crops, and that all of it follows from the draw."""

import dataclasses
import itertools

import numpy as np
import pytest
import torch

from common.config import ConfigError, DataConfig, SourceConfig, StreamConfig, TrainConfig, typed
from common.data import SegmentationDataset, Statistics, class_statistics, make_loaders, make_streams
from common.data.focus import Focus
from common.data.geometry import Geometry, draw_offset
from common.data.orders import SamplerConfig, images_of_classes, rare_class_probabilities
from common.data.recipes.mmseg import MMSeg
from common.data.reservoir import PIXELS, class_pixels, draw_pixels
from common.losses.counts import Counts
from tests.unit.data_files import classes, folder_options, make_folder, opened, picture, save

GTA5 = (
    16099193283, 4155428633, 8478285320, 925367586, 317481282, 531401266, 67288808, 40463971, 3810296251, 1074861777,
    6784666433, 181828023, 15321782, 1259269812, 564950248, 184638969, 32522117, 15799033, 2718199,
)  # fmt: skip
CITYSCAPES = (
    2036416525, 336090793, 1260636120, 36199498, 48454166, 67789506, 11477088, 30448193, 879783988, 63949536,
    221979646, 67326424, 7463162, 386328286, 14772328, 12990290, 12863955, 5449152, 22861233,
)  # fmt: skip
PERCENT = {
    GTA5: (0, 0, 0, 1.51, 5.91, 3.65, 10.36, 11.0, 0, 1.08, 0, 8.01, 11.64, 0.71, 3.39, 7.96, 11.2, 11.62, 11.97),
    CITYSCAPES: (
        0, 0.03, 0, 6.46, 5.18, 3.65, 10.11, 7.17, 0, 3.91, 0.22, 3.68, 10.87, 0.01, 9.52, 9.84, 9.86, 11.27, 8.23
    ),
}  # fmt: skip
RECIPES = {
    "none": {},
    "mmseg": {"crop": [16, 16]},
    "usrn": {"crop": [16, 16], "base": 64},
    "cpsl": {"crop": [16, 16], "width": 64},
    "detectron2": {"crop": [16, 16], "short_edges": [40, 60]},
    "u2pl": {"crop": [16, 16]},
    "unimatch": {"crop": [16, 16]},
}


def make(tmp_path, sampler, recipe="mmseg", batch_size=4, **changes):
    source = changes.pop("source", None) or rare_folder(tmp_path)
    fields = {f.name: getattr(source, f.name) for f in dataclasses.fields(source)} | changes
    augment = {"recipe": recipe, **RECIPES[recipe]}
    stream = StreamConfig(**fields, batch_size=batch_size, augment=augment, sampler=sampler)
    return DataConfig(streams={"s": stream}, workers=0)


def rare_folder(root) -> SourceConfig:
    """Eight images of classes 0 to 3; class 4 is one pole, a pixel wide, in images 2 and 5."""
    source = make_folder(root, images=8, count=4)
    for k in (2, 5):
        label = classes(48, 64, 4, seed=k)
        label[10:40, 30 + k] = 4
        save(label, root / "labels" / "train" / f"im{k}.png")
    return dataclasses.replace(source, folder=folder_options(5))


@pytest.mark.parametrize("pixels", [GTA5, CITYSCAPES], ids=["gta5", "cityscapes"])
def test_probabilities_of_rare_class_sampling_are_the_published_ones(pixels):
    np.testing.assert_allclose(100 * rare_class_probabilities(pixels, 0.01), PERCENT[pixels], atol=0.0051)


def test_a_high_temperature_levels_the_classes_and_absent_ones_are_never_drawn():
    np.testing.assert_allclose(rare_class_probabilities([5, 0, 95, 7], 1e9), [1 / 3, 0, 1 / 3, 1 / 3])


def test_an_image_stands_for_a_class_with_more_than_the_least():
    statistics = Statistics(np.array([[10, 90], [11, 80], [0, 100]], np.int32), np.array([0, 9, 0], np.int32))
    by_share = images_of_classes(statistics, SamplerConfig(min_share=0.1))
    by_pixels = images_of_classes(statistics, SamplerConfig(min_pixels=10))
    assert [k.tolist() for k in by_share] == [[1], [0, 1, 2]] == [k.tolist() for k in by_pixels]


def test_rare_class_sampling_draws_classes_and_images_by_its_probabilities(tmp_path):
    sampler = {"order": "rare_class", "temperature": 0.5, "min_pixels": 20}
    stream = make_streams(make(tmp_path, sampler), 0, tmp_path / "cache")["s"]
    statistics = class_statistics(stream.dataset)
    draws = 4000
    drawn = [(stream.order.focus(d).class_id, stream.order.index(d)) for d in range(draws)]
    frequency = np.bincount([c for c, _ in drawn], minlength=5) / draws
    np.testing.assert_allclose(frequency, rare_class_probabilities(statistics.pixel_count, 0.5), atol=0.03)
    assert all(statistics.pixels[index, c] > 20 for c, index in drawn)
    assert {index for c, index in drawn if c == 4} == {2, 5}


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_crop_around_a_pixel_shows_its_class(tmp_path, recipe):
    """Shown in regions of 5 pixels, none of which a recipe's nearest rule skips."""
    source = make_folder(tmp_path, images=6)
    stream = make_streams(make(tmp_path, {"order": "class_uniform"}, recipe, source=source), 3)["s"]
    for draw in range(1, 60, 2):
        sample = stream.sample(draw)
        assert (sample["label"] == stream.order.focus(draw).class_id).any()
        assert "focus" not in sample


def test_copy_paste_does_not_cover_what_a_crop_was_drawn_for(tmp_path):
    data = make(tmp_path, {"order": "class_uniform"}, "detectron2")
    plain = make_streams(data, 3)["s"]
    own = data.streams["s"]
    pasted = dataclasses.replace(own, augment={**own.augment, "copy_paste": "random"})
    stream = make_streams(dataclasses.replace(data, streams={"s": pasted}), 3)["s"]
    changed = 0
    for draw in range(1, 120, 2):
        label, before = stream.sample(draw)["label"], plain.sample(draw)["label"]
        klass = stream.order.focus(draw).class_id
        assert (before == klass).any() and (label[before == klass] == klass).all()
        changed += not torch.equal(label, before)
    assert changed > 10


def test_half_of_class_uniform_draws_are_equal_lots_and_half_go_through_the_set(tmp_path):
    order = make_streams(make(tmp_path, {"order": "class_uniform"}), 0)["s"].order
    draws = range(2 * 5 * 8)
    lots = [order.focus(d).class_id for d in draws if d % 2]
    assert all(order.focus(d) is None for d in draws if d % 2 == 0)
    assert np.bincount(lots).tolist() == [8] * 5
    assert np.bincount([order.index(d) for d in draws if d % 2 == 0]).tolist() == [5] * 8
    assert {order.index(d) for d in draws if d % 2 and order.focus(d).class_id == 4} == {2, 5}


@pytest.mark.parametrize("near", [(0.0, 0.0), (0.999, 0.999), (0.5, 0.1), (0.21, 0.77)])
@pytest.mark.parametrize("size", [(40, 60), (10, 100), (8, 9)])
def test_an_offset_near_a_point_is_any_that_contains_it(size, near):
    crop = (12, 16)
    found = {draw_offset(size, crop, np.random.default_rng(k), near) for k in range(3000)}
    expected = set()
    for y, x in itertools.product(range(max(size[0] - 12, 0) + 1), range(max(size[1] - 16, 0) + 1)):
        row, column = (int(share * side) for share, side in zip(near, size, strict=True))
        if y <= row < y + 12 and x <= column < x + 16:
            expected.add((y, x))
    assert found == expected


def test_crops_are_drawn_again_until_they_show_enough_of_the_class(tmp_path, monkeypatch):
    label = np.zeros((40, 40), np.int16)
    label[:10, :10] = 1
    given = [30, 30, 5, 30]  # rows of the crops: the third one shows 5 · 10 pixels
    used = []

    def draw(self, size, label, rng, near=None):
        used.append(given[len(used) % 4])
        return Geometry(40, 40, 40, 40, used[-1], 0, 0)

    monkeypatch.setattr(MMSeg, "draw", draw)
    recipe = MMSeg(crop=(10, 10), photometric=False)

    def rows(focus):
        used.clear()
        recipe({**opened(picture(40, 40), label), "focus": focus}, np.random.default_rng(0), None, 0)
        return used

    assert rows(Focus(1, pixels=49)) == [30, 30, 5]
    assert rows(Focus(1, share=0.49)) == [30, 30, 5]
    assert rows(Focus(1, pixels=0)) == [30]
    assert len(rows(Focus(1, pixels=50))) == 11  # the tenth that is drawn again is taken as it is


@pytest.mark.parametrize("order", ["rare_class", "class_uniform"])
def test_draws_do_not_depend_on_workers_or_on_where_a_run_begins(tmp_path, order):
    sampler = {"order": order, **({"min_share": 0.001} if order == "rare_class" else {})}
    data = make(tmp_path, sampler)

    def run(start, count, workers):
        changed = dataclasses.replace(data, workers=workers)
        loader = make_loaders(changed, TrainConfig(), start, seed=1, cache=tmp_path / "cache")["s"]
        return list(itertools.islice(loader, count))

    whole = run(0, 4, 0)
    for resumed in (run(2, 2, 0), run(2, 2, 2)):
        for a, b in zip(whole[2:], resumed, strict=True):
            assert torch.equal(a["image"], b["image"]) and torch.equal(a["label"], b["label"])
            assert torch.equal(a["geometry"], b["geometry"])


def test_pixels_of_classes_are_drawn_uniformly_and_kept(tmp_path):
    label = np.full((20, 30), -1, np.int16)
    label[:, :10] = 2  # 200 pixels
    label[3, 20:25] = 0
    drawn = np.concatenate([draw_pixels(label, np.random.default_rng(k)) for k in range(300)])
    rows, columns = (drawn * [20, 30] - 0.5).round().astype(int).T
    assert set(label[rows, columns].tolist()) == {0, 2} and len(drawn) == 300 * (5 + PIXELS)
    counts = np.bincount((rows * 30 + columns)[label[rows, columns] == 2], minlength=600).reshape(20, 30)[:, :10]
    assert counts.min() > 60 and counts.max() < 140  # 96 on average

    dataset = SegmentationDataset(rare_folder(tmp_path))
    statistics = class_statistics(dataset)
    pixels = class_pixels(dataset, statistics, cache=tmp_path / "cache")
    for index, class_id in itertools.product(range(8), range(5)):
        found = pixels.of(index, class_id)
        assert len(found) == min(PIXELS, statistics.pixels[index, class_id])
        assert all(dataset.label(index)[int(r * 48), int(c * 64)] == class_id for r, c in found)
    (file,) = (tmp_path / "cache").iterdir()
    again = class_pixels(dataset, statistics, cache=tmp_path / "cache")
    assert np.array_equal(again.pixels, pixels.pixels)
    file.write_bytes(b"")
    with pytest.warns(UserWarning, match="cached pixels cannot be read"):
        assert np.array_equal(class_pixels(dataset, statistics, cache=tmp_path / "cache").pixels, pixels.pixels)


def test_orders_that_cannot_be_are_refused_in_one_line(tmp_path):
    rare = {"order": "rare_class", "min_pixels": 500}
    with pytest.raises(ValueError, match=r"s.sampler.min_pixels: 500: no image shows that much of class 4 \(class4\)"):
        make_streams(make(tmp_path, rare), 0)
    with pytest.raises(ConfigError, match="sampler.order: class_uniform needs labels, but"):
        make_streams(make(tmp_path, {"order": "class_uniform"}, labels=False), 0)
    with pytest.raises(ConfigError, match="min_pixels: 5 beside min_share: 0.1; remove one"):
        typed(SamplerConfig, {"min_pixels": 5, "min_share": 0.1}, "sampler")


def test_repeat_factors_that_are_all_one_are_said_to_change_nothing(tmp_path):
    source = make_folder(tmp_path, images=4)
    with pytest.warns(UserWarning, match="repeat_factor changes nothing here: every image has the repeat factor 1"):
        stream = make_streams(make(tmp_path, {"order": "repeat_factor"}, source=source), 0)["s"]
    assert sorted(stream.order.index(draw) for draw in range(4)) == [0, 1, 2, 3]


SAMPLERS = [
    {},
    {"order": "sequential"},
    {"order": "repeat_factor", "level": "pixel", "threshold": 0.3},
    {"order": "repeat_factor", "level": "image", "threshold": 0.5, "mode": "sum"},
    {"order": "rare_class", "temperature": 0.2, "min_pixels": 20},
    {"order": "class_uniform"},
]


@pytest.mark.parametrize("sampler", SAMPLERS, ids=str)
def test_shares_are_those_of_many_draws(tmp_path, sampler):
    """Of images, and of the classes that they show, against counting what is drawn."""
    data = make(tmp_path, sampler, "none")
    stream = make_streams(data, seed=0)["s"]
    statistics = class_statistics(stream.dataset)
    draws = 4000
    seen = np.bincount([stream.order.index(draw) for draw in range(draws)], minlength=8)
    shares = stream.order.shares(8)
    assert shares.sum() == pytest.approx(1)
    np.testing.assert_allclose(seen / draws, shares, atol=5 * np.sqrt(0.25 / draws))

    counts = Counts.from_statistics(statistics, shares)
    found = Counts.from_statistics(statistics, seen / draws)
    assert counts.num_images == 8
    torch.testing.assert_close(found.prior(), counts.prior(), rtol=0.1, atol=1e-4)
    torch.testing.assert_close(found.images, counts.images, rtol=0.1, atol=0)


def test_shares_of_a_shuffle_are_the_data_set(tmp_path):
    stream = make_streams(make(tmp_path, {}, "none"), seed=0)["s"]
    statistics = class_statistics(stream.dataset)
    ours, plain = Counts.from_statistics(statistics, stream.order.shares(8)), Counts.from_statistics(statistics)
    torch.testing.assert_close(ours.pixels, plain.pixels)
    torch.testing.assert_close(ours.images, plain.images)
