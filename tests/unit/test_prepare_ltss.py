"""The preparation scripts on small raw trees: what they write, a second run, and files that are wrong."""

import importlib
import os
import pickle
import sys
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from common.config import SourceConfig
from common.data import DATASETS, IGNORE, SegmentationDataset
from common.data.ltss_rows import class_table
from ltss_benchmark.datasets import conversions, preparation
from ltss_benchmark.datasets.index_file import read_index
from tests.unit.data_files import classes, picture, save

SETS = ("ade20k", "ade20k_full", "coco_stuff_118k", "coco_stuff_lt_40k", "mhpv2_15k", "mhpv2_lt_7k")


@pytest.fixture(autouse=True)
def root(tmp_path, monkeypatch):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    monkeypatch.setattr(preparation.os, "cpu_count", lambda: 1)  # no processes but where a test wants them
    monkeypatch.setattr(sys, "argv", ["prepare"])
    return tmp_path


def script(name):
    return importlib.import_module(f"ltss_benchmark.datasets.prepare_{name}_sem_seg").main


def expect(monkeypatch, name, train, val):
    monkeypatch.setitem(preparation.EXPECTED, name, {"train": train, "val": val})


def read(path):
    with Image.open(path) as image:
        return np.array(image)


def snapshot(folder):
    return {p: (p.stat().st_mtime_ns, p.stat().st_ino) for p in folder.rglob("*") if ".cache" not in p.parts}


# ADE20K


def raw_ade(root, count=3):
    base, labels = root / "ADEChallengeData2016", {}
    for split in ("training", "validation"):
        for k in range(count):
            label = (classes(20, 30, 151, k) + (k == 0)).clip(0, 150).astype(np.uint8)
            label[0] = 0
            save(picture(20, 30, k), base / "images" / split / f"a{k}.jpg")
            labels[split, f"a{k}"] = label
            save(label, base / "annotations" / split / f"a{k}.png")
    return base, labels


def test_ade20k(root, monkeypatch, capsys):
    base, labels = raw_ade(root)
    expect(monkeypatch, "ade20k", 3, 3)
    script("ade20k")()
    assert "ade20k train: 3 images with labels, expected 3" in capsys.readouterr().out
    for (split, name), label in labels.items():
        written = read(base / "annotations_detectron2" / split / f"{name}.png")
        assert written.dtype == np.uint8 and np.array_equal(written, np.where(label == 0, 255, label.astype(int) - 1))
    loaded = SegmentationDataset(SourceConfig(dataset="ade20k")).load(1)["label"]
    assert np.array_equal(loaded, labels["training", "a1"].astype(int) - 1)


def test_a_second_run_changes_nothing_and_a_broken_one_is_completed(root, monkeypatch):
    base, _ = raw_ade(root)
    expect(monkeypatch, "ade20k", 3, 3)
    script("ade20k")()
    before = snapshot(base)
    script("ade20k")()
    assert snapshot(base) == before
    lost = base / "annotations_detectron2" / "training" / "a1.png"
    content = lost.read_bytes()
    lost.unlink()
    script("ade20k")()
    assert lost.read_bytes() == content and not list(base.rglob("*.tmp"))


def test_processes_give_the_same_files(root, monkeypatch):
    base, labels = raw_ade(root)
    jobs = [(base / "annotations" / "training" / f"a{k}.png", root / "out" / f"a{k}.png") for k in range(3)]
    preparation.run(conversions.ade20k_label, jobs, "labels", workers=2)
    for k, (_, target) in enumerate(jobs):
        assert np.array_equal(read(target), labels["training", f"a{k}"] - np.uint8(1))
    save(np.full((4, 4), 151, np.uint8), jobs[1][0])
    with pytest.raises(ValueError, match=r"a1\.png: label value 151 is none of ADE20K's 0 to 150"):
        preparation.run(conversions.ade20k_label, [(jobs[1][0], root / "x.png")] * 2, "labels", workers=2)


def test_missing_parts_are_said(root, monkeypatch):
    with pytest.raises(ValueError, match=r"annotations/training: the folder of the \.png files is missing"):
        script("ade20k")()
    base, _ = raw_ade(root)
    with pytest.raises(ValueError, match="train has 3 images with labels, expected 20210; val has 3.* expected 2000"):
        script("ade20k")()
    (base / "annotations" / "training" / "a1.png").write_bytes(b"no image")
    (base / "annotations_detectron2" / "training" / "a1.png").unlink()
    with pytest.raises(ValueError, match=r"a1\.png: cannot decode the label"):
        script("ade20k")()


