"""Streams: which draw shows what, resuming, ranks, workers and errors."""

import dataclasses
import itertools
import re
import warnings

import numpy as np
import pytest
import torch

from common.config import ConfigError, DataConfig, StreamConfig, TrainConfig
from common.data import SegmentationDataset, Stream, make_loaders, make_streams
from common.data.orders import Order, RepeatOrder
from tests.unit.data_files import make_folder


@pytest.fixture
def data(tmp_path):
    source = make_folder(tmp_path, images=7)
    fields = {f.name: getattr(source, f.name) for f in dataclasses.fields(source)}
    augment = {"recipe": "mmseg", "crop": [16, 16]}
    stream = StreamConfig(**fields, batch_size=4, augment=augment)
    return DataConfig(streams={"labeled": stream, "other": dataclasses.replace(stream, batch_size=8)}, workers=0)


@pytest.mark.parametrize(
    ("sampler", "said"),
    [
        ({"threshold": 0.5}, "threshold: ignored where order is shuffle, not repeat_factor"),
        ({"temperature": 0.5}, "temperature: ignored where order is shuffle, not rare_class"),
        ({"min_share": 0.1, "level": "pixel"}, "level: .*factor; min_share: .*rare_class"),
        ({"order": "class_uniform", "threshold": 0.5, "mode": "sum"}, "threshold, mode: ignored where"),
        ({"order": "repeat_factor", "threshold": 9.0, "min_pixels": 7}, "min_pixels: ignored where"),
        ({"order": "shuffle", "threshold": 0.5}, None),  # a config below it is switched off
        ({"min_share": None}, None),
    ],
)
def test_options_of_another_order_are_said(data, sampler, said):
    streams = {"labeled": dataclasses.replace(data.streams["labeled"], sampler=sampler)}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        make_streams(dataclasses.replace(data, streams=streams), 0)
    texts = [str(item.message) for item in caught if "changes nothing" not in str(item.message)]
    if said is None:
        assert texts == []
    else:
        assert len(texts) == 1 and re.search(rf"data.streams.labeled.sampler: {said}", texts[0])


def run(data, batches, start=0, rank=0, world=1, devices=1, name="labeled", **changes):
    data = dataclasses.replace(data, **changes)
    loader = make_loaders(data, TrainConfig(devices=devices), start, rank, world, seed=5)[name]
    return list(itertools.islice(loader, batches))


def equal(a, b):
    assert a.keys() == b.keys()
    return all(torch.equal(a[k], b[k]) if isinstance(a[k], torch.Tensor) else a[k] == b[k] for k in a)


def test_a_stream_lends_its_colours_by_name(data):
    source, lender = data.streams["labeled"], data.streams["other"]
    images = {"dataset": "folder", "root": lender.root, "folder": lender.folder}

    def sample(colour_from):
        augment = {"recipe": "cpsl", "crop": [16, 16], "colour_from": colour_from}
        streams = {"labeled": dataclasses.replace(source, augment=augment), "other": lender}
        return make_streams(dataclasses.replace(data, streams=streams), 0)["labeled"].sample(3)

    assert torch.equal(sample("other")["image"], sample(images)["image"])
    assert not torch.equal(sample("other")["image"], sample(None)["image"])
    message = "data.streams.labeled.augment.colour_from: unknown 'othr'; did you mean 'other'"
    with pytest.raises(ConfigError, match=message):
        sample("othr")


