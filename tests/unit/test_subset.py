"""The greedy sampler against a search over all images with fractions, and its script."""

import dataclasses
import sys
from fractions import Fraction

import numpy as np
import pytest
import yaml
from scipy import sparse

from common.config import SourceConfig
from common.data import SegmentationDataset, class_statistics
from common.data.imbalance import gini
from common.data.subset import _Removal, greedy_subset, presence_weights
from scripts import make_longtail
from tests.unit.data_files import folder_options, picture, save


def presence(n=40, k=7, seed=0):
    """Rare to common classes, each shown at least twice."""
    shown = np.random.default_rng(seed).random((n, k)) < np.linspace(0.08, 0.9, k)
    shown[:2] = True
    return shown.astype(np.int64)


def shares(n=40, k=7, seed=0):
    weights = presence(n, k, seed) * np.random.default_rng(seed + 1).random((n, k))
    return weights / weights.sum(1, keepdims=True).clip(1e-9)


def exact_gini(counts):
    """Mean absolute difference of all pairs over twice the mean."""
    values = [Fraction(c) for c in counts]
    pairs = sum(abs(a - b) for a in values for b in values)
    return pairs / (2 * len(values) * sum(values))


def allowed(weights, alive):
    """Images that may go: none of their classes has them as its last."""
    return [i for i in np.flatnonzero(alive) if not ((weights[alive] > 0).sum(0) == 1)[weights[i] > 0].any()]


@pytest.mark.parametrize("make", [presence, shares])
@pytest.mark.parametrize("seed", range(3))
def test_each_removal_is_the_best_of_all(make, seed):
    weights = make(seed=seed)
    subset = greedy_subset(sparse.csr_array(weights.astype(float)), images=25, seed=seed)
    assert len(subset.kept) == 25 and len(subset.removed) == 15
    assert sorted([*subset.kept, *subset.removed]) == list(range(40))
    alive = np.ones(40, bool)
    for step, image in enumerate(subset.removed):
        total = weights[alive].sum(0)
        after = {i: exact_gini(total - weights[i]) for i in allowed(weights, alive)}
        if make is presence:
            assert after[image] == max(after.values())
        else:
            assert float(after[image]) == pytest.approx(float(max(after.values())), abs=1e-12)
        assert subset.path[step] == pytest.approx(float(exact_gini(total)), abs=1e-12)
        alive[image] = False
    assert subset.path[-1] == pytest.approx(gini(weights[subset.kept].sum(0)), abs=1e-12)


@pytest.mark.parametrize("make", [presence, shares])
def test_gini_never_falls_and_no_class_is_emptied(make):
    weights = make(n=1500, k=25, seed=4)  # far more images than are evaluated exactly
    subset = greedy_subset(sparse.csr_array(weights.astype(float)), images=700)
    assert len(subset.kept) == 700 and (np.diff(subset.path) >= -1e-12).all()
    assert (weights[subset.kept].sum(0) > 0).all()
    assert subset.path[-1] == pytest.approx(gini(weights[subset.kept].sum(0)), abs=1e-9)
    assert subset.path[-1] > subset.path[0] + 0.05


def test_shortlisting_loses_next_to_nothing():
    weights = presence(n=400, k=20, seed=2)
    subset = greedy_subset(sparse.csr_array(weights.astype(float)), images=360)
    alive = np.ones(400, bool)
    for step, image in enumerate(subset.removed):
        total = weights[alive].sum(0)
        best = max(gini(total - weights[i]) for i in allowed(weights, alive))
        assert subset.path[step + 1] == pytest.approx(best, abs=1e-9)
        alive[image] = False


def test_number_and_coefficient_together():
    weights = sparse.csr_array(presence(n=1500, k=25, seed=4).astype(float))
    start, steepest = gini(weights.sum(0)), greedy_subset(weights, images=700).path[-1]
    goal = (start + steepest) / 2
    subset = greedy_subset(weights, images=700, goal=goal)
    assert len(subset.kept) == 700 and subset.path[-1] == pytest.approx(goal, abs=0.002)
    assert (np.diff(subset.path) >= -1e-12).all()
    line = np.linspace(start, goal, 801)
    assert np.abs(subset.path - line).max() < 0.01


def test_coefficient_alone_stops_as_soon_as_it_is_reached():
    weights = sparse.csr_array(presence(seed=1).astype(float))
    goal = gini(weights.sum(0)) + 0.05
    subset = greedy_subset(weights, goal=goal)
    assert subset.path[-1] >= goal > subset.path[-2]
    assert greedy_subset(weights, goal=0.0).kept.tolist() == list(range(40))


def test_the_seed_decides_between_equals():
    weights = sparse.csr_array(np.repeat(np.array([[1.0, 0], [1, 1], [0, 1]]), [30, 10, 10], 0))
    first, again, other = (greedy_subset(weights, images=45, seed=s) for s in (0, 0, 1))
    assert np.array_equal(first.removed, again.removed) and not np.array_equal(first.kept, other.kept)
    np.testing.assert_allclose(first.path, other.path)


