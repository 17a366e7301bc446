"""The procedural toy sets: what they promise to those who train on them, and the files of the real layouts."""

import json
import os
import runpy
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from common.config import SourceConfig
from common.data import DATASETS, IGNORE, SegmentationDataset, class_statistics, toy
from common.data.imbalance import gini
from common.data.toy.canvas import DOMAINS
from common.data.toy.glyphs import ADE_IDS, ADE_RANKS, ade_scene, voc_scene
from common.data.toy.people import mhp_scene
from common.data.toy.scene import street_scene
from tests.unit.data_files import decode_png16

REPO = Path(__file__).resolve().parents[2]
SMALL = {"train": 3, "val": 2, "size": (64, 128)}
EVALUATED = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)  # cityscapesScripts, labels.py
TAIL = (12, 19, 20, 25, 27, 28, 31, 32, 33)


def read(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.array(image)


@pytest.fixture(scope="module")
def day() -> list:
    return [street_scene(0, "day", i, (128, 256)) for i in range(48)]


@pytest.mark.parametrize("draw", [street_scene, voc_scene, ade_scene, mhp_scene])
def test_a_scene_is_a_function_of_its_arguments(draw):
    first, again = draw(3, "day", 5, (64, 96)), draw(3, "day", 5, (64, 96))
    assert np.array_equal(first.image, again.image) and np.array_equal(first.label, again.label)
    assert first.image.dtype == np.uint8 and first.image.shape == (*first.label.shape, 3)
    for other in (draw(4, "day", 5, (64, 96)), draw(3, "fog", 5, (64, 96)), draw(3, "day", 8, (64, 96))):
        assert not np.array_equal(first.label, other.label)


def test_the_class_distribution_has_a_long_tail_that_small_sets_hold_too(day):
    counts = np.bincount(np.concatenate([s.label.ravel() for s in day]), minlength=256)
    share = counts[list(EVALUATED)] / counts.sum()
    assert (share > 0.0008).all()  # every class is there and not hopeless
    assert share.min() < 0.003 and share.max() > 0.3
    validation = np.concatenate([street_scene(0, "day", 1_000_000 + i, (128, 256)).label.ravel() for i in range(16)])
    assert set(EVALUATED) <= set(validation.tolist())


def test_colour_alone_does_not_tell_the_tail_apart(day):
    """The best classifier of single colours (a MAP table of 16³ bins) finds little of the tail."""
    bins = [(s.image // 16).astype(np.int64) @ np.array([256, 16, 1]) for s in day]
    table = np.zeros((4096, 256), np.int64)
    for colour, scene in zip(bins[:32], day[:32], strict=True):
        np.add.at(table, (colour.ravel(), scene.label.ravel()), 1)
    guess = np.concatenate([table.argmax(1)[colour].ravel() for colour in bins[32:]])
    truth = np.concatenate([s.label.ravel() for s in day[32:]])
    ious = {k: ((guess == k) & (truth == k)).sum() / ((guess == k) | (truth == k)).sum() for k in TAIL}
    assert np.mean(list(ious.values())) < 0.15  # colour leaves most of the tail undecided
    assert max(ious[k] for k in (12, 25, 27, 28, 31, 32, 33)) < 0.25  # lights and signs have colours of their own


@pytest.mark.parametrize("index", [0, 1, 2])
def test_the_scene_does_not_depend_on_the_resolution(index):
    small, large = (street_scene(0, "day", index, size) for size in ((128, 256), (640, 1280)))
    assert (large.label[2::5, 2::5] == small.label).mean() > 0.98  # the same pixel centres
    assert np.abs(large.image[2::5, 2::5].astype(float) - small.image).mean() < 16  # texture edges and noise differ


def test_domains_look_different():
    mean = {d: np.mean([street_scene(0, d, i, (64, 128)).image for i in range(6)], (0, 1, 2)) for d in DOMAINS}
    colourful = {d: np.ptp(street_scene(0, d, 0, (64, 128)).image.astype(float), axis=-1).mean() for d in DOMAINS}
    assert mean["dusk"].mean() < 0.8 * mean["day"].mean() < mean["day"].mean() < mean["fog"].mean()
    assert colourful["fog"] < colourful["day"] < colourful["render"]


def test_real_size():
    scene = street_scene(0, "render", 0, (1024, 2048))
    assert scene.image.shape == (1024, 2048, 3) and len(np.unique(scene.label)) >= 12


def test_cityscapes_layout(tmp_path):
    root = toy.make("cityscapes", tmp_path / "city", **SMALL, train_ids=True)
    row = DATASETS["cityscapes"]
    assert len(row.layout(root, "val", None)) == 2
    for i, record in enumerate(row.layout(root, "train", None)):
        assert record.name.endswith("_000019_leftImg8bit") and record.label.name.endswith("_labelTrainIds.png")
        scene = street_scene(0, "day", i, (64, 128))
        assert np.array_equal(read(record.image), scene.image)
        raw = read(Path(str(record.label).replace("TrainIds", "Ids")))
        assert raw.dtype == np.uint8 and np.array_equal(raw, scene.label)
        expected = np.full(256, 255)
        expected[list(EVALUATED)] = range(19)
        assert np.array_equal(read(record.label), expected[raw])
        loaded = row.label_table(record.label).read(record.label)
        assert np.array_equal(loaded, np.where(expected[raw] == 255, IGNORE, expected[raw]))


@pytest.mark.parametrize(
    "layout, domain, conditions, labelled",
    [
        ("acdc", "fog", {"fog", "night", "rain", "snow"}, ("train", "val")),
        ("dark_zurich", "dusk", {"night"}, ("val",)),
    ],
)
def test_layouts_of_adverse_conditions(tmp_path, layout, domain, conditions, labelled):
    root = toy.make(layout, tmp_path / layout, train=8, val=3, size=(64, 128))
    row, seen = DATASETS[layout], set()
    for split, first, count in (("train", 0, 8), ("val", 1_000_000, 3)):
        records = sorted(row.layout(root, split, None), key=lambda record: record.name.partition("frame")[2])
        assert len(records) == count and all((r.label is not None) == (split in labelled) for r in records)
        for i, record in enumerate(records):
            seen |= conditions & set(record.image.parts)
            scene = street_scene(0, domain, first + i, (64, 128))
            assert np.array_equal(read(record.image), scene.image)
            if record.label is not None:
                loaded = row.label_table(record.label).read(record.label)
                assert all((loaded[scene.label == raw] == k).all() for k, raw in enumerate(EVALUATED))
                assert (loaded[~np.isin(scene.label, EVALUATED)] == IGNORE).all()
    assert seen == conditions


def test_gta5_layout(tmp_path):
    root = toy.make("gta5", tmp_path / "gta", train=2, size=(64, 128))
    assert sorted(os.listdir(root / "images")) == sorted(os.listdir(root / "labels")) == ["00001.png", "00002.png"]
    with Image.open(root / "labels" / "00001.png") as label:
        assert label.mode == "P" and label.getpalette()[3 * 26 : 3 * 27] == [0, 0, 142]  # car
        assert np.array_equal(np.array(label), street_scene(0, "render", 0, (64, 128)).label)
    with pytest.warns(UserWarning, match="one split"):
        toy.make("gta5", root, train=2, val=2, size=(64, 128))


def test_synthia_layout(tmp_path):
    root = toy.make("synthia", tmp_path / "synthia", train=4)
    pairs = {7: 3, 8: 4, 11: 2, 12: 21, 13: 5, 17: 7, 19: 15, 20: 9, 21: 6, 23: 1, 24: 10, 25: 17, 26: 8, 28: 19}
    pairs |= {32: 12, 33: 11, 22: 0, 27: 0, 31: 0, 1: 0}  # Cityscapes id: SYNTHIA id
    row, seen = DATASETS["synthia"], set()
    for i, record in enumerate(row.layout(root, "train", None)):
        stored = decode_png16(record.label.read_bytes())
        assert stored.shape == (128, 216, 3)
        scene = street_scene(0, "render", i, (128, 216))
        for raw, k in pairs.items():
            assert (stored[..., 0][scene.label == raw] == k).all()
        assert np.array_equal(stored[..., 1], scene.instance) and scene.instance.max() > 3
        seen |= set(np.unique(row.label_table(record.label).read(record.label)).tolist())
    assert seen <= set(range(IGNORE, 16)) and len(seen) > 12


def test_voc_layout(tmp_path):
    root = toy.make("voc", tmp_path / "voc", train=6, val=3)
    base, row = root / "VOCdevkit" / "VOC2012", DATASETS["voc"]
    assert len((base / "ImageSets" / "Segmentation" / "train_aug.txt").read_text().split()) == 6
    records = row.layout(root, "train_aug", None) + row.layout(root, "val", None)
    assert len(records) == 9
    for record in records:
        with Image.open(record.image) as image, Image.open(record.label) as label:
            assert image.size == label.size and label.mode == "P"
            assert label.getpalette()[3:6] == [128, 0, 0]  # aeroplane
            values = set(np.unique(np.array(label)).tolist())
        assert {0, 255} < values <= {*range(21), 255}
    with Image.open(records[2].image) as image:
        assert image.size == (128, 170)  # upright: width, height


def test_coco_layout(tmp_path):
    """The scenes of VOC under COCO's ids; official lists name image and mask, ours the image alone."""
    root = toy.make("coco", tmp_path / "coco", train=8, val=2)
    row, voc = DATASETS["coco"], DATASETS["voc"]
    assert row.num_classes == 81 and row.classes[:4] == ("background", "person", "bicycle", "car")
    pairs = set()
    for split, n in (("train", 8), ("val", 2)):
        dataset = SegmentationDataset(SourceConfig(dataset="coco", root=str(root), split=split))
        assert len(dataset) == n
        for k, name in enumerate(dataset.names):
            scene = voc_scene(0, "day", int(name), (128, 170)).label
            pairs |= set(zip(dataset.load(k)["label"].ravel().tolist(), scene.ravel().tolist(), strict=True))
    names = {(row.classes[coco], voc.classes[k]) for coco, k in pairs if k != 255}
    same = {coco for coco, other in names if coco == other}
    assert len(pairs) > 6 and (0, 255) in pairs and "background" in same and len(same) > 3

    name = dataset.names[0]
    for line in (f"val2017/{name}.jpg masks/{name}.png", name):
        (tmp_path / "list.txt").write_text(line)
        source = SourceConfig(dataset="coco", root=str(root), split="val", list=str(tmp_path / "list.txt"))
        assert SegmentationDataset(source).names == [name]
    (root / "masks").rename(root / "val2017_masks")
    (root / "masks").mkdir()
    (root / "val2017_masks").rename(root / "masks" / "val2017")
    assert all(record.label is not None for record in row.layout(root, "val", None))


def test_ade20k_full_layout(tmp_path):
    assert len(set(ADE_IDS)) >= 60 and 255 in ADE_IDS and max(ADE_IDS) == 846
    root = toy.make("ade20k_full", tmp_path / "ade", train=12, val=2)
    values = set()
    for split, n in (("training", 12), ("validation", 2)):
        images = sorted((root / "images_detectron2" / split).glob("*.jpg"))
        labels = sorted((root / "annotations_detectron2" / split).glob("*.tif"))
        assert [p.stem for p in images] == [p.stem for p in labels] and len(images) == n
        for path in labels:
            label = read(path)
            assert label.dtype == np.uint16
            values |= set(np.unique(label).tolist())
    assert values <= {*ADE_IDS, 65535} and 65535 in values and len(values) > 25


def test_ade20k_full_has_a_tail_of_sixty_classes(tmp_path):
    root = toy.make("ade20k_full", tmp_path / "ade", train=96, val=1, size=(64, 86))
    statistics = class_statistics(SegmentationDataset(SourceConfig(dataset="ade20k_full", root=str(root))), 0)
    counts = np.sort(statistics.image_count[list(ADE_IDS)])[::-1]
    assert len(counts) == 64 and statistics.image_count.sum() == counts.sum() and (counts > 0).sum() >= 60
    assert counts[0] > 40 and counts[8] > 12 and counts[30] < 12 and counts[50] <= 6
    assert gini(counts) > 0.5


def test_coco_stuff_lt_layout(tmp_path):
    root = toy.make("coco_stuff_lt", tmp_path / "coco", train=12, val=2)
    ade = {number: ade_scene(0, "day", number, (128, 170)).label for number in (*range(12), 1_000_000, 1_000_001)}
    values, pairs = set(), set()
    for split, n in (("train", 12), ("val", 2)):
        dataset = SegmentationDataset(SourceConfig(dataset="coco_stuff_lt_40k", root=str(root), split=split))
        assert len(dataset) == n
        for k, name in enumerate(dataset.names):
            label = dataset.load(k)["label"]
            values |= set(np.unique(label).tolist())
            pairs |= set(zip(label.ravel().tolist(), ade[int(name)].ravel().tolist(), strict=True))
    assert len(pairs) == len(values) > 25 and (IGNORE, 65535) in pairs  # one class for one
    published = dataset.row.published.image_count
    first = {coco for coco, scene in pairs if scene in ADE_RANKS[:3]}
    assert min(published[k] for k in first) > 7000  # the most frequent are those of the published counts


def test_mhpv2_lt_layout(tmp_path):
    root = toy.make("mhpv2_lt", tmp_path / "mhp", train=48, val=2)
    train, val = (
        SegmentationDataset(SourceConfig(dataset="mhpv2_lt_7k", root=str(root), split=split))
        for split in ("train", "val")
    )
    assert (len(train), len(val)) == (48, 2)
    assert {read(record.label).ndim for record in train.records} == {2, 3}
    counts = class_statistics(train, 0).image_count
    assert (counts > 0).sum() > 45 and counts[0] == 48 and gini(counts) > 0.4
    assert counts[12] > 20 and counts[51] < 8  # T-shirts, umbrellas
    sides = {k: [] for k in (*range(5, 9), 24, 25)}
    for k in range(48):
        if len(np.unique(mhp_scene(0, "day", k, (128, 170)).instance)) > 3:
            continue  # several people
        label = train.label(k)
        for part in sides:
            if (label == part).any():
                sides[part].append(np.argwhere(label == part)[:, 1].mean() - np.argwhere(label == 3)[:, 1].mean())
    for left, right in ((5, 6), (7, 8), (24, 25)):  # who faces the camera has the left on the picture's right
        assert np.median(sides[left]) > 2 and np.median(sides[right]) < -2


@pytest.mark.parametrize("shape", [(1, 1, 3), (5, 7, 3), (64, 33, 3)])
def test_16_bit_png_reads_back(shape):
    image = np.random.default_rng(0).integers(0, 65536, shape).astype(np.uint16)
    assert np.array_equal(decode_png16(toy.encode_png16(image)), image)
    with pytest.raises(ValueError, match="uint16"):
        toy.encode_png16(image.astype(np.uint8))


def test_a_complete_set_is_left_alone_and_another_replaces_it(tmp_path):
    root = toy.make("cityscapes", tmp_path / "city", **SMALL)
    image = next(root.rglob("*_leftImg8bit.png"))
    stamp = image.stat().st_mtime_ns
    toy.make("cityscapes", root, **SMALL)
    assert image.stat().st_mtime_ns == stamp
    toy.make("cityscapes", root, **SMALL | {"train": 1})
    assert len(list(root.rglob("*_leftImg8bit.png"))) == 3
    assert os.listdir(tmp_path) == ["city"]


def test_a_broken_off_writer_leaves_the_old_set(tmp_path, monkeypatch):
    root = toy.make("cityscapes", tmp_path / "city", **SMALL)
    before = json.loads((root / toy.MARKER).read_text())

    def fail(seed, domain, index, size):
        if index:
            raise OSError("No space left on device")
        return street_scene(seed, domain, index, size)

    monkeypatch.setattr("common.data.toy.write.street_scene", fail)
    with pytest.raises(OSError, match="No space"):
        toy.make("cityscapes", root, **SMALL | {"seed": 1})
    assert json.loads((root / toy.MARKER).read_text()) == before and os.listdir(tmp_path) == ["city"]


def test_never_touches_a_folder_it_did_not_write(tmp_path):
    (tmp_path / "photo.png").write_bytes(b"mine")
    with pytest.raises(ValueError, match="no toy set"):
        toy.make("cityscapes", tmp_path, **SMALL)
    assert os.listdir(tmp_path) == ["photo.png"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"layout": "cityscape"}, "known: cityscapes, gta5"),
        ({"domain": "night"}, "known: day, dusk, fog, render"),
        ({"size": (16, 64)}, "32 pixels"),
        ({"train": 0}, "train = 0"),
        ({"val": -1}, "must not be negative"),
    ],
)
def test_bad_requests_say_what_is_possible(tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message) as error:
        toy.make(**{"layout": "cityscapes", "root": tmp_path / "x"} | arguments)
    assert "\n" not in str(error.value) and not (tmp_path / "x").exists()


def test_command_line(tmp_path, capsys):
    main = runpy.run_path(str(REPO / "scripts" / "make_toy.py"))["main"]
    root = str(tmp_path / "voc")
    assert main(["voc", "--root", root, "--train", "2", "--val", "1", "--size", "48x64"]) == 0
    assert "background" in capsys.readouterr().out
    assert sum(toy.shares(root).values()) == pytest.approx(1)
    for bad in (["--domain", "mars"], ["--train-ids"], ["--train", "0"]):
        assert main(["voc", "--root", str(tmp_path / "x"), *bad]) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and error.count("\n") == 1
