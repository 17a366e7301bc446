"""What a killed process leaves unfinished is removed by the next run, and is never taken for data."""

import os
import sys
import time

import numpy as np
import pytest

from common.data import SegmentationDataset, class_statistics
from common.data import toy as toy_sets
from common.files import DRAFT, remove_drafts, replacing
from ltss_benchmark.datasets import conversions, preparation
from tests.unit.data_files import make_folder, picture, save
from tests.unit.ltss_trees import expect, script

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")


def killed(work):
    """`work()` in a process that dies in it, without any clean-up."""
    child = os.fork()
    if child == 0:
        try:
            work()
        finally:
            os._exit(9)
    os.waitpid(child, 0)
    return child


def drafts(folder):
    return [path for path in folder.rglob("*") if path.name.startswith(".") and path.name != ".cache"]


def aged(path, seconds):
    os.utime(path, (time.time() - seconds,) * 2)


def test_a_folder_that_is_being_filled_is_not_idle(tmp_path):
    """Its own time stands still while a file in it grows."""
    for name in ("grows", "stands"):
        draft = tmp_path / f"{DRAFT}{name}"
        draft.mkdir()
        (draft / "pixels").touch()
        for path in (draft / "pixels", draft):
            os.utime(path, (0, 0))
    os.utime(tmp_path / f"{DRAFT}grows" / "pixels")
    remove_drafts(tmp_path, idle=60)
    assert [path.name for path in tmp_path.iterdir()] == [f"{DRAFT}grows"]


def test_drafts_of_the_idle_are_removed(tmp_path):
    (tmp_path / "deep").mkdir()
    (tmp_path / f"{DRAFT}1-a").touch()
    (tmp_path / f"{DRAFT}2-b").mkdir()
    (tmp_path / "deep" / f"{DRAFT}3-c").touch()
    (tmp_path / "kept").touch()
    aged(tmp_path / f"{DRAFT}1-a", 100)
    remove_drafts(tmp_path, idle=60)
    assert sorted(path.name for path in drafts(tmp_path)) == [f"{DRAFT}2-b", f"{DRAFT}3-c"]
    remove_drafts(tmp_path)
    assert [path.name for path in drafts(tmp_path)] == [f"{DRAFT}3-c"]
    remove_drafts(tmp_path, deep=True)
    assert not drafts(tmp_path) and (tmp_path / "kept").exists()


def test_preparation(tmp_path, monkeypatch):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    monkeypatch.setattr(sys, "argv", ["prepare"])
    expect(monkeypatch, "ade20k", 2, 2)
    base = tmp_path / "ADEChallengeData2016"
    for split in ("training", "validation"):
        for k in range(2):
            save(picture(20, 30, k), base / "images" / split / f"a{k}.jpg")
            save(np.full((20, 30), k + 1, np.uint8), base / "annotations" / split / f"a{k}.png")
    target = base / "annotations_detectron2" / "training" / "a0.png"

    def half():
        with preparation.whole(target) as draft:
            draft.write_bytes(b"half")
            os._exit(9)

    killed(half)
    assert len(drafts(base)) == 1 and not target.exists()
    script("ade20k")()
    assert not drafts(base) and target.is_file()

    killed(half)
    script("ade20k")()  # also where nothing is left to do
    assert not drafts(base)
    conversions.ade20k_label((base / "annotations" / "training" / "a1.png", tmp_path / "single.png"))
    assert not drafts(tmp_path)


def test_statistics_cache(tmp_path):
    dataset = SegmentationDataset(make_folder(tmp_path / "set"))
    cache = tmp_path / "cache"
    cache.mkdir()

    def half():
        with replacing(cache / "statistics.npz") as draft:
            draft.write_bytes(b"half")
            os._exit(9)

    killed(half)
    (left,) = drafts(cache)
    class_statistics(dataset, 0, cache)
    assert left.exists()  # another process may be writing it
    aged(left, 100)
    class_statistics(dataset, 0, cache)
    assert not left.exists() and len(list(cache.iterdir())) == 1


def test_toy_sets(tmp_path):
    root = tmp_path / "toy_[1]"
    living = tmp_path / f".{root.name}.1.part"
    other = tmp_path / ".toy_2.999999999.part"

    def half():
        (tmp_path / f".{root.name}.{os.getpid()}.part" / "images").mkdir(parents=True)
        (tmp_path / f".{root.name}.{os.getpid()}.old").mkdir()

    killed(half)
    living.mkdir()
    other.mkdir()
    assert len(drafts(tmp_path)) == 4
    toy_sets.make("gta5", root, train=1, size=(32, 48))
    assert set(drafts(tmp_path)) == {living, other}

    killed(half)
    toy_sets.make("gta5", root, train=1, size=(32, 48))  # there already
    assert set(drafts(tmp_path)) == {living, other}