def test_a_goal_is_given_up_only_where_no_image_may_go():
    """Many images show several equally heavy classes, which the first-order change overrates; others may still go."""
    light = heavy = 6
    together = np.repeat([0.0, 1.0], 6)
    alone = [np.eye(light + heavy)[k] for k in range(light + heavy)]
    weights = np.array([*alone[:light], *[together] * 100, *alone[light:] * 20])
    removal = _Removal(sparse.csr_array(weights))
    alive = np.ones(len(weights), bool)
    while (image := removal.step(np.inf)) is not None:
        alive[image] = False

    left = weights[alive]
    assert len(left) < 226, "where a shortlist alone had given up"
    for k in range(len(left)):
        without = np.delete(left, k, 0).sum(0)
        assert without.min() == 0 or gini(without) < removal.gini


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "give a number of images"),
        ({"images": 0}, "0 images of 40: take between 1 and 40"),
        ({"images": 41}, "41 images of 40"),
        ({"images": 1}, r"1 images cannot be reached: with \d+ images and a coefficient of 0\.\d+, every further"),
        (
            {"images": 35, "goal": 0.9},
            r"35 images and .* of 0.9 cannot be reached: with 35 images .* is 0\.\d+; change one",
        ),
        (
            {"images": 35, "goal": 0.1},
            r"a Gini coefficient of 0.1: the whole set already has 0\.\d+, and it never falls",
        ),
        ({"goal": 0.99}, "a Gini coefficient of 0.99 cannot be reached"),
    ],
)
def test_goals_out_of_reach(options, message):
    with pytest.raises(ValueError, match=message) as error:
        greedy_subset(sparse.csr_array(presence().astype(float)), **options)
    assert "\n" not in str(error.value)


@pytest.fixture
def source(tmp_path):
    """Twelve images of five classes; class 4 in two of them, the first row ignored."""
    generator = np.random.default_rng(0)
    for i in range(12):
        label = generator.integers(0, 4, (20, 24), dtype=np.uint8) if i % 2 else np.zeros((20, 24), np.uint8)
        label[5:8] = 4 if i < 2 else 0
        label[0] = 255
        save(picture(20, 24, i), tmp_path / "set" / "images" / "train" / f"im{i:02d}.png")
        save(label, tmp_path / "set" / "labels" / "train" / f"im{i:02d}.png")
    return SourceConfig(dataset="folder", root=str(tmp_path / "set"), folder=folder_options())


def test_weights_of_a_data_set(source):
    statistics = class_statistics(SegmentationDataset(source), 0)
    assert np.array_equal(presence_weights(statistics, "image").toarray(), statistics.presence)
    expected = statistics.pixels / (20 * 24)
    np.testing.assert_allclose(presence_weights(statistics, "pixel").toarray(), expected)
    np.testing.assert_allclose(presence_weights(statistics, "pixel").sum(0), statistics.area)


def test_script(tmp_path, monkeypatch, capsys):
    folder = tmp_path / "camvid"
    for i in range(12):
        label = np.full((20, 24), i % 3, np.uint8)
        label[:4] = 10 if i < 2 else 3
        save(picture(20, 24, i), folder / "images" / "train" / f"im{i:02d}.jpg")
        save(label, folder / "labels" / "train" / f"im{i:02d}.png")
    out = tmp_path / "lists" / "lt.txt"
    words = ["make_longtail.py", "camvid", "--root", str(folder), "--out", str(out), "--workers", "0"]
    monkeypatch.setattr(sys, "argv", [*words, "--images", "9"])
    make_longtail.main()
    names = out.read_text().split()
    assert len(names) == 9 and all(name.endswith(".jpg") for name in names) and names == sorted(names)
    listed = SegmentationDataset(SourceConfig(dataset="camvid", root=str(folder), list=str(out)))
    assert len(listed) == 9
    counts = class_statistics(listed, 0).image_count
    printed = capsys.readouterr().out
    assert (counts[[0, 1, 2, 3, 10]] > 0).all() and f"Gini {gini(counts):.4f}" in printed
    assert "whole set: 12 images" in printed and "subset: 9 images" in printed and "rare" in printed
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(ValueError, match="give --images, --gini, or both"):
        make_longtail.main()


def test_script_takes_a_folder_set_from_a_config(source, tmp_path, monkeypatch):
    data = {"dataset": "folder", "root": source.root, "folder": source.folder}
    streams = {"labeled": {"batch_size": 1}, "all": {"batch_size": 1, "labels": False}}
    tree = {"model": {"name": "pspnet", "num_classes": 5}, "data": {**data, "streams": streams}}
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(tree))
    out = tmp_path / "own.txt"
    words = ["make_longtail.py", "--config", str(tmp_path / "own.yaml"), "--images", "9", "--workers", "0"]
    for more in ([], ["--stream", "all", "data.streams.all.split=train"]):
        monkeypatch.setattr(sys, "argv", [*words, "--out", str(out), *more])
        make_longtail.main()
        listed = SegmentationDataset(dataclasses.replace(source, list=str(out)))
        assert len(listed) == len(out.read_text().split()) == 9
        assert (class_statistics(listed, 0).image_count > 0).all()
        out.unlink()
    for wrong, message in ((["camvid"], "name one data set"), (["--stream", "none"], "streams: all, labeled")):
        monkeypatch.setattr(sys, "argv", [*words, "--out", str(out), *wrong])
        with pytest.raises(ValueError, match=message):
            make_longtail.main()
    assert not out.exists()
