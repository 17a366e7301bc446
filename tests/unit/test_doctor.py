"""scripts/doctor.py with a config: what it finds of files, labels and a step, and its verdict, in all four systems."""

import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from common import cli
from common.config import SourceConfig, load_config
from common.data import DATASETS, SegmentationDataset
from scripts import checkup, doctor
from scripts.systems import system_of
from tests.unit.data_files import save
from tests.unit.four_systems import SYSTEMS, tiny_config

pytestmark = [pytest.mark.usefixtures("unchanged"), pytest.mark.filterwarnings("ignore:.*no pixel in")]


@pytest.fixture
def examined(monkeypatch, capsys):
    """Run the doctor; its exit code and its lines."""

    def run(*words) -> tuple[int, list[str]]:
        monkeypatch.setattr(sys, "argv", ["doctor.py", *map(str, words), "--device", "cpu"])
        with pytest.raises(SystemExit) as end:
            cli.run(doctor.main)
        return end.value.code, capsys.readouterr().out.splitlines()

    return run


def line(lines: list[str], name: str) -> str:
    """The text of the line that is named so."""
    return next(text for text in lines if text.startswith(f"{name}  ")).removeprefix(name).strip()


@pytest.mark.parametrize("system", SYSTEMS)
def test_every_system_is_known_and_takes_a_step(system, scenes, tmp_path, examined):
    config = tiny_config(system, scenes, tmp_path)
    assert system_of(load_config(config)).name == system
    code, lines = examined(config)
    assert (code, lines[-1]) == (0, "verdict: ready"), lines[-4:]
    assert "3 images, 3 labels" in line(lines, "data source" if system == "uda" else "data labeled")
    assert line(lines, "step").startswith("loss ") and "2 images of " in line(lines, "step")
    left = {path.name for path in (tmp_path / "runs").iterdir()} if (tmp_path / "runs").exists() else set()
    assert left <= {".cache"}


def test_a_histogram_counts_what_is_stored(tmp_path):
    """Two labels of known pixels; 255 is ignored, 11 and 40 are no classes of CamVid."""
    first, second = np.zeros((4, 5), np.uint8), np.full((4, 5), 3, np.uint8)
    first[0] = [2, 2, 255, 40, 40]
    second[3] = [11, 40, 6, 6, 6]
    for name, label in (("a", first), ("b", second)):
        save(label, tmp_path / "labels/train" / f"{name}.png")
        save(np.zeros((4, 5, 3), np.uint8), tmp_path / "images/train" / f"{name}.png")
    dataset = SegmentationDataset(SourceConfig(dataset="camvid", root=str(tmp_path)))
    found = checkup.histogram(dataset, [0, 1])
    assert found.pixels.tolist() == [15, 0, 2, 15, 0, 0, 3, 0, 0, 0, 0]
    assert found.images.tolist() == [1, 0, 1, 1, 0, 0, 1, 0, 0, 0, 0]
    assert found.ignored == 1 and found.total == 40
    assert found.strays == {"value 40": 3, "value 11": 1} and found.stray_images == {"value 40": 2, "value 11": 1}


def test_chosen_images_are_spread():
    assert checkup.chosen(range(100), 4) == [0, 33, 66, 99]
    assert checkup.chosen(range(3), 8) == [0, 1, 2]


# What stands against training ---------------------------------------------------------------------------------------


@pytest.fixture
def moved(scenes, tmp_path) -> Path:
    """A copy of the scenes that a test may spoil."""
    return Path(shutil.copytree(scenes, tmp_path / "cityscapes"))