def test_every_epoch_shows_every_image_once():
    order = Order(13, 0, "s")
    epochs = [[order.index(13 * e + k) for k in range(13)] for e in range(5)]
    assert all(sorted(epoch) == list(range(13)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 5
    assert [Order(13, 0, "s").index(d) for d in (40, 3, 64)] == [order.index(d) for d in (40, 3, 64)]
    assert epochs[0] != [Order(13, 0, "t").index(k) for k in range(13)]
    assert epochs[0] != [Order(13, 1, "s").index(k) for k in range(13)]


def test_sequential_order():
    order = Order(3, 0, "s", shuffle=False)
    assert [order.index(d) for d in range(7)] == [0, 1, 2, 0, 1, 2, 0]


def test_repeat_order_shows_each_image_by_its_factor():
    factors = np.array([1.0, 2.0, 1.25, 3.6, 0.0, 1.0], np.float32)
    order = RepeatOrder(factors, 0, "s")
    seen = np.zeros(6)
    draw, epochs = 0, 800
    for epoch in range(epochs):
        counts = np.zeros(6)
        while order.locate(draw)[0] == epoch:
            counts[order.index(draw)] += 1
            draw += 1
        assert np.all(counts >= np.floor(factors)) and np.all(counts <= np.ceil(factors))
        seen += counts
    np.testing.assert_allclose(seen / epochs, factors, atol=0.06)


def test_repeat_order_can_be_entered_anywhere():
    factors = np.random.default_rng(0).uniform(1, 3, 20).astype(np.float32)
    walked = RepeatOrder(factors, 3, "s")
    indices = [walked.index(d) for d in range(500)]
    for draw in (499, 0, 250, 41):
        assert RepeatOrder(factors, 3, "s").index(draw) == indices[draw]
    with pytest.raises(ValueError, match="factors of all images are 0"):
        RepeatOrder(np.zeros(3), 0, "s")


def test_batches_follow_the_draws(data):
    stream = make_streams(data, 5)["labeled"]
    for step, batch in enumerate(run(data, 4)):
        assert batch["draw"].tolist() == list(range(4 * step, 4 * step + 4))
        assert batch["image"].shape == (4, 3, 16, 16) and batch["image"].dtype == torch.uint8
        assert batch["label"].shape == (4, 16, 16) and batch["label"].dtype == torch.int16
        assert batch["geometry"].shape == (4, 7) and len(batch["name"]) == 4
        for k in range(4):
            alone = stream.sample(4 * step + k)
            assert torch.equal(alone["image"], batch["image"][k]) and alone["index"] == batch["index"][k]


def test_a_run_resumes_at_any_step(data):
    whole = run(data, 9)
    assert all(equal(a, b) for a, b in zip(whole[5:], run(data, 4, start=5), strict=True))


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_change_nothing(data, workers):
    state = torch.get_rng_state()
    batches = run(data, 5, start=2, workers=workers)
    assert torch.equal(state, torch.get_rng_state())
    assert all(equal(a, b) for a, b in zip(run(data, 5, start=2), batches, strict=True))


def test_ranks_and_accumulation_see_the_draws_of_one_process(data):
    whole = [batch["draw"].tolist() for batch in run(data, 3)]
    for world in (1, 2, 4):
        per_step = 4 // world
        ranks = [run(data, 3 * per_step, rank=r, world=world, devices=4) for r in range(world)]
        for step in range(3):
            slots = {}
            for r, batches in enumerate(ranks):
                for k, batch in enumerate(batches[step * per_step : (step + 1) * per_step]):
                    slots[r + k * world] = batch["draw"].tolist()
            assert sum((slots[v] for v in sorted(slots)), []) == whole[step]


def test_streams_differ_in_order_and_augmentation(data):
    a, b = (run(data, 4, name=name) for name in ("labeled", "other"))
    assert torch.cat([x["index"] for x in a]).tolist() != torch.cat([x["index"] for x in b]).tolist()[:16]
    assert [x["draw"].tolist() for x in b] == [list(range(8 * k, 8 * k + 8)) for k in range(4)]


def test_an_image_shown_again_is_augmented_anew(tmp_path):
    source = make_folder(tmp_path, images=1)
    fields = {f.name: getattr(source, f.name) for f in dataclasses.fields(source)}
    stream = StreamConfig(**fields, batch_size=5, augment={"recipe": "mmseg", "crop": [16, 16]})
    batch = run(DataConfig(streams={"one": stream}, workers=0), 1, name="one")[0]
    assert batch["index"].tolist() == [0] * 5
    assert len({tuple(g.tolist()) for g in batch["geometry"]}) > 1


def test_an_image_that_is_repeated_in_an_epoch_is_augmented_anew(tmp_path):
    """Repeat-factor sampling with detectron2's recipe: the draws of one epoch that show the same image all differ."""
    source = make_folder(tmp_path, images=3)
    fields = {f.name: getattr(source, f.name) for f in dataclasses.fields(source)}
    augment = {"recipe": "detectron2", "crop": [16, 16], "short_edges": [24, 32, 40, 48, 56, 64]}
    sampler = {"order": "repeat_factor", "threshold": 9.0}  # every image is shown three times or more
    stream = StreamConfig(**fields, batch_size=1, augment=augment, sampler=sampler)
    stream = make_streams(DataConfig(streams={"s": stream}, workers=0), 5, tmp_path / "cache")["s"]
    draws = list(itertools.takewhile(lambda draw: stream.order.locate(draw)[0] == 0, itertools.count()))
    shown = [stream.sample(draw) for draw in draws]
    for index in range(3):
        same = [sample for sample in shown if sample["index"] == index]
        assert len(same) >= 3
        for a, b in itertools.combinations(same, 2):
            assert not torch.equal(a["geometry"], b["geometry"]) and not torch.equal(a["image"], b["image"])
    assert all(equal(stream.sample(draw), sample) for draw, sample in zip(draws, shown, strict=True))


def test_images_of_several_sizes_are_refused_in_one_line(tmp_path):
    """A network takes one tensor; without a crop they are of their own sizes."""
    make_folder(tmp_path, images=1, size=(32, 32))
    source = make_folder(tmp_path / "b", images=2)
    (tmp_path / "images" / "train" / "im0.png").rename(tmp_path / "b" / "images" / "train" / "im0.png")
    (tmp_path / "labels" / "train" / "im0.png").rename(tmp_path / "b" / "labels" / "train" / "im0.png")
    fields = {f.name: getattr(source, f.name) for f in dataclasses.fields(source)}
    stream = StreamConfig(**fields, batch_size=2, sampler={"order": "sequential"})
    with pytest.raises(ValueError, match="im0 and im1: `image`, which no crop brings to one size, is 32×32 and 48×64"):
        run(DataConfig(streams={"s": stream}, workers=0), 1, name="s")
    batch = run(DataConfig(streams={"s": stream}, workers=0), 2, name="s", devices=2)
    assert [tuple(micro["image"].shape) for micro in batch] == [(1, 3, 32, 32), (1, 3, 48, 64)]


@pytest.mark.parametrize("workers", [0, 2])
def test_errors_in_a_file_arrive_as_one_line(tmp_path, data, workers):
    stream = data.streams["labeled"]
    path = next(iter(SegmentationDataset(stream).records)).image
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"im0\.png: cannot decode the image") as error:
        run(data, 3, workers=workers)
    assert type(error.value) is ValueError and "\n" not in str(error.value) and "worker" not in str(error.value)


@pytest.mark.parametrize("trains_there", [True, False])
def test_memory_is_pinned_where_a_gpu_trains(data, monkeypatch, trains_there):
    """Not where one is there alone."""
    asked = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: trains_there)
    monkeypatch.setattr("common.data.streams.batches", lambda *args, pin_memory, **more: asked.append(pin_memory))
    make_loaders(data, TrainConfig())
    assert asked == [trains_there] * 2


