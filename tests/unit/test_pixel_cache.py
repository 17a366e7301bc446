"""The cache of decoded images: the same pixels, within its bound, made anew when a file changes."""

import os
import pickle

import numpy as np
import pytest
import torch

from common.config import DataConfig, SourceConfig, StreamConfig
from common.data import SegmentationDataset, make_streams
from common.data.images import Picture
from common.data.pixel_cache import PixelCache, pixel_cache
from common.data.streams import hold_images
from tests.unit.data_files import picture, save

SIZES = ((20, 30), (24, 16), (10, 40))


@pytest.fixture
def paths(tmp_path):
    files = [tmp_path / "images" / f"{k}.png" for k in range(len(SIZES))]
    for k, (path, size) in enumerate(zip(files, SIZES, strict=True)):
        save(picture(*size, k), path)
    return files


def cached(paths, tmp_path, limit=1 << 20, workers=0):
    return pixel_cache(paths, "toy", tmp_path / "cache", limit, workers)


@pytest.mark.parametrize("workers", [0, 2])
def test_pixels_are_those_of_the_file(paths, tmp_path, workers):
    cache = cached(paths, tmp_path, workers=workers)
    cache = pickle.loads(pickle.dumps(cache))  # as a spawned loader process gets it
    for path in paths:
        ours, theirs = cache.picture(path), Picture(path)
        assert ours.size == theirs.size and ours.path == path
        assert np.array_equal(ours.pixels(), theirs.pixels())
        window = slice(2, 9), slice(3, 11)
        assert np.array_equal(ours.window(*window)[..., :3], theirs.window(*window)[..., :3])
        ours.pixels()[:] = 0  # a sample of its own
        assert np.array_equal(ours.pixels(), theirs.pixels())


def test_the_cache_is_bounded(paths, tmp_path):
    first = 3 * 20 * 30
    cache = cached(paths, tmp_path, limit=first + 5)
    assert list(cache.places) == [str(paths[0])] and cache.size == first
    assert (cache.folder / "pixels.u8").stat().st_size == first
    assert type(cache.picture(paths[1])) is Picture
    assert cached(paths, tmp_path, limit=5).size == 0
    assert np.array_equal(cached(paths, tmp_path, limit=5).picture(paths[0]).pixels(), Picture(paths[0]).pixels())


def test_it_is_made_once_and_anew_when_a_file_changes(paths, tmp_path):
    folder = cached(paths, tmp_path).folder
    before = (folder / "pixels.u8").stat().st_mtime_ns
    assert cached(paths, tmp_path).folder == folder and (folder / "pixels.u8").stat().st_mtime_ns == before

    save(picture(*SIZES[1], 9), paths[1])
    os.utime(paths[1], ns=(1, 1))
    again = cached(paths, tmp_path)
    assert again.folder != folder and not folder.exists()
    assert np.array_equal(again.picture(paths[1]).pixels(), Picture(paths[1]).pixels())


def test_a_damaged_file_is_named_and_leaves_nothing(paths, tmp_path):
    paths[2].write_bytes(paths[2].read_bytes()[:-20])
    with pytest.raises(ValueError, match="2.png: .*damaged"):
        cached(paths, tmp_path)
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_disk_without_room_is_no_error(paths, tmp_path, monkeypatch):
    def full(*args):
        raise OSError("No space left on device")

    monkeypatch.setattr("common.data.pixel_cache.write_cache", full)
    with pytest.warns(UserWarning, match="data.cache_size: images are decoded instead"):
        assert cached(paths, tmp_path) is None


def test_streams_of_the_same_images_share_one(scenes, tmp_path):
    """As labelled and unlabelled ones of a whole split: neither removes what the other reads."""
    own = {"dataset": "cityscapes", "root": str(scenes), "split": "train", "batch_size": 1}
    streams = {"labeled": StreamConfig(**own), "unlabeled": StreamConfig(**own, labels=False)}
    data = DataConfig(streams=streams, cache_size=0.01, workers=0)
    made = make_streams(data, 0, tmp_path)
    for _ in range(2):  # written, and found
        hold_images(made, data, tmp_path)
        first, second = (stream.dataset for stream in made.values())
        assert first.cache is second.cache and len(list(tmp_path.glob("pixels-*"))) == 1
        for dataset in (first, second):
            path = dataset.records[0].image
            assert np.array_equal(dataset.open(0)["image"].pixels(), Picture(path).pixels())


def test_a_cache_that_another_run_has_removed(paths, tmp_path):
    """It holds another number of bytes: the images are decoded from then on."""
    cache = pickle.loads(pickle.dumps(cached(paths, tmp_path)))
    cached(paths, tmp_path, limit=3000)
    with pytest.warns(UserWarning, match="is gone, images are decoded instead"):
        assert np.array_equal(cache.picture(paths[0]).pixels(), Picture(paths[0]).pixels())
    assert np.array_equal(cache.picture(paths[1]).pixels(), Picture(paths[1]).pixels())


def test_other_ranks_write_nothing(paths, tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    assert cached(paths, tmp_path) is None and not (tmp_path / "cache").exists()
    monkeypatch.setenv("RANK", "0")
    folder = cached(paths, tmp_path).folder
    monkeypatch.setenv("RANK", "1")
    assert cached(paths, tmp_path).folder == folder


def test_samples_of_a_stream_are_the_same(scenes, tmp_path):
    source = {"dataset": "cityscapes", "root": str(scenes)}
    augment = {"recipe": "mmseg", "crop": [32, 64], "box": [64, 128]}
    stream = StreamConfig(**source, batch_size=1, augment=augment)
    data = DataConfig(**source, workers=0, streams={"labeled": stream}, cache_size=1.0)
    plain, held = (make_streams(data, seed=0)["labeled"] for _ in range(2))
    hold_images({"labeled": held}, data, tmp_path)
    assert isinstance(held.dataset.cache, PixelCache) and plain.dataset.cache is None
    for draw in range(4):
        ours, theirs = held.sample(draw), plain.sample(draw)
        assert all(torch.equal(ours[key], theirs[key]) for key in ("image", "label", "geometry"))

    whole = SegmentationDataset(SourceConfig(**source))
    assert np.array_equal(held.dataset.load(0)["image"], whole.load(0)["image"])
