"""Class statistics against direct counts; Gini coefficient, groups and repeat factors against their definitions."""

import dataclasses
import itertools

import numpy as np
import pytest

from common.config import SourceConfig
from common.data import SegmentationDataset
from common.data.imbalance import gini, groups
from common.data.statistics import Statistics, class_statistics, image_factors, repeat_factors
from tests.unit.data_files import folder_options, make_folder, save


@pytest.fixture
def dataset(tmp_path):
    return SegmentationDataset(make_folder(tmp_path / "set"))


@pytest.mark.parametrize("workers", [0, 2])
def test_counts_against_a_loop(dataset, workers):
    statistics = class_statistics(dataset, workers)
    labels = [dataset.load(k)["label"] for k in range(len(dataset))]
    assert statistics.num_images == 6
    for c in range(5):
        assert statistics.pixel_count[c] == sum(int((label == c).sum()) for label in labels)
        assert statistics.image_count[c] == sum(bool((label == c).any()) for label in labels)
        assert statistics.area[c] == pytest.approx(sum((label == c).mean() for label in labels))
    assert statistics.ignored.tolist() == [64] * 6
    assert np.all(statistics.pixels.sum(1) + statistics.ignored == 48 * 64)


def test_cache_is_used_and_follows_the_files(dataset, tmp_path, monkeypatch):
    cache = tmp_path / "cache"
    first = class_statistics(dataset, 0, cache)
    assert len(list(cache.iterdir())) == 1
    calls = []
    monkeypatch.setattr(SegmentationDataset, "label", lambda self, k: calls.append(k) or np.zeros((48, 64), np.int16))
    again = class_statistics(dataset, 0, cache)
    assert not calls and np.array_equal(again.pixels, first.pixels) and np.array_equal(again.ignored, first.ignored)
    save(np.full((48, 64), 3, np.uint8), dataset.records[2].label)
    class_statistics(dataset, 0, cache)
    assert len(calls) == 6
    other = SegmentationDataset(dataclasses.replace(dataset.source, folder={**folder_options(), "ignore": [254, 255]}))
    class_statistics(other, 0, cache)
    assert len(calls) == 12 and len(list(cache.iterdir())) == 3


def test_damaged_cache_is_counted_again(dataset, tmp_path):
    first = class_statistics(dataset, 0, tmp_path)
    path = next(tmp_path.glob("*.npz"))
    path.write_bytes(path.read_bytes()[:50])
    with pytest.warns(UserWarning, match="cannot be read"):
        again = class_statistics(dataset, 0, tmp_path)
    assert np.array_equal(again.pixels, first.pixels)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_bad_label_is_named(dataset, workers):
    save(np.full((48, 64), 9, np.uint8), dataset.records[4].label)
    with pytest.raises(ValueError, match=r"im4\.png: label value 9 is none of the 5 classes"):
        class_statistics(dataset, workers)


def test_camvid_is_long_tailed(camvid):
    dataset = SegmentationDataset(SourceConfig(dataset="camvid", root=str(camvid)))
    statistics = class_statistics(dataset, 0)
    share = statistics.pixel_count / statistics.pixel_count.sum()
    assert share[3] == pytest.approx(0.33, abs=0.01) and share[1] == pytest.approx(0.24, abs=0.01)
    assert set(np.argsort(share)[:5].tolist()) == set(dataset.row.tail)
    assert 0.5 < gini(statistics.area) < 0.75


def test_gini_is_the_mean_absolute_difference():
    """G = Σ_ij |x_i - x_j| / (2 n² mean)."""
    for seed in range(5):
        x = np.random.default_rng(seed).pareto(1.0, 23)
        x[:3] = 0
        pairs = sum(abs(a - b) for a, b in itertools.product(x, x))
        assert gini(x) == pytest.approx(pairs / (2 * len(x) ** 2 * x.mean()))
    assert gini(np.ones(7)) == pytest.approx(0)
    with pytest.raises(ValueError, match="at least one class"):
        gini(np.zeros(4))


def test_groups_by_rank_with_ties_upward():
    assert groups(np.arange(1, 11)).tolist() == [0, 0, 1, 1, 2, 2, 2, 2, 2, 2]
    assert groups(np.arange(1, 11)[::-1]).tolist() == [2, 2, 2, 2, 2, 2, 1, 1, 0, 0]
    assert groups(np.array([5, 5, 5, 5, 9])).tolist() == [2, 2, 2, 2, 2]
    assert groups(np.array([1, 2, 2, 3, 4])).tolist() == [0, 2, 2, 2, 2]  # both thresholds are 2
    for n in (59, 171, 847):
        assert np.bincount(groups(np.random.default_rng(0).random(n))).tolist() == [
            int(0.2 * n),
            int(0.4 * n) - int(0.2 * n),
            n - int(0.4 * n),
        ]


def test_repeat_factors_by_hand():
    pixels = np.array([[90, 10, 0], [100, 0, 0], [50, 0, 0], [0, 0, 0]])
    statistics = Statistics(pixels, np.array([0, 0, 50, 100]))
    np.testing.assert_allclose(statistics.frequency("image"), [0.75, 0.25, 0])
    np.testing.assert_allclose(statistics.frequency("pixel"), [0.6, 0.025, 0])
    r = 2.0  # sqrt(1 / 0.25)
    head = np.sqrt(1 / 0.75)
    np.testing.assert_allclose(repeat_factors(statistics, 1.0), [r, head, head, 1], rtol=1e-6)
    np.testing.assert_allclose(repeat_factors(statistics, 1.0, mode="mean"), [(r + head) / 2, head, head, 1], rtol=1e-6)
    np.testing.assert_allclose(repeat_factors(statistics, 1.0, mode="sum"), [r + head, head, head, 0], rtol=1e-6)
    np.testing.assert_allclose(repeat_factors(statistics, 0.1, "pixel"), [2, 1, 1, 1], rtol=1e-6)


def test_frequent_classes_are_not_repeated():
    presence = np.ones((5, 3), bool)
    assert image_factors(presence, np.array([1.0, 0.5, 0.3]), 0.001, "max").tolist() == [1] * 5