def test_settings_that_cannot_work_are_refused(data):
    with pytest.raises(ValueError, match="batch_size 4 must be a multiple of train.devices 3"):
        run(data, 1, devices=3)
    with pytest.raises(ValueError, match="train.devices 2 must be a multiple of the 4 processes"):
        run(data, 1, devices=2, world=4)
    with pytest.raises(ValueError, match="names no training stream"):
        make_loaders(DataConfig(), TrainConfig())
    broken = dataclasses.replace(data.streams["labeled"], sampler={"order": "random"})
    with pytest.raises(ConfigError, match="data.streams.labeled.sampler.order: 'random' is not one of shuffle"):
        make_streams(dataclasses.replace(data, streams={"labeled": broken}), 0)
    with pytest.raises(ValueError, match="batch_size 0 must be at least 1"):
        Stream("s", make_streams(data, 0)["labeled"].dataset, 0, 0)


def test_repeat_factor_sampling_from_a_config(tmp_path, data):
    sampler = {"order": "repeat_factor", "threshold": 4.0, "level": "image"}
    stream = dataclasses.replace(data.streams["labeled"], sampler=sampler)
    order = make_streams(dataclasses.replace(data, streams={"s": stream}), 0, tmp_path / "cache")["s"].order
    assert isinstance(order, RepeatOrder) and order.locate(0) == (0, 0)
    assert order.whole.min() >= 2  # every frequency is at most 1, so every factor at least sqrt(4)
    assert len(list((tmp_path / "cache").iterdir())) == 1
