"""Classes without a training pixel: the warning names class, value and remedy, and the remedy works."""

import dataclasses
import json
import sys
import warnings

import numpy as np
import pytest
import yaml

from common.config import ConfigError, SourceConfig, load_config
from common.data import SegmentationDataset, class_statistics
from common.data.coverage import coverage_warnings
from common.experiment import Experiment
from common.report.page import RunFolder, write_report
from scripts import class_stats
from tests.unit.data_files import make_folder, picture, save


@pytest.fixture
def masks(tmp_path):
    """Binary masks as most tools store them: 0 and 255."""
    for k in range(4):
        mask = np.zeros((16, 20), np.uint8)
        mask[: 4 * k] = 255
        for split in ("train", "val"):
            save(picture(16, 20, k), tmp_path / "images" / split / f"{k}.png")
            save(mask, tmp_path / "labels" / split / f"{k}.png")
    folder = {"images": "images/{split}", "labels": "labels/{split}", "classes": ["background", "crack"]}
    return SourceConfig(dataset="folder", root=str(tmp_path), folder=folder)


def lacks(source):
    dataset = SegmentationDataset(source)
    return coverage_warnings(dataset, class_statistics(dataset))


def test_masks_of_0_and_255(masks):
    (said,) = lacks(masks)
    assert said == (
        "class 1 (crack) has no pixel in the 4 training labels of data set 'folder' (train), while 37.5 % of their "
        "pixels are ignored with value 255: if that is 'crack', set data.folder.label_map: {0: 0, 255: 1}"
    )
    advice = yaml.safe_load(said.partition("data.folder.label_map: ")[2])
    corrected = dataclasses.replace(masks, folder={**masks.folder, "label_map": {str(k): v for k, v in advice.items()}})
    assert lacks(corrected) == []
    assert class_statistics(SegmentationDataset(corrected)).pixel_count.tolist() == [4 * 320 - 480, 480]


def test_several_classes(masks):
    folder = {**masks.folder, "classes": [f"c{k}" for k in range(9)]}
    (said,) = lacks(dataclasses.replace(masks, folder=folder))
    assert said.startswith("classes 1 (c1), 2 (c2), 3 (c3), 4 (c4), 5 (c5) and 3 more have no pixel")
    assert said.endswith("value 255: if that is one of them, give its id to 255 in data.folder.label_map")


def test_coloured_labels(tmp_path):
    colours = np.zeros((16, 20, 3), np.uint8)
    colours[:4] = (10, 20, 30)
    save(picture(16, 20), tmp_path / "images" / "a.png")
    save(colours, tmp_path / "labels" / "a.png")
    folder = {"images": "images", "labels": "labels", "classes": ["a", "b"], "encoding": "rgb", "unlisted": "ignore"}
    folder["palette"] = [[0, 0, 0], [10, 20, 31]]
    (said,) = lacks(SourceConfig(dataset="folder", root=str(tmp_path), folder=folder))
    assert "25.0 % of their pixels are ignored with colour (10, 20, 30)" in said
    assert said.endswith("if that is one of them, give it this colour in data.folder.palette")


def test_nothing_ignored(tmp_path):
    source = make_folder(tmp_path, count=3)
    for path in (tmp_path / "labels" / "train").iterdir():
        save(np.ones((48, 64), np.uint8), path)
    (said,) = lacks(source)
    assert said.startswith("classes 0 (class0), 2 (class2) have no pixel in the 6 training labels")
    assert said.endswith("they cannot be learnt and their IoU says nothing; add images that show them")


def test_all_classes_shown(tmp_path):
    assert lacks(make_folder(tmp_path)) == []


# Where it is said --------------------------------------------------------------------------------------------------


@pytest.fixture
def config(masks, tmp_path):
    tree = {
        "model": {"name": "upernet", "num_classes": 2},
        "data": {
            "dataset": "folder",
            "root": masks.root,
            "folder": dict(masks.folder),
            "workers": 0,
            "streams": {"labeled": {"split": "train", "batch_size": 2, "augment": {"recipe": "mmseg", "crop": [8, 8]}}},
            "val": {"split": "val"},
        },
        "output": str(tmp_path / "runs"),
    }
    path = tmp_path / "cracks.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def test_a_prior_that_was_not_left_out_is_refused_before_training(config):
    with pytest.raises(ConfigError, match="eval.logit_adjustment: -1: adds back a prior"):
        Experiment(load_config(config, ["eval.logit_adjustment=-1"]), counted="labeled")
    for wrong in (
        "remedies.logits=blv",
        "remedies={logits: {name: balanced_softmax}, heads: 3}",
        "remedies.logits=[1]",
    ):
        with pytest.raises(ConfigError, match="adds back a prior"):  # and what else is wrong is said by the loss
            Experiment(load_config(config, ["eval.logit_adjustment=-1", wrong]), counted="labeled")
    with pytest.raises(ConfigError, match="remedies.logits.tau"):
        half = "remedies.logits={name: logit_adjustment, tau: half}"
        Experiment(load_config(config, ["eval.logit_adjustment=-1", half]), counted="labeled")


def test_the_start_of_training_and_the_report(config):
    cfg = load_config(config)
    experiment = Experiment(cfg, counted="labeled")
    with pytest.warns(UserWarning, match=r"class 1 \(crack\) has no pixel .* value 255: .*label_map: \{0: 0, 255: 1\}"):
        experiment.begin(resume=False)
    experiment.open(0)

    (cfg.folder / "log.jsonl").touch()
    page = write_report(cfg.folder / "report.html", [RunFolder.load(cfg.folder)]).read_text()
    notes = page.partition('class="notes"')[2].partition("</section>")[0]
    assert "class 1 (crack) has no pixel" in notes and "255: 1}" in notes


def test_class_stats(config, tmp_path, monkeypatch, capsys):
    words = ["class_stats", "--config", str(config), "--json", str(tmp_path / "out.json"), "--workers", "0"]
    monkeypatch.setattr(sys, "argv", words)
    with pytest.warns(UserWarning, match=r"class 1 \(crack\) has no pixel"):
        class_stats.main()
    written = json.loads((tmp_path / "out.json").read_text())
    assert "label_map: {0: 0, 255: 1}" in written["warnings"][0]
    assert written["group_rule"] is None and "rare" not in capsys.readouterr().out

    monkeypatch.setattr(sys, "argv", [*words, "--force", "data.groups={rare: [crack]}"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        class_stats.main()
    printed = capsys.readouterr().out
    assert "groups as listed in data.groups" in printed and "listed level" in printed