def test_the_link_that_leads_nowhere_is_named(scenes, moved, tmp_path, examined):
    shutil.rmtree(moved / "gtFine")
    (moved / "gtFine").symlink_to(tmp_path / "elsewhere")
    code, lines = examined(tiny_config("fully_sup", moved, tmp_path))
    assert code == 2 and f"; {moved}/gtFine is a link to {tmp_path}/elsewhere, which is not there" in lines[-1]
    assert line(lines, "step") == checkup.UNTRIED

    link = tmp_path / "linked"
    link.symlink_to(tmp_path / "nowhere")
    code, lines = examined(tiny_config("fully_sup", link, tmp_path))
    assert code == 2 and f"{link} is a link to {tmp_path}/nowhere, which is not there" in lines[-1]


def test_a_missing_folder_and_an_empty_file_are_named(moved, tmp_path, examined):
    code, lines = examined(tiny_config("fully_sup", tmp_path / "none", tmp_path))
    assert code == 2 and lines[-1].startswith("verdict: not ready: data labeled: data set 'cityscapes': no folder")
    assert f"no folder {tmp_path}/none" in lines[-1]
    label = SegmentationDataset(SourceConfig(dataset="cityscapes", root=str(moved))).records[0].label
    label.write_bytes(b"")
    code, lines = examined(tiny_config("fully_sup", moved, tmp_path))
    assert code == 2 and f"{label}: the file is empty" in line(lines, "data labeled")


def test_values_that_are_no_class(moved, tmp_path, examined):
    dataset = SegmentationDataset(SourceConfig(dataset="cityscapes", root=str(moved)))
    path = dataset.records[1].label
    raw = np.array(Image.open(path))
    raw[:2] = 77
    save(raw, path)
    code, lines = examined(tiny_config("fully_sup", moved, tmp_path))
    assert code == 2 and "labels hold value 77, none of the 19 classes; they are no labels of data.dataset" in lines[-1]
    assert any("value 77" in text and "1 of 3 images: NONE OF THE CLASSES" in text for text in lines)


def test_classes_that_no_label_shows_are_said(scenes, tmp_path, examined):
    counts = np.zeros(19, int)
    dataset = SegmentationDataset(SourceConfig(dataset="cityscapes", root=str(scenes)))
    for index in range(3):
        counts += np.bincount((dataset.label(index) + 1).ravel(), minlength=20)[1:]
    absent = [DATASETS["cityscapes"].classes[k] for k in np.flatnonzero(counts == 0)]
    code, lines = examined(tiny_config("fully_sup", scenes, tmp_path))
    said = line(lines, "labels labeled")
    assert code == 0 and "3 of 3 labels looked at" in said
    assert said.endswith(f"in none of them: {', '.join(absent)}" if absent else "they show every class")


def test_what_stops_the_step_is_the_verdict(scenes, tmp_path, examined):
    wrong = tiny_config("fully_sup", scenes, tmp_path)
    code, lines = examined(wrong, "model.num_classes=7")
    assert code == 2 and "model.num_classes is 7, but data set 'cityscapes'" in lines[-1]
    code, lines = examined(wrong, "model.checkpoint=none.pth")
    assert code == 2 and "model.checkpoint: none.pth: no such weight file" in lines[-1]
    code, lines = examined(wrong, "method.name=cpls")
    assert code == 2 and "unknown 'cpls'; did you mean 'cpsl'?" in lines[-1]


def test_an_earlier_step_is_named(scenes, tmp_path, examined):
    stage = tiny_config("uda", scenes, tmp_path)
    code, lines = examined(stage, "method.name=cpsl", "model.checkpoint=runs/warm_up/checkpoints/best")
    assert code == 2 and "train.py --stage warm_up makes it" in lines[-1]


def test_a_missing_list_is_named_with_what_makes_it(scenes, tmp_path, examined):
    code, lines = examined(tiny_config("semi_sup", scenes, tmp_path), "data.streams.labeled.list=lists/1.txt")
    assert code == 2 and "lists/1.txt: cannot read the list" in lines[-1]
    assert "scripts/prepare_splits.py CONFIG makes those of semi_sup" in lines[-1]


def test_refuses(config, fails):
    assert "--images 0: give 1 or more" in fails(doctor.main, config, "--images", 0)
