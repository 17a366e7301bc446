"""The preparation of ADE20K-Full on small raw trees, and its index, which is read without running it."""

import os
import pickle
import sys
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest

from common.config import SourceConfig
from common.data import SegmentationDataset
from common.data.catalogue.ltss import class_table
from ltss_benchmark.datasets import conversions
from ltss_benchmark.datasets.index_file import read_index
from tests.unit.data_files import classes, picture, save
from tests.unit.ltss_trees import expect, read, script, snapshot

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