def test_nothing_is_left_of_a_file_that_could_not_be_written(root):
    with pytest.raises(OSError, match="No space"), preparation.whole(root / "a" / "b.png") as temporary:
        temporary.write_bytes(b"half")
        raise OSError("No space left on device")
    assert not list((root / "a").iterdir())


# ADE20K-Full


def write_index(base, names, as_arrays=False, **more):
    folders = [f"ADE20K_2021_17_01/images/ADE/{'training' if 'train' in n else 'validation'}/x" for n in names]
    objects = [f"thing {k}, alias" for k in range(3688)]
    objects[2977] = "wall"
    index = {"folder": folders, "filename": list(names), "objectnames": objects, **more}
    if as_arrays:
        index = OrderedDict((key, np.array(value, object if key == "folder" else None)) for key, value in index.items())
    (base / "index_ade20k.pkl").write_bytes(pickle.dumps(index, protocol=2 if as_arrays else 4))
    return folders


def raw_ade_full(root, sizes, as_arrays=False):
    """Images and colour-coded labels; their object indices."""
    base, indices = root / "ADE20K_2021_17_01", {}
    base.mkdir()
    names = [f"ADE_{'train' if k < len(sizes) - 1 else 'val'}_{k:08d}.jpg" for k in range(len(sizes))]
    folders = write_index(base, names, as_arrays, objectPresence=np.arange(6, dtype=np.uint8).reshape(2, 3))
    known = np.array([0, *class_table("ade20k_full").ids[:40], 1, 2])
    for k, (name, folder, size) in enumerate(zip(names, folders, sizes, strict=True)):
        index = known[classes(*size, len(known), k)]
        seg = np.stack([index // 256 * 10 + k % 10, index % 256, np.full(size, 7)], -1).astype(np.uint8)
        pixels = picture(*size, seed=k)
        save(pixels[..., 0] if k == 1 else pixels, root / folder / name)
        save(seg, root / folder / name.replace(".jpg", "_seg.png"))
        indices[name] = index
    return base, indices


def expected_label(index, size):
    """OpenCV's nearest rule and the table of ids, one pixel at a time along each axis."""
    rows = [min(int(i * (1 / (size[0] / index.shape[0]))), index.shape[0] - 1) for i in range(size[0])]
    columns = [min(int(j * (1 / (size[1] / index.shape[1]))), index.shape[1] - 1) for j in range(size[1])]
    train = {v: k for k, v in enumerate(class_table("ade20k_full").ids)}
    values, inverse = np.unique(index[np.ix_(rows, columns)], return_inverse=True)
    return np.array([train.get(int(v), 65535) for v in values])[inverse].reshape(size)


@pytest.mark.parametrize("as_arrays", [False, True])
def test_ade20k_full(root, monkeypatch, as_arrays, capsys):
    sizes = {0: (30, 40), 1: (50, 30), 2: (540, 700)} if as_arrays else {0: (30, 40), 1: (50, 30), 2: (28, 28)}
    base, indices = raw_ade_full(root, list(sizes.values()), as_arrays)
    expect(monkeypatch, "ade20k_full", 2, 1)
    script("ade20k_full")()
    for name, index in indices.items():
        split = "training" if "train" in name else "validation"
        written = read((base / "annotations_detectron2" / split / name).with_suffix(".tif"))
        size = (512, 664) if index.shape == (540, 700) else index.shape  # 663.7
        assert written.dtype == np.uint16 and np.array_equal(written, expected_label(index, size))
        image = read(base / "images_detectron2" / split / name)
        assert image.shape[:2] == size and image.ndim == (2 if name.endswith("1.jpg") else 3)
    row = SegmentationDataset(SourceConfig(dataset="ade20k_full")).row
    assert row.classes[0] == "wall" and row.classes[1] == "thing 311, alias" and row.num_classes == 847
    out = capsys.readouterr().out
    assert "ade20k_full val: 1 images with labels, expected 1" in out and "of 847 classes have the published" in out
    assert "object" not in out.split("published number")[1] and "wall: " in out  # names, not numbers
    before = snapshot(base / "images_detectron2")
    script("ade20k_full")()
    assert snapshot(base / "images_detectron2") == before


def test_ade20k_full_without_loss(root, monkeypatch):
    base, indices = raw_ade_full(root, [(30, 40), (28, 28)])
    expect(monkeypatch, "ade20k_full", 1, 1)
    monkeypatch.setattr(sys, "argv", ["prepare", "--png"])
    script("ade20k_full")()
    source = next((root / "ADE20K_2021_17_01" / "images").rglob("*_train_*.jpg"))
    assert np.array_equal(read(base / "images_detectron2" / "training" / f"{source.stem}.png"), read(source))


def test_sizes_of_ade20k_full():
    sizes = {(512, 600): (512, 600), (400, 3000): (400, 3000), (1024, 2048): (512, 1024), (768, 513): (767, 512)}
    sizes |= {(513, 513): (512, 512), (1024, 1025): (512, 512), (1024, 1027): (512, 514)}  # halves to even
    assert {size: conversions.ade20k_full_size(size) for size in sizes} == sizes


class Harmful:
    def __reduce__(self):
        return os.system, ("echo harm",)


def test_the_index_is_read_without_running_it(root, capfd):
    base = root / "ADE20K_2021_17_01"
    base.mkdir()
    write_index(base, ["ADE_train_1.jpg"], more=Harmful())
    with pytest.raises(ValueError, match=r"index_ade20k\.pkl: holds the name posix\.system.*refused"):
        script("ade20k_full")()
    assert "harm" not in capfd.readouterr().out.replace("harmful", "")
    write_index(base, ["ADE_train_1.jpg"], more=Path("x"))
    with pytest.raises(ValueError, match="holds the name pathlib.*refused"):
        read_index(base / "index_ade20k.pkl")


def test_wrong_indices_are_named(root):
    base = root / "ADE20K_2021_17_01"
    base.mkdir()
    path = base / "index_ade20k.pkl"
    with pytest.raises(ValueError, match="cannot read the index of ADE20K"):
        read_index(path)
    path.write_bytes(pickle.dumps({"folder": [], "filename": []}))
    with pytest.raises(ValueError, match="has no 'objectnames'; this is not the index of the release"):
        read_index(path)
    path.write_bytes(pickle.dumps({"folder": ["a"], "filename": [], "objectnames": []}))
    with pytest.raises(ValueError, match="names 1 folders for 0 files"):
        read_index(path)
    for damaged in (b"", b"\x80\x04}", b"garbage", pickle.dumps({"folder": np.arange(9)})[:-30]):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"index_ade20k\.pkl: ") as error:
            read_index(path)
        assert "\n" not in str(error.value)
    path.write_bytes(pickle.dumps({"folder": [], "filename": [], "objectnames": ["tree"] * 3688}))
    with pytest.raises(ValueError, match="object 2978 is not the wall"):
        script("ade20k_full")()


def test_missing_images_of_ade20k_full_are_named(root):
    base, indices = raw_ade_full(root, [(20, 30), (20, 30)])
    next((root / "ADE20K_2021_17_01").rglob("*_train_*_seg.png")).unlink()
    with pytest.raises(ValueError, match=r"ADE_train_00000000_seg\.png: no such file"):
        script("ade20k_full")()


# COCO-Stuff


def raw_coco(root, count=4):
    base = root / "coco_stuff_118k"
    ids = [k for k in range(1, 183) if k not in (12, 26, 29, 30, 45, 66, 68, 69, 71, 83, 91)]
    labels = {}
    for split in ("train2017", "val2017"):
        for k in range(count):
            train = classes(20, 30, 171, k).astype(int)
            stored = (np.array(ids)[train] - 1).astype(np.uint8)
            stored[0], train[0] = 255, 255
            name = f"{k:012d}"
            save(picture(20, 30, k), base / "images" / split / f"{name}.jpg")
            save(stored, base / "stuffthingmaps_trainval2017" / split / f"{name}.png")
            labels[split, name] = train
    return base, labels


def prepare_coco(root, monkeypatch):
    base, labels = raw_coco(root)
    expect(monkeypatch, "coco_stuff_118k", 4, 4)
    script("coco_stuff_118k")()
    return base, labels


def test_coco_stuff(root, monkeypatch):
    base, labels = prepare_coco(root, monkeypatch)
    for (split, name), train in labels.items():
        assert np.array_equal(read(base / "annotations" / split / f"{name}.png"), train)
    wrong = base / "stuffthingmaps_trainval2017" / "train2017" / f"{0:012d}.png"
    save(np.full((20, 30), 11, np.uint8), wrong)  # category 12 has been removed from COCO
    (base / "annotations" / "train2017" / wrong.name).unlink()
    with pytest.raises(ValueError, match=r"0000\.png: label value 11 is none of the 171 classes"):
        script("coco_stuff_118k")()


def test_coco_stuff_lt(root, monkeypatch, capsys):
    base, labels = prepare_coco(root, monkeypatch)
    expect(monkeypatch, "coco_stuff_lt_40k", 2, 4)
    lt = root / "coco_stuff_lt_40k"
    with pytest.raises(ValueError, match=r"make_longtail\.py coco_stuff_118k --images 2 --gini 0\.669 --out .*lt\.txt"):
        script("coco_stuff_lt_40k")()
    lt.mkdir()
    (lt / "coco-stuff-lt.txt").write_text(f"{1:012d}.jpg\n{3:012d}.jpg\n")
    script("coco_stuff_lt_40k")()
    train = SegmentationDataset(SourceConfig(dataset="coco_stuff_lt_40k"))
    assert train.names == [f"{1:012d}", f"{3:012d}"]
    expected = labels["train2017", train.names[1]].copy()
    expected[0] = IGNORE
    assert np.array_equal(train.label(1), expected)
    assert (lt / "images" / "val2017").is_symlink()
    assert len(SegmentationDataset(SourceConfig(dataset="coco_stuff_lt_40k", split="val"))) == 4
    out = capsys.readouterr().out
    assert "of 171 classes have the published number of images" in out and "person: " in out
    before = snapshot(lt)
    script("coco_stuff_lt_40k")()
    assert snapshot(lt) == before
    (lt / "coco-stuff-lt.txt").write_text("000000999999.jpg\n")
    with pytest.raises(ValueError, match=r"000000999999\.jpg: no such file; is the set that it belongs to prepared"):
        script("coco_stuff_lt_40k")()


def test_copies_where_links_are_not_possible(root, monkeypatch):
    base, _ = prepare_coco(root, monkeypatch)
    expect(monkeypatch, "coco_stuff_lt_40k", 1, 4)

    def refuse(*args, **kwargs):
        raise OSError("Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    monkeypatch.setattr(Path, "symlink_to", refuse)
    lt = root / "coco_stuff_lt_40k"
    lt.mkdir()
    (lt / "coco-stuff-lt.txt").write_text(f"{2:012d}\n")
    script("coco_stuff_lt_40k")()
    copy, source = (x / "annotations" / "val2017" / f"{0:012d}.png" for x in (lt, base))
    assert copy.read_bytes() == source.read_bytes() and not copy.parent.is_symlink()
    copy.unlink()
    script("coco_stuff_lt_40k")()
    assert copy.is_file()


def test_links_that_lead_elsewhere_are_left_alone(root):
    for name in ("a", "b"):
        (root / name).mkdir()
    preparation.link(root / "a", root / "x" / "link")
    preparation.link(root / "a", root / "x" / "link")
    with pytest.raises(ValueError, match=r"link: is a link to \.\./a, not to .*/b; remove it"):
        preparation.link(root / "b", root / "x" / "link")
    with pytest.raises(ValueError, match="c: no such folder; .* prepare that data set first"):
        preparation.link(root / "c", root / "x" / "other")


# MHP-v2


def raw_mhp(root, official=False, merged=False, people=3):
    base = root / "mhpv2_15k"
    raw, labels = base / "LV-MHP-v2", {}
    for split in ("train", "val"):
        images = raw / split / "images" if official else raw / f"{split}_img"
        parsing = raw / split / "parsing_annos" if official else raw / f"{split}_parsing"
        for k in range(3):
            save(picture(20, 30, k), images / f"{k}.jpg")
            label = np.zeros((20, 30), np.uint8)
            for j in range(1, people + 1):
                person = classes(20, 30, 59, 10 * k + j)
                person[:, : 8 * (j - 1)] = 0
                for y, x in np.argwhere(person):
                    label[y, x] = person[y, x]
                if not merged:
                    save(np.stack([person] * 3, -1), parsing / f"{k}_{people:02d}_{j:02d}.png")
            if merged:
                save(label, raw / f"{split}_seg" / f"{k}.png")
            labels[split, str(k)] = label
    return base, labels


@pytest.mark.parametrize("variant", [{}, {"official": True}, {"merged": True}])
def test_mhp(root, monkeypatch, variant):
    base, labels = raw_mhp(root, **variant)
    expect(monkeypatch, "mhpv2_15k", 3, 3)
    script("mhpv2_15k")()
    for split in ("train", "val"):
        dataset = SegmentationDataset(SourceConfig(dataset="mhpv2_15k", split=split))
        assert dataset.names == ["0", "1", "2"] and (base / "images" / split).is_symlink()
        assert (base / "annotations" / split).is_symlink() == ("merged" in variant)
        for k, name in enumerate(dataset.names):
            assert np.array_equal(dataset.load(k)["label"], labels[split, name])
    before = snapshot(base)
    script("mhpv2_15k")()
    assert snapshot(base) == before


def test_people_are_merged_in_the_order_of_their_number():
    paths = [Path(f"{name}.png") for name in ("7_11_10", "7_11_2", "8_01_01", "7_11_1")]
    with pytest.raises(ValueError, match="image 7 has 3 of its 11 parsing files"):
        conversions.mhp_people(paths)
    paths = [Path(f"a_b_10_{k}.png") for k in (10, 2, 1, 3, 4, 5, 6, 7, 8, 9)]
    assert [p.stem for p in conversions.mhp_people(paths)["a_b"]] == [f"a_b_10_{k}" for k in range(1, 11)]
    with pytest.raises(ValueError, match="x.png: is not named <image>_<people>_<k>.png"):
        conversions.mhp_people([Path("x.png")])


def test_bad_parsing_files_are_named(root):
    save(np.zeros((4, 5), np.uint8), root / "0_02_01.png")
    save(np.zeros((4, 6), np.uint8), root / "0_02_02.png")
    job = ([root / "0_02_01.png", root / "0_02_02.png"], root / "0.png")
    with pytest.raises(ValueError, match=r"0_02_02\.png: is 6x4 pixels, 0_02_01\.png has another size"):
        conversions.mhp_label(job)
    save(np.full((4, 5), 59, np.uint8), root / "0_02_02.png")
    with pytest.raises(ValueError, match="label value 59 is none of MHP's 0 to 58"):
        conversions.mhp_label(job)
    assert not (root / "0.png").exists()


def test_truncated_images_are_mended(root, capsys):
    path = save(picture(64, 64), root / "a.jpg")
    whole = read(path)
    before = path.stat().st_mtime_ns
    conversions.mend_image(path)
    assert path.stat().st_mtime_ns == before
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])
    conversions.mend_image(path)
    assert "a.jpg: was truncated" in capsys.readouterr().out
    mended = read(path)
    assert mended.shape == (64, 64, 3) and np.abs(mended[:16].astype(int) - whole[:16]).mean() < 4
    path.write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"a\.jpg: cannot decode the image"):
        conversions.mend_image(path)


