"""Data sets on disk: layouts, roots, lists, further maps, and the errors a user meets."""

import dataclasses
import pickle

import numpy as np
import pytest
import torch
from PIL import Image

from common.config import ConfigError, SourceConfig
from common.data import IGNORE, SegmentationDataset, check, resolve
from common.data.images import Picture, read_image
from tests.unit.data_files import (
    classes,
    folder_options,
    make_folder,
    picture,
    save,
    save_palette,
    save_rgb16,
    write_png,
)

RNG = np.random.default_rng(0)


def cityscapes(root, cities=("aachen", "bremen"), end="labelIds"):
    for city in cities:
        for k in range(2):
            stem = f"{city}_00000{k}_000019"
            save(picture(32, 64, k), root / "leftImg8bit" / "train" / city / f"{stem}_leftImg8bit.png")
            label = np.array([7, 8, 26, 4], np.uint8)[classes(32, 64, 4, k)]
            save(label, root / "gtFine" / "train" / city / f"{stem}_gtFine_{end}.png")
    return SourceConfig(dataset="cityscapes", root=str(root))


def test_cityscapes_tree(tmp_path):
    dataset = SegmentationDataset(cityscapes(tmp_path))
    assert dataset.names[0] == "aachen_000000_000019_leftImg8bit" and len(dataset) == 4
    assert set(np.unique(dataset.load(0)["label"])) == {IGNORE, 0, 1, 13}


def test_cityscapes_prefers_train_ids(tmp_path):
    source = cityscapes(tmp_path)
    path = tmp_path / "gtFine" / "train" / "aachen" / "aachen_000000_000019_gtFine_labelTrainIds.png"
    save(np.full((32, 64), 5, np.uint8), path)
    assert np.all(SegmentationDataset(source).load(0)["label"] == 5)


def test_flattened_list_is_found_in_the_official_tree(tmp_path):
    source = cityscapes(tmp_path)
    (tmp_path / "list.txt").write_text(
        "images/train/bremen_000001_000019_leftImg8bit.png segmentation/train/bremen_000001_000019_labelTrainIds.png\n"
        "\naachen_000001_000019\n"
    )
    dataset = SegmentationDataset(dataclasses.replace(source, list=str(tmp_path / "list.txt")))
    assert [name[:13] for name in dataset.names] == ["bremen_000001", "aachen_000001"]
    (tmp_path / "list.txt").write_text("nowhere_1_2\n")
    with pytest.raises(ValueError, match=r"no image named 'nowhere_1_2' \(1 of 1"):
        SegmentationDataset(dataclasses.replace(source, list=str(tmp_path / "list.txt")))


def test_gta5_ids_and_label_of_another_size(tmp_path):
    label = np.array([7, 26, 0, 34], np.uint8)[classes(20, 30, 4)]
    save(picture(20, 30), tmp_path / "images" / "00001.png")
    save_palette(label, tmp_path / "labels" / "00001.png")
    save(picture(40, 60), tmp_path / "images" / "00002.png")
    save_palette(label, tmp_path / "labels" / "00002.png")
    dataset = SegmentationDataset(SourceConfig(dataset="gta5", root=str(tmp_path)))
    first, second = dataset.load(0)["label"], dataset.load(1)["label"]
    assert np.array_equal(first, np.array([0, 13, IGNORE, IGNORE])[classes(20, 30, 4)])
    assert np.array_equal(second, np.kron(first, np.ones((2, 2), np.int16)))


def test_synthia_sixteen_bit_labels(tmp_path):
    label = classes(20, 30, 4)
    planes = np.stack((np.array([3, 8, 0, 17])[label], label.astype(int) * 900, label), 2).astype(np.uint16)
    save(picture(20, 30), tmp_path / "RGB" / "0000000.png")
    save_rgb16(planes, tmp_path / "GT" / "LABELS" / "0000000.png")
    dataset = SegmentationDataset(SourceConfig(dataset="synthia", root=str(tmp_path)))
    assert np.array_equal(dataset.load(0)["label"], np.array([0, 12, IGNORE, 11])[label])
    with pytest.raises(ValueError, match="no split 'val'"):
        SegmentationDataset(SourceConfig(dataset="synthia", root=str(tmp_path), split="val"))


