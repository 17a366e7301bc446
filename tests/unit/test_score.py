"""Scoring files: against the evaluation of the network that wrote them, by hand, and what is refused."""

import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from common.config import EvalConfig, SourceConfig
from common.data import DATASETS, SegmentationDataset
from common.evaluation import evaluate, pair_folders, plain_row, score_files
from common.evaluation.identity import differences
from common.evaluation.per_image import read_per_image
from common.models.segmentor import SegmentationModel
from scripts import compare, score

pytestmark = pytest.mark.usefixtures("unchanged", "one_thread")
ROOT = Path(__file__).parents[2]


class Stripes(SegmentationModel):
    """Some class of 19, by the red channel."""

    def __init__(self):
        super().__init__(19, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))

    def segment(self, x):
        return {"logits": -(x[:, :1] / 14 - torch.arange(19.0).view(1, -1, 1, 1)).abs()}


@pytest.fixture
def program(monkeypatch, capsys):
    def call(*words) -> str:
        monkeypatch.setattr(sys, "argv", ["score.py", *map(str, words)])
        score.main()
        return capsys.readouterr().out

    return call


def write(path: Path, values) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(values, np.uint8)).save(path)
    return path


@pytest.fixture
def folders(tmp_path) -> tuple[Path, Path]:
    """Three classes, the last value ignored: one image right but for two pixels, one in a folder."""
    write(tmp_path / "labels" / "a_mask.png", [[0, 0, 1, 1], [2, 2, 255, 255]])
    write(tmp_path / "labels" / "more" / "b_mask.png", [[1, 1], [1, 1]])
    write(tmp_path / "pred" / "a.png", [[0, 1, 1, 1], [2, 0, 0, 255]])
    write(tmp_path / "pred" / "more" / "b.png", [[1, 1], [1, 1]])
    return tmp_path / "pred", tmp_path / "labels"


def test_saved_predictions_score_as_their_network_did(config, scenes, tmp_path, program):
    """With the labels of the data set, and with its folder of labels; the result compares with the network's."""
    source = SourceConfig(dataset="cityscapes", root=str(scenes), split="val")
    kept, file = tmp_path / "kept", tmp_path / "net" / "per_image.npz"
    cfg = EvalConfig(workers=0, boundary=2, per_image=True)
    dataset = SegmentationDataset(source)
    whole = evaluate(Stripes(), dataset, cfg, device="cpu", save_predictions=kept, per_image=file)
    text = program(kept, "--config", config, "eval.boundary=2", "--output", tmp_path / "scores")

    result = json.loads((tmp_path / "scores" / "evaluation.json").read_text())
    timing = {"seconds", "ms_per_image", "logit_adjustment", "identity"}
    assert {key: result[key] for key in whole.keys() - timing} == {key: whole[key] for key in whole.keys() - timing}
    assert differences(result, whole) == [] and result["identity"]["files"] == whole["identity"]["files"]
    assert "convention nan_mean" in text and "prec." in text
    ours, theirs = (read_per_image(path) for path in (tmp_path / "scores" / "per_image.npz", file))
    assert ours.names == theirs.names and np.array_equal(ours.matrices, theirs.matrices)

    ends = ("--prediction-end", "_leftImg8bit", "--label-end", "_gtFine_labelIds")
    program(kept, scenes / "gtFine" / "val", "--dataset", "cityscapes", *ends)
    again = json.loads((kept / "scores" / "evaluation.json").read_text())
    assert again["confusion"] == whole["confusion"]


def test_by_hand(folders, tmp_path, program):
    pred, labels = folders
    write(pred / "c.png", [[0]])
    text = program(pred, labels, "--classes", 3, "--label-end", "_mask", "--boundary", 1)
    result = json.loads((pred / "scores" / "evaluation.json").read_text())
    assert result["confusion"] == [[1, 1, 0], [0, 6, 0], [1, 0, 1]]
    assert [item["iou"] for item in result["per_class"]] == pytest.approx([1 / 3, 6 / 7, 1 / 2])
    assert result["images"] == 2 and result["convention"] == "nan_mean" and "tolerant_miou" in result
    assert "1 predictions have no label and are not scored" in text
    assert read_per_image(pred / "scores" / "per_image.npz").names == ["a", "b"]


def test_folders_may_be_arranged_otherwise(folders, program):
    pred, labels = folders
    (pred / "more" / "b.png").rename(pred / "b.png")
    program(pred, labels, "--classes", 3, "--label-end", "_mask")
    assert json.loads((pred / "scores" / "evaluation.json").read_text())["confusion"][1][1] == 6


@pytest.mark.parametrize("given", ["a/0001.png", "0001.png"])
@pytest.mark.parametrize("other", ["b/0001.png", "0001.png"])
def test_a_name_that_two_labels_have_is_none_of_its_own(given, other, tmp_path, fails):
    """As frames of videos: the prediction of one is not that of the other."""
    write(tmp_path / "labels/a/0001.png", [[0, 0]])
    write(tmp_path / "labels" / other, [[1, 1]])
    write(tmp_path / "pred" / given, [[0, 0]])
    said = fails(score.main, tmp_path / "pred", tmp_path / "labels", "--classes", 2)
    assert "no prediction for" in said and "of 2 labels have none" in said


