"""The preparation scripts on small raw trees: what they write, a second run, and files that are wrong."""

import importlib
import os
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from common.config import SourceConfig
from common.data import DATASETS, IGNORE, SegmentationDataset
from ltss_benchmark.datasets import conversions, preparation
from tests.unit.data_files import classes, picture, save
from tests.unit.ltss_trees import expect, read, script, snapshot

SETS = ("ade20k", "ade20k_full", "coco_stuff_118k", "coco_stuff_lt_40k", "mhpv2_15k", "mhpv2_lt_7k")


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
    with pytest.raises(
        ValueError, match=r"make_longtail\.py coco_stuff_118k --images 2 --gini 0\.669 --out .*lt\.txt"
    ) as error:
        script("coco_stuff_lt_40k")()
    command = str(error.value).partition("python ")[2].split()[0]
    assert Path(command).is_file()  # from here, wherever that is
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
    with pytest.raises(ValueError, match=r"no image named '000000999999\.jpg' \(1 of 1 listed are missing\)"):
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


def test_a_linked_source_is_placed_as_its_file(root):
    file = save(picture(8, 8), root / "elsewhere" / "a.jpg")
    (root / "raw").mkdir()
    (root / "raw" / "a.jpg").symlink_to("../elsewhere/a.jpg")
    preparation.place(root / "raw" / "a.jpg", root / "deep" / "images" / "a.jpg")
    placed = root / "deep" / "images" / "a.jpg"
    assert placed.samefile(file) and not placed.is_symlink()


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
        assert dataset.names == ["0", "1", "2"] and not (base / "images" / split).is_symlink()
        assert (base / "annotations" / split).is_symlink() == ("merged" in variant)
        for k, name in enumerate(dataset.names):
            assert np.array_equal(dataset.load(k)["label"], labels[split, name])
    before = snapshot(base)
    script("mhpv2_15k")()
    assert snapshot(base) == before


def test_classes_with_too_few_images_are_said(root, monkeypatch, capsys):
    """MHP-v2-LT is a part of MHP-v2: of umbrellas, one image is enough."""
    raw_mhp(root)
    expect(monkeypatch, "mhpv2_15k", 3, 3)
    umbrella = np.full((20, 30), DATASETS["mhpv2_15k"].classes.index("Umbrella"), np.uint8)
    save(umbrella, root / "mhpv2_15k" / "LV-MHP-v2" / "train_parsing" / "0_03_03.png")
    script("mhpv2_15k")()
    first, *lines = capsys.readouterr().out.splitlines()[-6:]
    published = DATASETS["mhpv2_lt_7k"].published.image_count
    dataset = SegmentationDataset(SourceConfig(dataset="mhpv2_15k"))
    found = [sum(bool((dataset.load(k)["label"] == c).any()) for k in range(3)) for c in range(59)]
    enough = sum(a >= b for a, b in zip(found, published, strict=True))
    assert enough >= 1 and first.startswith(f"mhpv2_15k: {enough} of 59 classes have at least the images of")
    assert lines[0] == f"  Background: {found[0]} images, at least 6931 expected" and len(lines) == 5


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


def test_truncated_images_are_repaired(root, capsys):
    path, target = save(picture(64, 64), root / "a.jpg"), root / "out" / "a.jpg"
    whole = read(path)
    conversions.mhp_image((path, target))
    assert target.samefile(path)
    target.unlink()
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])
    broken = path.read_bytes()
    conversions.mhp_image((path, target))
    assert "a.jpg: is truncated; " in capsys.readouterr().out and path.read_bytes() == broken
    repaired = read(target)
    assert repaired.shape == (64, 64, 3) and np.abs(repaired[:16].astype(int) - whole[:16]).mean() < 4
    path.write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"a\.jpg: cannot decode the image"):
        conversions.mhp_image((path, root / "out" / "b.jpg"))
    assert [p.name for p in target.parent.iterdir()] == ["a.jpg"]


def test_mhp_decodes_only_what_is_not_there_yet(root, monkeypatch):
    base, _ = raw_mhp(root)
    expect(monkeypatch, "mhpv2_15k", 3, 3)
    broken = base / "LV-MHP-v2" / "val_img" / "1.jpg"
    content = broken.read_bytes()
    broken.write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"val_img/1\.jpg: cannot decode the image"):
        script("mhpv2_15k")()
    before = snapshot(base / "images" / "train") | snapshot(base / "annotations" / "train")
    broken.write_bytes(content)
    opened, open_image, read_label = [], Image.open, conversions.read_index
    monkeypatch.setattr(Image, "open", lambda path: opened.append(path) or open_image(path))
    monkeypatch.setattr(conversions, "read_index", lambda path: opened.append(path) or read_label(path))
    script("mhpv2_15k")()
    raw = base / "LV-MHP-v2"  # what else is opened: bytes of an image, and labels that are counted
    paths = [path.relative_to(raw) for path in opened if isinstance(path, Path) and path.is_relative_to(raw)]
    assert [str(path) for path in paths if path.suffix == ".jpg"] == ["val_img/1.jpg", "val_img/2.jpg"]
    assert {str(path.parent) for path in paths} == {"val_img", "val_parsing"} and len(paths) == 2 + 3 * 3
    assert snapshot(base / "images" / "train") | snapshot(base / "annotations" / "train") == before
    opened.clear()
    script("mhpv2_15k")()
    assert not opened
    (base / "images" / "val" / "0.jpg").unlink()
    broken.with_name("0.jpg").unlink()
    with pytest.raises(ValueError, match="val has 2 images with labels, expected 3"):
        script("mhpv2_15k")()


def test_mhp_leaves_a_link_to_unchecked_images_alone(root, monkeypatch):
    base, _ = raw_mhp(root)
    preparation.link(base / "LV-MHP-v2" / "train_img", base / "images" / "train")
    with pytest.raises(ValueError, match="images/train: is a link, but checked images .*; remove it"):
        script("mhpv2_15k")()


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


@pytest.mark.parametrize("name", SETS)
def test_help_prepares_nothing(name, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["prepare.py", "--help"])
    with pytest.raises(SystemExit) as end:
        script(name)()
    assert end.value.code == 0 and "usage: prepare.py" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["prepare.py", "everything"])
    with pytest.raises(SystemExit) as end:
        script(name)()
    assert end.value.code == 2


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