def test_voc_lists_and_label_folders(tmp_path):
    base = tmp_path / "VOCdevkit" / "VOC2012"
    for k in range(3):
        Image.fromarray(picture(20, 30, k)).save(save(picture(4, 4), base / "JPEGImages" / f"2007_{k}.jpg"))
        save_palette(classes(20, 30, 21), base / "SegmentationClass" / f"2007_{k}.png")
    save_palette(np.full((20, 30), 255, np.uint8), base / "SegmentationClassAug" / "2007_1.png")
    (base / "ImageSets" / "Segmentation").mkdir(parents=True)
    (base / "ImageSets" / "Segmentation" / "train.txt").write_text("2007_1\n2007_2\n")
    dataset = SegmentationDataset(SourceConfig(dataset="voc", root=str(tmp_path)))
    assert dataset.names == ["2007_1", "2007_2"]
    assert np.all(dataset.load(0)["label"] == IGNORE)
    assert np.array_equal(dataset.load(1)["label"], classes(20, 30, 21))
    with pytest.raises(ValueError, match=r"val\.txt: no such split; here are train; or give a `list`"):
        SegmentationDataset(SourceConfig(dataset="voc", root=str(tmp_path), split="val"))
    (tmp_path / "l.txt").write_text("/JPEGImages/2007_0.jpg /SegmentationClassAug/2007_0.png")
    assert SegmentationDataset(SourceConfig(dataset="voc", root=str(tmp_path), list=str(tmp_path / "l.txt"))).names == [
        "2007_0"
    ]


def test_camvid(camvid):
    for split, count in (("train", 367), ("val", 101)):
        dataset = SegmentationDataset(SourceConfig(dataset="camvid", root=str(camvid), split=split))
        assert len(dataset) == count
    check(dataset)
    raw = dataset.load(0)
    assert raw["image"].shape == (360, 480, 3) and raw["label"].shape == (360, 480)
    stored = np.array(Image.open(camvid / "labels" / "val" / f"{raw['name']}.png"))
    assert np.array_equal(raw["label"], np.where(stored == 255, -1, stored.astype(int)))
    assert np.array_equal(raw["image"], np.array(Image.open(camvid / "images" / "val" / f"{raw['name']}.jpg")))


def test_root_resolution(tmp_path, monkeypatch):
    (tmp_path / "camvid").mkdir()
    monkeypatch.setenv("LTS_DATA", str(tmp_path))
    assert resolve(SourceConfig(dataset="camvid"))[1] == tmp_path / "camvid"
    monkeypatch.delenv("LTS_DATA")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        ValueError, match=r"no folder datasets/camvid \(\$LTS_DATA is not set\); set `root`, or LTS_DATA"
    ):
        resolve(SourceConfig(dataset="camvid"))
    (tmp_path / "datasets" / "camvid").mkdir(parents=True)
    assert resolve(SourceConfig(dataset="camvid"))[1].resolve() == tmp_path / "datasets" / "camvid"
    with pytest.raises(ValueError, match=r"no folder /nowhere"):
        resolve(SourceConfig(dataset="camvid", root="/nowhere"))
    with pytest.raises(ValueError, match="dataset 'camvit' is unknown; known: cityscapes"):
        resolve(SourceConfig(dataset="camvit"))


def test_folder_options_are_checked(tmp_path):
    source = make_folder(tmp_path)

    def build(**options):
        return resolve(dataclasses.replace(source, folder={**folder_options(), **options}))

    with pytest.raises(ConfigError, match="unknown key 'imagez'; did you mean 'images'"):
        build(imagez="x")
    with pytest.raises(ValueError, match="palette has 1 colours for 5 classes"):
        build(palette=[[1, 2, 3]])
    with pytest.raises(ValueError, match="tail class 'tree'"):
        build(tail=["tree"])
    with pytest.raises(ValueError, match="needs a palette"):
        build(encoding="rgb")
    with pytest.raises(ConfigError, match=r"flip_pairs\[0\]: expected 2 values, got \[1\]"):
        build(flip_pairs=[[1]])
    for pairs, reason in (
        ([[0, 1], [2, 5]], r"flip_pairs \[2, 5\]: 5 is none of the 5 classes; give ids from 0 to 4"),
        ([[-1, 1]], r"flip_pairs \[-1, 1\]: -1 is none of the 5 classes"),
        ([[0, 1], [2, 1]], r"flip_pairs \[2, 1\]: class 1 is named twice; give it one partner"),
        ([[3, 3]], r"flip_pairs \[3, 3\]: class 3 is named twice"),
    ):
        with pytest.raises(ValueError, match=reason):
            build(flip_pairs=pairs)
    row, _ = build(label_map={"0": 1, "1": 0, "2": -1, "3": 3, "4": 4})
    assert row.tail == (4,) and row.num_classes == 5
    dataset = SegmentationDataset(dataclasses.replace(source, folder={**folder_options(), "label_map": {"0": 1}}))
    with pytest.raises(ValueError, match=r"im0\.png: label value \d is none of the 5 classes"):
        dataset.load(0)