def test_matrices_of_too_many_images_are_left_out(folders, program, monkeypatch):
    pred, labels = folders
    monkeypatch.setattr("common.evaluation.per_image.LARGEST", 17)
    text = program(pred, labels, "--classes", 3, "--label-end", "_mask")
    assert "2 images of 3 classes are too many for per_image.npz: it is not written" in text
    assert [path.name for path in (pred / "scores").iterdir()] == ["evaluation.json"]


def test_label_maps_of_a_folder_data_set(folders, tmp_path, program):
    """Labels hold 10, 20, 30; predictions the same, or class ids."""
    for folder in folders:
        for path in folder.rglob("*.png"):
            raw = np.array(Image.open(path))
            write(path, np.where(raw == 255, 255, 10 * (raw + 1)))
    described = {"images": "x", "classes": ["a", "b", "c"], "label_map": {10: 0, 20: 1, 30: 2}, "tail": ["c"]}
    tree = {"model": {"name": "upernet", "num_classes": 3}, "data": {"dataset": "folder", "folder": described}}
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(tree))
    words = (*folders, "--config", tmp_path / "own.yaml", "--label-end", "_mask", "--output")
    assert "c *" in program(*words, tmp_path / "one")
    for path in folders[0].rglob("*.png"):
        raw = np.array(Image.open(path))
        write(path, np.where(raw == 255, 255, raw // 10 - 1))
    program(*words, tmp_path / "two", "--values", "ids")
    first, second = (json.loads((tmp_path / name / "evaluation.json").read_text()) for name in ("one", "two"))
    assert first["confusion"] == second["confusion"] == [[1, 1, 0], [0, 6, 0], [1, 0, 1]]


def test_two_scored_folders_are_compared(folders, tmp_path, program, monkeypatch, capsys):
    pred, labels = folders
    write(tmp_path / "better" / "a.png", [[0, 0, 1, 1], [2, 0, 0, 0]])
    write(tmp_path / "better" / "b.png", [[1, 1], [1, 1]])
    for name in ("pred", "better"):
        program(tmp_path / name, labels, "--classes", 3, "--label-end", "_mask", "--output", tmp_path / "out" / name)
    monkeypatch.setattr(sys, "argv", ["compare.py", str(tmp_path / "out" / "pred"), str(tmp_path / "out" / "better")])
    compare.main()
    assert "over 2 images" in capsys.readouterr().out


def test_what_cannot_be_scored_is_named(folders, tmp_path, fails):
    pred, labels = folders
    words = (pred, labels, "--classes", 3, "--label-end", "_mask")
    main = score.main
    (pred / "a.png").rename(tmp_path / "a.png")
    assert f"{pred}: no prediction for 'a' (1 of 2 labels have none; here is 'more/b')" in fails(main, *words)
    write(pred / "a.png", [[0, 0]])
    assert "a.png: is 2x1 pixels, but its label" in fails(main, *words)
    write(pred / "a.png", [[0, 0, 255, 0], [0, 0, 0, 0]])
    assert "a.png: predicts no class at 1 labelled pixels" in fails(main, *words)
    write(pred / "a.png", [[0, 0, 7, 0], [0, 0, 0, 0]])
    assert "a.png: label value 7 is none of the 3 classes" in fails(main, *words)
    assert not (pred / "scores").exists(), "nothing is half written"

    assert "give one of --config FILE, --dataset NAME and --classes N" in fails(main, pred, labels)
    assert "give 1 or more, and the folder of the labels" in fails(main, pred, "--classes", 3)
    assert "no such folder of labels" in fails(main, pred, tmp_path / "none", "--classes", 3)
    assert "no labels here" in fails(main, pred, labels, "--classes", 3, "--label-end", "_x")
    assert "--boundary 40: give 0 to 32" in fails(main, *words, "--boundary", 40)
    write(pred / "a.png", [[0, 0, 0, 0], [0, 0, 0, 0]])
    (pred / "scores").mkdir()
    (pred / "scores" / "evaluation.json").touch()
    assert "--force" in fails(main, *words)


def test_calibration_of_files_is_said_to_be_none(folders):
    pairs = pair_folders(*folders, plain_row(3), label_end="_mask")
    with pytest.warns(UserWarning, match="eval.calibration has no effect: files hold no probabilities"):
        assert "ece" not in score_files(pairs, EvalConfig(calibration=True))


def test_the_lines_of_the_page(tmp_path, monkeypatch, capsys):
    """The block of Python in docs/scores.md, run as it stands."""
    block = re.search(r"```python\n(.*?)```", (ROOT / "docs" / "scores.md").read_text(), re.DOTALL)[1]
    assert len(block.strip().splitlines()) <= 5
    monkeypatch.chdir(tmp_path)
    for folder in ("predictions", "labels"):
        write(tmp_path / folder / "x.png", [[0, 1, 18, 18]])
    exec(block, {})
    assert "cityscapes: 1 images" in capsys.readouterr().out and DATASETS["cityscapes"].num_classes == 19
