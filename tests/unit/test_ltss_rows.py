"""The LTSS data sets: the published class tables give the published figures; files are read as each set keeps them."""

import json

import numpy as np
import pytest
from PIL import Image

from common.config import SourceConfig
from common.data import DATASETS, IGNORE, SegmentationDataset, check, resolve
from common.data.catalogue.ltss import class_table
from common.data.catalogue.row import colour_map
from common.data.imbalance import gini
from common.data.statistics import image_factors
from ltss_benchmark.matcher import queries_per_class
from tests.unit.data_files import classes, picture, save

# Figures of the benchmark's release: N, classes, sum and extremes of the image counts, Gini at image level, image-level
# thresholds, group sizes at image and pixel level, classes with the same group at both.
FIGURES = {
    "ade20k_full": (25574, 847, 231666, (1, 13445), 0.8658, (6, 15), (160, 175, 512), (169, 169, 509), 562),
    "coco_stuff_lt_40k": (40679, 171, 278257, (2, 23557), 0.6693, (47, 132), (34, 34, 103), (34, 34, 103), 145),
    "mhpv2_lt_7k": (6931, 59, 82242, (1, 6931), 0.7018, (16, 44), (11, 12, 36), (11, 12, 36), 44),
}
REPEATED = {  # repeat-factor threshold: classes with r_c > 1, largest r_c
    ("ade20k_full", 0.0003): (207, 2.770),
    ("coco_stuff_lt_40k", 0.0012): (35, 4.940),
    ("mhpv2_lt_7k", 0.0012): (4, 2.884),
    ("mhpv2_lt_7k", 0.0024): (12, 4.079),
}
QUERIES = {  # matcher threshold: classes with 1, 2, … queries; mean queries of rare, common, frequent classes
    ("ade20k_full", 0.0003): ((372, 268, 99, 72, 0, 36), (4.125, 2.27, 1.27)),
    ("coco_stuff_lt_40k", 0.0012): ((96, 40, 18, 7, 4, 1, 2, 0, 2, 1), (4.32, 2.03, 1.07)),
    ("mhpv2_lt_7k", 0.0024): ((32, 15, 9, 1, 1, 0, 0, 0, 1), (3.82, 2.08, 1.11)),
}
RARE_TO_FREQUENT = ("rare", "common", "frequent")


@pytest.mark.parametrize("name", FIGURES)
def test_published_counts_give_the_published_figures(name):
    row = DATASETS[name]
    images, k, total, extremes, gini_image, thresholds, by_image, by_pixel, same = FIGURES[name]
    counts = np.array(row.published.image_count)
    assert (row.published.images, row.num_classes, counts.sum()) == (images, k, total)
    assert (counts.min(), counts.max()) == extremes
    assert gini(counts) == pytest.approx(gini_image, abs=5e-5)
    image, pixel = row.groups["image"], row.groups["pixel"]
    assert tuple(image.count(g) for g in RARE_TO_FREQUENT) == by_image
    assert tuple(pixel.count(g) for g in RARE_TO_FREQUENT) == by_pixel
    assert sum(a == b for a, b in zip(image, pixel, strict=True)) == same
    expected = ["rare" if x < thresholds[0] else "common" if x < thresholds[1] else "frequent" for x in counts]
    assert list(image) == expected


@pytest.mark.parametrize(("name", "threshold"), REPEATED)
def test_published_counts_give_the_published_repeat_factors(name, threshold):
    row = DATASETS[name]
    one_class_each = np.eye(row.num_classes, dtype=bool)
    factors = image_factors(one_class_each, np.array(row.published.frequency), threshold, "max")
    count, largest = REPEATED[name, threshold]
    assert (factors > 1).sum() == count and factors.max() == pytest.approx(largest, abs=5e-4)


@pytest.mark.parametrize(("name", "threshold"), QUERIES)
def test_published_counts_give_the_published_queries(name, threshold):
    row = DATASETS[name]
    queries = queries_per_class(row.published.frequency, threshold)
    histogram, means = QUERIES[name, threshold]
    assert tuple(np.bincount(queries)[1:]) == histogram
    for group, mean in zip(RARE_TO_FREQUENT, means, strict=True):
        chosen = [q for q, g in zip(queries, row.groups["image"], strict=True) if g == group]
        assert np.mean(chosen) == pytest.approx(mean, abs=6e-3)


def test_class_tables():
    assert DATASETS["ade20k_full"].classes[0] == "object 2978"
    assert DATASETS["ade20k"].classes[::149] == ("wall", "flag")
    for name in ("coco_stuff_118k", "coco_stuff_lt_40k"):
        row = DATASETS[name]
        assert row.classes[0] == "person" and row.classes[80] == "banner" and "waterdrops" in row.classes
    waterdrops = DATASETS["coco_stuff_118k"].classes.index("waterdrops")
    assert DATASETS["coco_stuff_lt_40k"].published.image_count[waterdrops] == 2
    removed = set(range(1, 183)) - set(class_table("coco_stuff_lt").ids)
    assert removed == {12, 26, 29, 30, 45, 66, 68, 69, 71, 83, 91}
    for name in (*FIGURES, "ade20k", "coco_stuff_118k", "mhpv2_15k"):
        row = DATASETS[name]
        assert len(set(row.classes)) == row.num_classes == len(set(row.palette))
    assert colour_map(847)[512] == (16, 0, 0)  # the tenth bit of the class id is the fourth of red