def test_folder_endings_and_list_splits(tmp_path):
    for k in range(3):
        save(picture(12, 16, k), tmp_path / "x" / f"a{k}_rgb.png")
        save(classes(12, 16, 2, k), tmp_path / "y" / f"a{k}_mask.png")
    (tmp_path / "val.txt").write_text("a1\na2_rgb.png\n")
    options = {"images": "x", "labels": "y", "image_end": "_rgb", "label_end": "_mask", "classes": ["a", "b"]}
    source = SourceConfig("folder", str(tmp_path), "val", folder={**options, "lists": {"val": "val.txt"}})
    dataset = SegmentationDataset(source)
    assert dataset.names == ["a1_rgb", "a2_rgb"]
    assert np.array_equal(dataset.load(0)["label"], classes(12, 16, 2, 1))


def test_missing_files_are_named(tmp_path):
    source = make_folder(tmp_path)
    (tmp_path / "labels" / "train" / "im3.png").unlink()
    with pytest.raises(ValueError, match=r"im3\.png: no label file for this image \(1 of 6 have none\)"):
        SegmentationDataset(source)
    unlabelled = SegmentationDataset(dataclasses.replace(source, labels=False))
    assert len(unlabelled) == 6 and "label" not in unlabelled.load(0)
    with pytest.raises(ValueError, match=r"images/val: the folder of the images is missing"):
        SegmentationDataset(dataclasses.replace(source, split="val"))
    (tmp_path / "images" / "val").mkdir()
    with pytest.raises(ValueError, match=r"images/val: no images here"):
        SegmentationDataset(dataclasses.replace(source, split="val"))


def test_labels_are_not_needed_where_they_are_off(tmp_path):
    source = make_folder(tmp_path)
    for path in (tmp_path / "labels" / "train").iterdir():
        path.unlink()
    (tmp_path / "labels" / "train").rmdir()
    assert "label" not in SegmentationDataset(dataclasses.replace(source, labels=False)).sample(0, RNG)


def test_sizes_must_match(tmp_path):
    source = make_folder(tmp_path)
    save(np.zeros((48, 63), np.uint8), tmp_path / "labels" / "train" / "im1.png")
    with pytest.raises(ValueError, match=r"im1\.png: is 63x48 pixels, but its image im1\.png is 64x48"):
        SegmentationDataset(source).load(1)


