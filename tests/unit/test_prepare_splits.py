"""Lists that prepare_splits.py makes: of the published sizes, and of the published images where a rule gives them."""

import sys
from pathlib import Path

import numpy as np
import pytest
import yaml

from scripts import prepare_splits
from scripts.prepare_splits import number
from tests.unit.data_files import picture, save

TRAINING = {"pascal": 10_582, "cityscapes": 2_975, "ade20k": 20_210, "coco": 118_287}
SIZES = {
    "pascal": {"92": 92, "183": 183, "366": 366, "732": 732, "1464": 1464, "1_16": 662, "1_8": 1323, "1_4": 2646,
               "u2pl_1_16": 662, "u2pl_1_8": 1323, "u2pl_1_4": 2646},
    "cityscapes": {"1_30": 100, "1_16": 186, "1_8": 372, "1_4": 744, "1_2": 1488, "u2pl_1_16": 186, "u2pl_1_2": 1488},
    "ade20k": {"1_64": 316, "1_32": 631, "1_16": 1263, "1_8": 2526, "1_4": 5052, "1_2": 10_105},
    "coco": {"1_512": 232, "1_256": 463, "1_128": 925, "1_64": 1849, "1_32": 3697},
}  # fmt: skip
IMAGES = 40
NAMES = [f"2007_{k:06d}" for k in range(IMAGES)]
CLEAN = NAMES[3::7]  # of VOC's own train


@pytest.mark.parametrize("data, name", [(data, name) for data, sizes in SIZES.items() for name in sizes])
def test_sizes_are_the_published_ones(data, name):
    assert number(Path("splits") / data / name / "labeled.txt", TRAINING[data]) == SIZES[data][name]


def test_other_sets_are_rounded_up():
    assert number(Path("splits/ade20k/1_32/labeled.txt"), 65) == 3
    with pytest.raises(ValueError, match="give --labelled"):
        number(Path("splits/pascal/half/labeled.txt"), 10)


@pytest.fixture
def voc(tmp_path) -> Path:
    """VOC's layout; train_aug is not sorted, and every image shows every class."""
    base = tmp_path / "voc"
    label = np.arange(21, dtype=np.uint8).repeat(16).reshape(21, 16)
    for k, name in enumerate(NAMES):
        save(picture(21, 16, k), base / "JPEGImages" / f"{name}.jpg")
        save(label, base / "SegmentationClassAug" / f"{name}.png")
    lists = base / "ImageSets" / "Segmentation"
    lists.mkdir(parents=True)
    (lists / "train_aug.txt").write_text("\n".join(NAMES[::-1]))
    (lists / "train.txt").write_text("\n".join(CLEAN))
    return base


def made(voc: Path, family: str, name: str, monkeypatch, *words: str) -> tuple[list[str], list[str]]:
    """Labelled and unlabelled names of the lists that the program writes."""
    lists = voc.parent / "splits" / family / name
    streams = {
        key: {"split": "train_aug", "list": str(lists / f"{key}.txt"), "labels": key == "labeled"}
        for key in ("labeled", "unlabeled")
    }
    data = {"dataset": "voc", "root": str(voc), "workers": 0, "streams": streams}
    path = voc.parent / "config.yaml"
    path.write_text(yaml.safe_dump({"model": {"name": "dpt", "num_classes": 21}, "data": data}))
    monkeypatch.setattr(sys, "argv", ["prepare_splits.py", str(path), f"output={voc.parent}/runs", *words])
    prepare_splits.main()
    labelled, unlabelled = ((lists / f"{key}.txt").read_text().split() for key in streams)
    return labelled, unlabelled


RULES = {"1_16": NAMES[::16], "1_8": NAMES[::8], "1_4": NAMES[::4], "1464": CLEAN}


@pytest.mark.parametrize("name", RULES)
def test_lists_of_a_rule_are_the_published_ones(name, voc, monkeypatch, capsys):
    labelled, unlabelled = made(voc, "pascal", name, monkeypatch)
    assert labelled == RULES[name] and sorted([*labelled, *unlabelled]) == NAMES
    assert "published" not in capsys.readouterr().out


DRAWN = [("pascal", "u2pl_1_16", (), 3), ("pascal", "12", (), 12), ("others", "1_16", (), 3)]
DRAWN += [("pascal", "1_16", ("--seed", "0"), 3), ("pascal", "1464", ("--labelled", "5"), 5)]


@pytest.mark.parametrize("family, name, words, count", DRAWN)
def test_what_is_drawn_is_said_to_be_no_published_list(family, name, words, count, voc, monkeypatch, capsys):
    labelled, unlabelled = made(voc, family, name, monkeypatch, *words)
    assert len(labelled) == count and sorted([*labelled, *unlabelled]) == NAMES
    assert labelled not in RULES.values()
    said = [line for line in capsys.readouterr().out.splitlines() if "published" in line]
    assert len(said) == 1 and said[0].endswith("drawn with seed 0, these are not the images of a published list")


def test_images_that_stay_unlabelled_need_no_label(voc, monkeypatch):
    """As COCO's official route has it: the labelled list is there, and masks of its images alone."""
    labelled = voc.parent / "splits" / "others" / "4" / "labeled.txt"
    labelled.parent.mkdir(parents=True)
    labelled.write_text("\n".join(NAMES[5:9]))
    for name in {*NAMES} - {*NAMES[5:9]}:
        (voc / "SegmentationClassAug" / f"{name}.png").unlink()
    found = made(voc, "others", "4", monkeypatch)
    assert found[0] == NAMES[5:9] and sorted(found[1]) == sorted({*NAMES} - {*NAMES[5:9]})


def test_a_train_that_is_all_of_train_aug_leaves_no_unlabelled_image(voc, monkeypatch):
    (voc / "ImageSets" / "Segmentation" / "train.txt").write_text("\n".join(NAMES))
    with pytest.raises(ValueError, match="40 labelled images of 40: take between 1 and 39"):
        made(voc, "pascal", "1464", monkeypatch)