def test_mhp_lt(root, monkeypatch):
    raw_mhp(root)
    expect(monkeypatch, "mhpv2_15k", 3, 3)
    script("mhpv2_15k")()
    lt = root / "mhpv2_lt_7k"
    lt.mkdir()
    (lt / "mhpv2-lt.txt").write_text("1.jpg\n")
    expect(monkeypatch, "mhpv2_lt_7k", 1, 3)
    script("mhpv2_lt_7k")()
    assert SegmentationDataset(SourceConfig(dataset="mhpv2_lt_7k")).names == ["1"]


# Gini coefficients


def test_gini_of_a_set(root, monkeypatch, capsys):
    prepare_coco(root, monkeypatch)
    main = importlib.import_module("ltss_benchmark.datasets.compute_gini_coeff").main
    words = ["compute_gini_coeff.py", "--dataset", "coco_stuff", "--set", "val", "--workers", "0"]
    monkeypatch.setattr(sys, "argv", words)
    capsys.readouterr()
    main()
    first = capsys.readouterr().out
    dataset = SegmentationDataset(SourceConfig(dataset="coco_stuff_118k", split="val"))
    labels = np.stack([dataset.label(k) for k in range(4)])
    counts = np.sort([sum((label == c).any() for label in labels) for c in range(171)])
    by_area = np.sort([(labels == c).sum() / labels[0].size for c in range(171)])

    def mean_difference(x):
        return np.abs(x[:, None] - x).sum() / (2 * len(x) * x.sum())

    assert f"image level: max {counts[-1]}, min {counts[0]}, Gini {mean_difference(counts):.4f}" in first
    assert f"pixel level: max {by_area[-1]:.4f}, min {by_area[0]:.4f}, Gini {mean_difference(by_area):.4f}" in first
    monkeypatch.setattr(SegmentationDataset, "label", None)  # the counts are kept
    main()
    assert capsys.readouterr().out == first


@pytest.mark.parametrize("name", SETS)
def test_every_set_has_a_script_and_counts(name):
    assert callable(script(name)) and set(preparation.EXPECTED[name]) == {"train", "val"}
    row = DATASETS[name]
    assert row.published is None or row.published.images == preparation.EXPECTED[name]["train"]