@pytest.mark.parametrize("suffix", ["png", "jpg"])
def test_truncated_image_is_named(tmp_path, suffix):
    path = save(np.random.default_rng(0).integers(0, 256, (90, 80, 3), dtype=np.uint8), tmp_path / f"cut.{suffix}")
    data = path.read_bytes()
    for length in (len(data) // 2, 30, 4, 0):
        path.write_bytes(data[:length])
        with pytest.raises(ValueError, match=rf"cut\.{suffix}: cannot decode the image") as error:
            Picture(path).window(slice(0, 80), slice(0, 80))
        assert "\n" not in str(error.value)


def test_check_finds_missing_and_empty_files(tmp_path):
    source = make_folder(tmp_path)
    check(SegmentationDataset(source), workers=2)
    dataset = SegmentationDataset(dataclasses.replace(source, maps={"soft": str(tmp_path / "soft")}))
    with pytest.raises(ValueError, match=r"soft/im0\.png: no such file"):
        check(dataset)
    (tmp_path / "images" / "train" / "im2.png").write_bytes(b"")
    with pytest.raises(ValueError, match=r"im2\.png: the file is empty"):
        check(SegmentationDataset(source))


def test_further_maps(tmp_path):
    source = make_folder(tmp_path)
    sub = classes(48, 64, 200, seed=9)
    deep = sub.astype(np.uint16) + 500
    deep[1], sub[1] = 65535, 255
    save(sub, tmp_path / "sub" / "im0.png")
    save(deep, tmp_path / "deep" / "im0.png")
    soft = np.random.default_rng(1).random((5, 7, 9), np.float32)
    confidence = np.random.default_rng(2).random((48, 64)).astype(np.float16)
    np.save(tmp_path / "sub" / "im0_conf.npy", confidence)
    (tmp_path / "soft").mkdir()
    np.save(tmp_path / "soft" / "im0.npy", soft)
    maps = {k: str(tmp_path / k) for k in ("sub", "deep", "soft")}
    maps["confidence"] = str(tmp_path / "sub" / "{name}_conf.npy")
    dataset = SegmentationDataset(dataclasses.replace(source, maps=maps))
    sample = dataset.sample(0, RNG)
    assert sample["sub"].dtype == torch.int16 and torch.equal(sample["sub"][0], torch.from_numpy(sub[0]).short())
    assert torch.all(sample["sub"][1] == IGNORE) and torch.all(sample["deep"][1] == IGNORE)
    assert torch.equal(sample["deep"][2:], sample["sub"][2:] + 500)
    assert torch.equal(sample["soft"], torch.from_numpy(soft))
    assert torch.equal(sample["confidence"], torch.from_numpy(confidence))
    with pytest.raises(ValueError, match=r"sub/im1\.png: no such map"):
        dataset.load(1)


def test_native_sample(tmp_path):
    dataset = SegmentationDataset(make_folder(tmp_path))
    sample = dataset.sample(2, RNG)
    assert sample["image"].shape == (3, 48, 64) and sample["image"].dtype == torch.uint8
    assert torch.equal(sample["image"].permute(1, 2, 0), torch.from_numpy(picture(48, 64, 2)))
    assert sample["label"].dtype == torch.int16 and torch.all(sample["label"][0] == IGNORE)
    assert sample["geometry"].tolist() == [48, 64, 48, 64, 0, 0, 0]
    assert (sample["name"], sample["index"]) == ("im2", 2)


def test_dataset_can_be_pickled(tmp_path):
    dataset = SegmentationDataset(make_folder(tmp_path))
    dataset.load(0)
    copy = pickle.loads(pickle.dumps(dataset))
    assert np.array_equal(copy.load(1)["label"], dataset.load(1)["label"])


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "RGBA"])
def test_image_kinds_against_pillow(tmp_path, mode):
    image = Image.fromarray(picture(33, 47)).convert(mode)
    image.save(tmp_path / "a.png")
    expected = np.array(image.convert("RGB"))
    assert np.array_equal(read_image(tmp_path / "a.png"), expected)
    window = Picture(tmp_path / "a.png").window(slice(3, 20), slice(5, 40))
    assert np.array_equal(window[..., :3], expected[3:20, 5:40])


def test_interlaced_png(tmp_path):
    """Adam7: seven passes, each a small image of its own."""
    pixels = picture(21, 30)
    starts = ((0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1))
    rows = b"".join(b"\0" + row.tobytes() for y, x, dy, dx in starts for row in pixels[y::dy, x::dx])
    write_png(tmp_path / "a.png", (21, 30), 8, rows, interlace=1)
    assert np.array_equal(np.array(Image.open(tmp_path / "a.png")), pixels)
    window = Picture(tmp_path / "a.png").window(slice(2, 9), slice(4, 25))
    assert np.array_equal(window[..., :3], pixels[2:9, 4:25])


def test_other_formats(tmp_path):
    pixels = picture(33, 47)
    for suffix in ("bmp", "tif"):
        assert np.array_equal(read_image(save(pixels, tmp_path / f"a.{suffix}")), pixels)
    deep = pixels.astype(np.uint16) * 256 + 77
    path = save_rgb16(deep, tmp_path / "deep.png")
    assert np.array_equal(read_image(path), pixels)


def test_exif_orientation_turns_the_image(tmp_path):
    image = Image.fromarray(picture(30, 40))
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    image.save(tmp_path / "a.jpg", exif=exif)
    assert Picture(tmp_path / "a.jpg").size == (40, 30)