@pytest.mark.parametrize("name", ["mhpv2_15k", "mhpv2_lt_7k"])
def test_flip_pairs_are_left_and_right(name):
    row = DATASETS[name]
    named_left = {k for k, c in enumerate(row.classes) if c.startswith("Left-")}
    assert {left for left, _ in row.flip_pairs} == named_left
    for left, right in row.flip_pairs:
        assert row.classes[right] == row.classes[left].replace("Left", "Right")
    assert DATASETS["coco_stuff_118k"].flip_pairs == () and DATASETS["ade20k"].published is None


TREES = {  # row: folder, images and labels of the two splits, ending of the labels, ignored value
    "ade20k": (
        "ADEChallengeData2016",
        "images/{}",
        "annotations_detectron2/{}",
        ("training", "validation"),
        "png",
        255,
    ),
    "ade20k_full": (
        *("ADE20K_2021_17_01", "images_detectron2/{}", "annotations_detectron2/{}", ("training", "validation")),
        *("tif", 65535),
    ),
    "coco_stuff_118k": ("coco_stuff_118k", "images/{}", "annotations/{}", ("train2017", "val2017"), "png", 255),
    "coco_stuff_lt_40k": ("coco_stuff_lt_40k", "images/{}", "annotations/{}", ("train2017", "val2017"), "png", 255),
    "mhpv2_15k": ("mhpv2_15k", "images/{}", "annotations/{}", ("train", "val"), "png", 255),
    "mhpv2_lt_7k": ("mhpv2_lt_7k", "images/{}", "annotations/{}", ("train", "val"), "png", 255),
}


def make_tree(root, name):
    """One image a split; returns its label with IGNORE in the first row."""
    folder, images, labels, splits, suffix, ignored = TREES[name]
    count = DATASETS[name].num_classes
    label = classes(40, 60, min(count, 256)).astype(np.uint16)
    label[5:9] = count - 1
    label[9] = min(255, count - 1)  # a class of ADE20K-Full
    label[0] = ignored
    for split in splits:
        save(picture(40, 60), root / folder / images.format(split) / "a.jpg")
        save(
            label.astype(np.uint16 if suffix == "tif" else np.uint8),
            root / folder / labels.format(split) / f"a.{suffix}",
        )
    expected = label.astype(int)
    expected[0] = IGNORE
    return root / folder, expected


@pytest.mark.parametrize("name", TREES)
def test_trees_are_read(tmp_path, monkeypatch, name):
    folder, expected = make_tree(tmp_path, name)
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    for split in ("train", "val"):
        dataset = SegmentationDataset(SourceConfig(dataset=name, split=split))
        check(dataset)
        assert dataset.names == ["a"] and np.array_equal(dataset.load(0)["label"], expected)
    label = dataset.records[0].label
    save(expected[:20].clip(0, 255).astype(np.uint8), label)
    with pytest.raises(ValueError, match="is 60x20 pixels, but its image a.jpg is 60x40"):
        dataset.open(0)
    label.unlink()
    save(np.zeros((40, 60), np.uint8), label.with_name(f"b{label.suffix}"))
    with pytest.raises(ValueError, match=r"a\.jpg: no label file for this image \(1 of 1"):
        SegmentationDataset(SourceConfig(dataset=name, split="val"))
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match=r"\(\$DETECTRON2_DATASETS\); set `root`, or DETECTRON2_DATASETS"):
        resolve(SourceConfig(dataset=name))


def test_labels_of_mhp_have_one_or_three_channels(tmp_path):
    root, expected = make_tree(tmp_path, "mhpv2_lt_7k")
    grey = np.array(Image.open(root / "annotations/train/a.png"))
    for channels in (np.stack([grey] * 3, -1), np.stack([grey, 0 * grey, 0 * grey], -1)):
        save(channels, root / "annotations/train/a.png")
        dataset = SegmentationDataset(SourceConfig(dataset="mhpv2_lt_7k", root=str(root)))
        assert np.array_equal(dataset.label(0), expected)


def test_values_that_are_no_class_are_named(tmp_path):
    root, _ = make_tree(tmp_path, "ade20k_full")
    save(np.full((40, 60), 847, np.uint16), root / "annotations_detectron2/training/a.tif")
    with pytest.raises(ValueError, match=r"a\.tif: label value 847 is none of the 847 classes"):
        SegmentationDataset(SourceConfig(dataset="ade20k_full", root=str(root))).label(0)


def test_names_beside_the_data_set(tmp_path):
    root, _ = make_tree(tmp_path, "ade20k_full")
    source = SourceConfig(dataset="ade20k_full", root=str(root))
    assert resolve(source)[0].classes == DATASETS["ade20k_full"].classes
    names = [f"thing {k}" for k in range(847)]
    (root / "class_names.txt").write_text("\n".join(names) + "\n")
    row = resolve(source)[0]
    assert list(row.classes) == names and row.published == DATASETS["ade20k_full"].published
    assert DATASETS["ade20k_full"].classes[0] == "object 2978" and json.dumps(row.classes)
    (root / "class_names.txt").write_text("wall\n")
    with pytest.raises(ValueError, match=r"class_names\.txt: has 1 names in 1 lines, but ade20k_full has 847 classes"):
        resolve(source)
