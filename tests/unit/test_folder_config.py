"""What a `folder` section may not say twice or against itself, and the roots and trees in which data sets are found."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from common.config import ConfigError, EvalConfig, SourceConfig
from common.data import IGNORE, SegmentationDataset, resolve
from common.data.catalogue.folder import folder_row
from common.data.labels import LabelTable
from common.evaluation.identity import differences, identity
from ltss_benchmark.datasets import preparation
from tests.unit.data_files import classes, folder_options, make_folder, picture, save, save_palette

RED, GREEN, BLUE = [255, 0, 0], [0, 255, 0], [0, 0, 255]
COLOURED = {"images": "x", "classes": ["a", "b"], "encoding": "rgb", "palette": [RED, GREEN]}


def row(**options):
    return folder_row({"images": "x", "labels": "y", "classes": ["a", "b", "c"], **options})


# Contradictions ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options, message", [
    ({"ignore": [7, 0]}, r"ignore lists the value 0, but by classes it is class 0 \(a\); take it out of one of them"),
    ({"label_map": {"5": 1}, "ignore": [5]}, r"ignore lists the value 5, but by label_map it is class 1 \(b\)"),
    ({"classes": ["a", "b", "a"]}, r"classes 0 and 2 have one name, 'a'; rename one"),
    ({"classes": []}, r"classes names 0 classes; give 1 to 32768"),
    ({"classes": [f"c{k}" for k in range(32769)]}, r"classes names 32769 classes; give 1 to 32768"),
    ({"tail": ["b", "b"]}, r"tail names 'b' twice"),
    ({"label_map": {"1": 1, "01": 2}}, r"label_map sends the value 1 to classes 1 and 2"),
    ({"label_map": {"4": 3}}, r"label_map sends the value 4 to class 3, but there are 3 classes"),
    ({"label_map": {"-4": 1}}, r"label_map key '-4' is no stored value"),
    ({"counts": [1, 2, -3]}, r"counts: -3 is no number of pixels"),
    ({"palette": [RED, GREEN, [0, 0, 256]]}, r"\[0, 0, 256\] is no colour; give red, green, blue from 0 to 255"),
    ({"ignore_colours": [RED]}, r"ignore_colours is for encoding: rgb; index labels have `ignore`"),
    ({"images": "pictures/{Split}"}, r"images: \{Split\} stands for nothing; write \{split\}"),
    ({"labels": "masks/{}"}, r"labels: \{\} stands for nothing"),
    ({"name": "a/b"}, r"name: 'a/b' is no name; give letters, digits, blanks and _ . - \(80 at most\)"),
    ({"name": ""}, r"name: '' is no name"),
    ({"images": "y"}, r"images and labels are one folder, 'y'"),
])  # fmt: skip
def test_contradictions_are_refused(options, message):
    with pytest.raises(ConfigError, match=rf"^data.folder: {message}") as error:
        row(**options)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("options, message", [
    ({"palette": [RED, RED]}, r"palette gives classes 0 \(a\) and 1 \(b\) one colour \[255, 0, 0\]"),
    ({"ignore_colours": [BLUE, GREEN]}, r"ignore_colours lists \[0, 255, 0\], but by palette it is class 1 \(b\)"),
    ({"ignore": [3]}, r"ignore is for encoding: index"),
    ({"label_map": {"3": 1}}, r"label_map is for encoding: index"),
])  # fmt: skip
def test_contradictions_of_colours_are_refused(options, message):
    with pytest.raises(ConfigError, match=rf"^data.folder: {message}"):
        folder_row({**COLOURED, **options})


def test_what_only_looks_like_a_contradiction():
    assert row(label_map={"1": 1, "01": 1, "9": -1}, ignore=[9]).ignore == (9,)
    assert row(palette=[RED, RED, BLUE]).num_classes == 3  # index labels: colours only show
    assert row(label_map={"0": 0, "255": 1}).ignore == ()  # what 255 means is said
    assert row().ignore == (255,) and row(ignore=[]).ignore == ()
    wide = folder_row({"images": "x", "classes": [f"c{k}" for k in range(32768)]})
    table = wide.label_table(Path("a.png"))
    raw = np.array([[0, 255, 32767, 65535]], np.uint16)
    with pytest.raises(ValueError, match="label value 65535 is none of the 32768 classes"):
        table.decode(raw, Path("a.png"))
    assert table.decode(raw[:, :3], Path("a.png")).tolist() == [[0, 255, 32767]]


def test_more_classes_than_a_label_holds():
    with pytest.raises(ValueError, match="32769 classes are more than a label holds; give 32768 at most"):
        LabelTable(32769, {})


def test_a_map_with_values_that_int16_does_not_hold(tmp_path):
    source = make_folder(tmp_path, images=1)
    deep = np.full((48, 64), 65535, np.uint16)
    deep[0, :2] = 0, 32767
    source = dataclasses.replace(source, maps={"sub": str(tmp_path / "sub")})
    save(deep, tmp_path / "sub" / "im0.png")
    assert SegmentationDataset(source).load(0)["sub"][0, :3].tolist() == [0, 32767, IGNORE]

    deep[0, 1] = 32768
    save(deep, tmp_path / "sub" / "im0.png")
    with pytest.raises(ValueError, match=r"sub/im0.png: value 32768 is no label; give 32767 at most"):
        SegmentationDataset(source).load(0)


# Roots -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def here(tmp_path, monkeypatch):
    for name in ("LTS_DATA", "DETECTRON2_DATASETS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("folder, dataset", [
    ("datasets/gta5", "gta5"), ("datasets/GTA5", "gta5"), ("dataset/GTA5", "gta5"), ("dataset/SYNTHIA", "synthia"),
    ("Dataset/cityscapes", None), ("dataset/Cityscapes", "cityscapes"), ("dataset/ADEChallengeData2016", "ade20k"),
])  # fmt: skip
def test_the_trees_of_the_readmes_are_found(here, folder, dataset):
    (here / folder).mkdir(parents=True)
    if dataset is None:  # the base folder's own name is not guessed
        with pytest.raises(ValueError, match="no folder datasets/cityscapes"):
            resolve(SourceConfig(dataset="cityscapes"))
        return
    assert resolve(SourceConfig(dataset=dataset))[1].resolve() == here / folder
    if dataset == "ade20k":
        assert preparation.folder("ade20k").resolve() == here / folder


def test_datasets_goes_before_dataset(here):
    for base in ("dataset", "datasets"):
        (here / base / "gta5").mkdir(parents=True)
    assert str(resolve(SourceConfig(dataset="gta5"))[1]) == "datasets/gta5"


def test_a_folder_in_any_case_below_the_variable(here, monkeypatch):
    monkeypatch.setenv("LTS_DATA", str(here))
    (here / "GTA5").mkdir()
    assert resolve(SourceConfig(dataset="gta5"))[1] == here / "GTA5"
    (here / "Gta5").mkdir()
    if len(list(here.iterdir())) == 2:  # where names differ by case
        with pytest.raises(ValueError, match="gta5: missing, and GTA5 and Gta5 both resemble it; rename or link one"):
            resolve(SourceConfig(dataset="gta5"))
    (here / "gta5").mkdir(exist_ok=True)
    assert resolve(SourceConfig(dataset="gta5"))[1] == here / "gta5"


def test_the_error_of_a_toy_set_says_how_to_make_it(here):
    with pytest.raises(ValueError, match=r"datasets/toy_gta5 .*; scripts/make_toy.py makes toy sets"):
        resolve(SourceConfig(dataset="gta5", root="datasets/toy_gta5"))


def test_the_error_names_link_and_variable(here):
    with pytest.raises(
        ValueError,
        match=r"no folder datasets/synthia \(\$LTS_DATA is not set\); set `root`, or LTS_DATA "
        r"to the folder that holds synthia/, or link it: ln -s WHERE_IT_IS datasets/synthia",
    ):
        resolve(SourceConfig(dataset="synthia"))  # fmt: skip


def test_a_set_with_a_name_is_found_as_a_row_is(here, monkeypatch):
    folder = {**folder_options(), "name": "factory"}
    make_folder(here / "datasets" / "factory", images=1)
    row, root = resolve(SourceConfig(dataset="folder", folder=folder))
    assert (row.name, str(root)) == ("factory", "datasets/factory")
    monkeypatch.setenv("LTS_DATA", str(here))
    with pytest.raises(ValueError, match=rf"data set 'factory': no folder {here}/factory \(\$LTS_DATA\)"):
        resolve(SourceConfig(dataset="folder", folder=folder))
    with pytest.raises(ValueError, match="dataset: folder needs `root`, or a `name` in its `folder` section"):
        resolve(SourceConfig(dataset="folder", folder=folder_options()))


def test_results_say_the_name(tmp_path):
    source = make_folder(tmp_path, images=2)
    named = dataclasses.replace(source, folder={**source.folder, "name": "factory 2"})
    mine, plain = (identity(SegmentationDataset(s), [0], EvalConfig()) for s in (named, source))
    assert (mine["dataset"], plain["dataset"]) == ("factory 2", "folder")
    assert {**mine, "dataset": "folder"} == plain  # the name is no part of what is compared: labels and files are
    assert not differences({"identity": mine}, {"identity": plain})


# Trees of Cityscapes, GTA5, SYNTHIA -----------------------------------------------------------------------------------


def city_files(root, images, labels, cities, split="train", end="labelTrainIds"):
    for city in ("aachen", "bremen"):
        stem = f"{city}_000000_000019"
        place = (split, city) if cities else (split,)
        save(picture(16, 32), root.joinpath(images, *place, f"{stem}_leftImg8bit.png"))
        save(classes(16, 32, 19), root.joinpath(labels, *place, f"{stem}_gtFine_{end}.png"))


@pytest.mark.parametrize("images, labels, cities", [
    ("leftImg8bit", "gtFine", True), ("leftImg8bit_sequence", "gtFine", True), ("images", "segmentation", False),
    ("leftImg8bit", "annotations", True), ("LeftImg8bit", "GTFINE", True), ("images", "gtFine", False),
])  # fmt: skip
def test_trees_of_cityscapes(tmp_path, images, labels, cities):
    city_files(tmp_path, images, labels, cities)
    stem = "bremen_000000_000019"
    line = f"images/train/{stem}_leftImg8bit.png segmentation/train/{stem}_gtFine_labelTrainIds.png"
    (tmp_path / "list.txt").write_text(line)
    source = SourceConfig(dataset="cityscapes", root=str(tmp_path))
    assert np.array_equal(SegmentationDataset(source).label(0), classes(16, 32, 19))
    listed = SegmentationDataset(dataclasses.replace(source, list=str(tmp_path / "list.txt")))
    assert listed.names == ["bremen_000000_000019_leftImg8bit"]


def test_flat_training_beside_official_validation(tmp_path):
    city_files(tmp_path, "images", "segmentation", False)
    city_files(tmp_path, "leftImg8bit", "gtFine", True, "val", "labelIds")
    (tmp_path / "annotations").mkdir()  # in a README's tree, and unused
    for split in ("train", "val"):
        assert len(SegmentationDataset(SourceConfig(dataset="cityscapes", root=str(tmp_path), split=split))) == 2
    others = r"\(nor is there leftImg8bit_sequence/test, images/test\); check the data set's root and split"
    with pytest.raises(ValueError, match=rf"leftImg8bit/test: the folder of the images is missing {others}"):
        SegmentationDataset(SourceConfig(dataset="cityscapes", root=str(tmp_path), split="test"))


def test_the_folder_of_an_archive_is_named(tmp_path):
    (tmp_path / "RAND_CITYSCAPES" / "RGB").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"RGB: .* is missing; it is in .*/RAND_CITYSCAPES: set `root` to that"):
        SegmentationDataset(SourceConfig(dataset="synthia", root=str(tmp_path)))


def test_folders_below_the_root_in_any_case(tmp_path):
    save(picture(20, 30), tmp_path / "Images" / "00001.png")
    save_palette(classes(20, 30, 4), tmp_path / "Labels" / "00001.png")
    assert SegmentationDataset(SourceConfig(dataset="gta5", root=str(tmp_path))).records[0].label is not None
    source = make_folder(tmp_path / "own", images=1)
    folder = {**folder_options(), "images": "Images/{split}", "labels": "LABELS/{split}"}
    assert len(SegmentationDataset(dataclasses.replace(source, folder=folder))) == 1
