"""Cross-validation over blocks of a drive: what is tested, what is left out, and how alike the folds are."""

import csv
import itertools
import sys
from pathlib import Path

import numpy as np
import pytest

from common.data import SegmentationDataset
from common.data.catalogue.lists import read_list
from common.data.folds import assigned, blocks, deviation, neighbours, sequences
from scripts import prepare_folds
from tests.unit.data_files import picture, save

CAMVID = Path(__file__).parents[2] / "fully_sup" / "splits" / "camvid_folds"


def test_sequences_are_names_less_their_last_number():
    names = ["b_10", "a_9", "b_9", "a_10", "city_000001_000019", "city_000002_000019", "city_000001_000020", "7"]
    found = [[names[place] for place in places] for places in sequences(names)]
    assert sorted(found) == [
        ["7"], ["a_9", "a_10"], ["b_9", "b_10"], ["city_000001_000019", "city_000001_000020"], ["city_000002_000019"],
    ]  # fmt: skip
    assert len(sequences(names[:4], "(.*)")) == 4 and len(sequences(["x9", "y10"], "()[a-z].*")) == 1
    with pytest.raises(ValueError, match="has no group"):
        sequences(names, ".*")
    with pytest.raises(ValueError, match="does not match the image 'sky'"):
        sequences(["a_1", "sky"])


@pytest.mark.parametrize(("frames", "size", "expected"), [(62, 20, [21, 21, 20]), (7, 20, [7]), (4, 1, [1, 1, 1, 1])])
def test_blocks_are_runs_of_one_sequence(frames, size, expected):
    block = blocks([list(range(3)), [3 + place for place in reversed(range(frames))]], size)
    sizes = np.bincount(block)[np.unique(block[3:])].tolist()
    assert sizes == expected and not set(block[:3]) & set(block[3:])
    assert (np.diff(block[3:]) <= 0).all(), "in the sequence's order, which is not that of the places here"


def test_nobody_is_trained_next_to_what_it_is_tested_on():
    parts = sequences([f"a_{k}" for k in range(40)] + [f"b_{k}" for k in range(30)])
    pixels = np.random.default_rng(0).integers(0, 50, (70, 4))
    folds = assigned(pixels, blocks(parts, 5), 3)
    near = neighbours(parts, 2)
    sides = [(set(folds.tested(k)), set(folds.trained(k, near))) for k in range(3)]

    assert sorted(itertools.chain(*(tested for tested, _ in sides))) == list(range(70))
    for tested, trained in sides:
        gap = min(abs(a - b) for a in tested for b in trained if (a < 40) == (b < 40))
        assert gap == 3 and not tested & trained
        dropped = set(range(70)) - tested - trained
        assert all(any(abs(a - b) <= 2 and (a < 40) == (b < 40) for b in tested) for a in dropped)
    assert np.ptp(np.bincount(folds.fold)) <= 1


def test_the_shares_are_those_of_the_best_assignment():
    """Of 9 blocks and 3 folds there are 1680 assignments: none has a smaller largest deviation."""
    pixels = np.random.default_rng(5).integers(1, 100, (9, 3)) * [100, 10, 1]
    folds = assigned(pixels, np.arange(9), 3)

    def worst(fold) -> float:
        shares = [pixels[np.array(fold) == k].sum(0) / pixels[np.array(fold) == k].sum() for k in range(3)]
        return float(np.abs(np.log(np.array(shares) / (pixels.sum(0) / pixels.sum()))).max())

    every = [
        fold for fold in itertools.product(range(3), repeat=9) if np.bincount(fold, minlength=3).tolist() == [3] * 3
    ]
    assert worst(folds.fold) == pytest.approx(min(map(worst, every)))
    assert deviation(pixels, folds.fold, 3).max() == pytest.approx(worst(folds.fold))


def test_a_class_that_few_blocks_show_is_no_error_and_too_few_blocks_are():
    pixels = np.array([[5, 0, 0], [5, 1, 0], [5, 0, 0]])
    assert sorted(assigned(pixels, np.arange(3), 3).fold) == [0, 1, 2]
    with pytest.raises(ValueError, match="3 blocks cannot be dealt to 4 folds"):
        assigned(pixels, np.arange(3), 4)


def test_the_folds_of_camvid():
    """18 blocks, 367 images, each tested once; between a tested image and the next one trained on lies one at least."""
    with (CAMVID / "blocks.csv").open() as file:
        rows = list(csv.DictReader(file))
    order = [row["image"] for row in rows]
    assert len(order) == 367 and len({row["block"] for row in rows}) == 18
    for fold in "12345":
        tested, trained = (read_list(CAMVID / f"fold_{fold}" / f"{part}.txt") for part in ("test", "train"))
        assert tested == [row["image"] for row in rows if row["fold"] == fold]
        kept = set(trained)
        for here, after in itertools.pairwise(order):
            if here.split("_")[0] == after.split("_")[0]:
                assert not (here in tested and after in kept) and not (after in tested and here in kept)


@pytest.fixture
def drive(tmp_path) -> Path:
    for k in range(12):
        label = np.zeros((32, 48), np.uint8)
        label[: 4 + k] = k % 3
        save(picture(32, 48, k), tmp_path / f"images/train/a_{k}.png")
        save(label, tmp_path / f"labels/train/a_{k}.png")

    return tmp_path


def test_the_lists_are_read_as_they_are_written(drive, tmp_path, monkeypatch, capsys, fails):
    out = tmp_path / "folds"
    words = ["camvid", "--root", str(drive), "--folds", "3", "--block", "2", "--workers", "0", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", ["prepare_folds.py", *words])
    prepare_folds.main()
    assert "12 images, 1 sequences, 6 blocks" in capsys.readouterr().out

    source = prepare_folds.cli.SourceConfig(dataset="camvid", root=str(drive), list=str(out / "fold_1" / "test.txt"))
    assert SegmentationDataset(source).names == read_list(out / "fold_1" / "test.txt")
    assert "--force" in fails(prepare_folds.main, *words)
    for option, value in (("--folds", "1"), ("--block", "0"), ("--gap", "-1")):
        assert f"{option} {value}" in fails(prepare_folds.main, *words, "--force", option, value)
    assert "does not match" in fails(prepare_folds.main, *words, "--force", "--sequence", "(b).*")
