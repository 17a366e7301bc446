"""ACDC and Dark Zurich on disk: the arrangements in which they come or are brought, and what belongs to them."""

import numpy as np
import pytest

from common.config import SourceConfig
from common.data import DATASETS, IGNORE, SegmentationDataset
from tests.unit.data_files import picture, save

PLACES = {  # data set: folders of its split, as it comes and with the files brought together
    "acdc": ("{condition}/train/GOPR0475", "{condition}/train", "train"),
    "dark_zurich": ("train/{condition}/GOPR0351", "train/{condition}", "train"),
}
LAYOUTS = [(name, place) for name, places in PLACES.items() for place in places]


def write(root, place, conditions, end="TrainIds", values=(0, 13, 255)):
    """One image of each condition, and its label of these values in thirds."""
    for k, condition in enumerate(conditions):
        stem = f"{place.format(condition=condition)}/GOPR0475_frame_{k:06d}"
        save(picture(12, 24, k), root / "rgb_anon" / f"{stem}_rgb_anon.png")
        label = np.repeat(np.array(values, np.uint8), 4)[:, None].repeat(24, 1)
        save(label, root / "gt" / f"{stem}_gt_label{end}.png")
        save(label[..., None].repeat(3, 2), root / "gt" / f"{stem}_gt_labelColor.png")


def conditions_of(name):
    return ("fog", "night", "rain", "snow") if name == "acdc" else ("night",)


@pytest.mark.parametrize("name, place", LAYOUTS)
def test_each_arrangement(tmp_path, name, place):
    write(tmp_path, place, conditions_of(name))
    dataset = SegmentationDataset(SourceConfig(dataset=name, root=str(tmp_path)))
    assert dataset.names == [f"GOPR0475_frame_{k:06d}_rgb_anon" for k in range(len(conditions_of(name)))]
    for index in range(len(dataset)):
        label = dataset.label(index)
        assert [label[row, 0] for row in (0, 4, 8)] == [0, 13, IGNORE]


def test_raw_ids_where_there_are_no_train_ids(tmp_path):
    write(tmp_path, "fog/train", ["fog"], end="Ids", values=(7, 26, 4))
    label = SegmentationDataset(SourceConfig(dataset="acdc", root=str(tmp_path))).label(0)
    assert [label[row, 0] for row in (0, 4, 8)] == [0, 13, IGNORE]


def test_other_conditions_of_the_tree_are_left_out(tmp_path):
    """Dark Zurich's training images by day and at twilight are no part of the task."""
    write(tmp_path, "train/{condition}/GOPR0351", ["day", "night", "twilight"])
    assert SegmentationDataset(SourceConfig(dataset="dark_zurich", root=str(tmp_path))).names == [
        "GOPR0475_frame_000001_rgb_anon"
    ]


def test_copies_that_were_brought_together_count_once(tmp_path):
    for place in ("{condition}/train/GOPR0475", "train"):
        write(tmp_path, place, conditions_of("acdc"))
    assert len(SegmentationDataset(SourceConfig(dataset="acdc", root=str(tmp_path)))) == 4


def test_lists_and_splits_without_labels(tmp_path):
    write(tmp_path, "{condition}/train/GOPR0475", conditions_of("acdc"))
    (tmp_path / "night.txt").write_text("rgb_anon/night/train/GOPR0475/GOPR0475_frame_000001\n")
    source = SourceConfig(dataset="acdc", root=str(tmp_path), list=str(tmp_path / "night.txt"))
    assert SegmentationDataset(source).names == ["GOPR0475_frame_000001_rgb_anon"]

    for path in (tmp_path / "gt").rglob("*.png"):
        path.unlink()
    with pytest.raises(ValueError, match=r"no label file for this image \(4 of 4 have none\).*`labels: false`"):
        SegmentationDataset(SourceConfig(dataset="acdc", root=str(tmp_path)))
    assert len(SegmentationDataset(SourceConfig(dataset="acdc", root=str(tmp_path), labels=False))) == 4


def test_a_split_that_is_not_there(tmp_path):
    write(tmp_path, "{condition}/train", ["fog"])
    with pytest.raises(ValueError, match="fog/val: the folder of the images is missing"):
        SegmentationDataset(SourceConfig(dataset="acdc", root=str(tmp_path), split="val"))
    with pytest.raises(ValueError, match=f"it is in {tmp_path}: set `root` to that"):
        SegmentationDataset(SourceConfig(dataset="acdc", root=str(tmp_path.parent)))
    (tmp_path / "rgb_anon" / "fog" / "test").mkdir()
    with pytest.raises(ValueError, match="rgb_anon: no images of split 'test' here"):
        SegmentationDataset(SourceConfig(dataset="acdc", root=str(tmp_path), split="test"))


def test_classes_are_those_of_cityscapes():
    for name in PLACES:
        row = DATASETS[name]
        assert (row.classes, row.things) == (DATASETS["cityscapes"].classes, DATASETS["cityscapes"].things)
