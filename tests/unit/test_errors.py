"""What a run gets wrong: tables against counting, the order of the worst images, pictures, and the program."""

import csv
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from common.config import load_config, save_config
from common.data import SegmentationDataset
from common.evaluation import evaluate
from common.evaluation.errors import words, worst_images
from common.evaluation.per_image import FILE
from common.files import write_json
from common.models import build_model
from common.report.sheets import confusion_picture
from scripts import errors

pytestmark = pytest.mark.usefixtures("unchanged", "one_thread")


def test_the_worst_come_first():
    """Lowest IoU, of equal ones the most wrong pixels; images without the class are none of them."""
    matrices = np.zeros((5, 2, 2), int)
    matrices[0] = [[9, 0], [3, 3]]  # IoU 1/2
    matrices[1] = [[9, 0], [2, 0]]  # IoU 0, 2 wrong
    matrices[2] = [[9, 5], [4, 0]]  # IoU 0, 9 wrong
    matrices[3] = [[9, 4], [0, 0]]  # only predicted
    matrices[4] = [[9, 0], [0, 8]]  # right
    assert worst_images(matrices, 1, 10) == [2, 1, 0, 4] and worst_images(matrices, 1, 2) == [2, 1]


def test_words_of_an_image():
    matrix = np.array([[80, 10, 10], [30, 60, 10], [0, 0, 0]])
    assert words(matrix, 1, "abc") == "IoU 54.5 %; taken for a 30 %, c 10 %; mistaken for it: a 14 %"
    assert words(np.diag([1, 1, 1]), 1, "abc") == "IoU 100.0 %"


@pytest.mark.parametrize("count", [3, 40, 150, 847])
def test_a_confusion_picture_of_any_number_of_classes(count):
    """Blue where right, red where wrong; a class without truth has an empty row."""
    matrix = np.diag(np.arange(1, count + 1))
    matrix[1] = 0
    matrix[0, 2] = 1
    picture = confusion_picture(matrix, [f"class {k}" for k in range(count)])
    assert max(picture.size) < 3000
    cell = min(max(1400 // count, 3), 40)
    margin = picture.width - cell * count - 8

    def at(i, j):
        return np.array(picture.getpixel((margin + cell * j + 1, margin + cell * i + 1)))

    assert at(2, 2)[2] > at(2, 2)[0] + 50 and at(0, 2)[0] > at(0, 2)[2] + 50
    assert at(1, 1).min() >= 245 and at(2, 0).min() >= 245


@pytest.fixture
def run(config, tmp_path) -> Path:
    """What a test of an untrained network leaves."""
    cfg = load_config(config, ["eval.per_image=true", "eval.workers=0"])
    torch.manual_seed(0)
    model = build_model(cfg.model).eval()
    save_file(model.state_dict(), tmp_path / "net.safetensors")
    folder, dataset = tmp_path / "run", SegmentationDataset(cfg.data.val)
    kept = {"per_image": folder / FILE, "save_predictions": tmp_path / "kept"}
    result = evaluate(model, dataset, cfg.eval, device="cpu", **kept)
    write_json(folder / "evaluation.json", {**result, "checkpoint": str(tmp_path / "net.safetensors")})
    save_config(cfg, folder / "config.yaml")
    return folder


@pytest.fixture
def program(monkeypatch, capsys):
    def call(*words) -> str:
        monkeypatch.setattr(sys, "argv", ["errors.py", *map(str, words)])
        errors.main()
        return capsys.readouterr().out

    return call


def test_tables_and_sheets(run, tmp_path, program, recwarn):
    text = program(run, "--worst", 1)
    out = run / "errors"
    result = json.loads((run / "evaluation.json").read_text())
    head, *rows = csv.reader((out / "confusion.csv").open())
    assert [[int(n) for n in row[1:]] for row in rows] == result["confusion"]
    assert head[1:] == [row[0] for row in rows] == [item["name"] for item in result["per_class"]]

    images = list(csv.DictReader((out / "images.csv").open()))
    kept = np.load(run / FILE)
    for line, matrix in zip(images, kept["matrices"], strict=True):
        assert int(line["pixels"]) == matrix.sum()
        assert float(line["aAcc"]) == pytest.approx(np.trace(matrix) / matrix.sum(), abs=1e-6)
        union = matrix[0].sum() + matrix[:, 0].sum() - matrix[0, 0]
        assert float(line["road"]) == pytest.approx(matrix[0, 0] / union, abs=1e-6)

    sheets = sorted(path.name for path in (out / "worst").iterdir())
    there = [k for k in range(19) if kept["matrices"][:, k].sum()]
    assert [int(name[:3]) for name in sheets] == there and f"of {len(there)} classes" in text
    assert Image.open(out / "worst" / sheets[0]).width > 4 * 360
    assert not [w for w in recwarn if "not the one that was scored" in str(w.message)]

    before = (out / "worst" / sheets[0]).read_bytes()
    program(run, "--worst", 1, "--predictions", tmp_path / "kept", "--output", tmp_path / "files", "--classes", "road")
    assert [path.name for path in (tmp_path / "files" / "worst").iterdir()] == ["000_road.png"]
    assert (tmp_path / "files" / "worst" / "000_road.png").read_bytes() == before


def test_other_predictions_are_said_to_be(run, tmp_path, program):
    for path in (tmp_path / "kept").glob("*.png"):
        Image.fromarray(np.full_like(np.array(Image.open(path)), 7)).save(path)
    with pytest.warns(UserWarning, match="the prediction shown is not the one that was scored"):
        program(run, "--predictions", tmp_path / "kept", "--classes", "road")
    assert [path.name for path in (run / "errors" / "worst").iterdir()] == ["000_road.png"], "shown all the same"


def test_a_run_without_images_has_its_matrix(run, program):
    (run / FILE).unlink()
    assert "evaluate with eval.per_image=true" in program(run)
    assert {path.name for path in (run / "errors").iterdir()} == {"confusion.csv", "confusion.png"}


def test_mistakes_are_one_line(run, tmp_path, fails):
    line = fails(errors.main, run, "--classes", "raod")
    assert "--classes 'raod' is no class of the run; did you mean 'road'" in line
    assert "--worst -1" in fails(errors.main, run, "--worst", -1)
    assert "evaluation.json" in fails(errors.main, tmp_path / "none")
    (run / "config.yaml").unlink()
    assert "give --config FILE, or --worst 0" in fails(errors.main, run)
    assert not (run / "errors").exists()
    (run / "errors").mkdir()
    (run / "errors" / "images.csv").touch()
    assert "--force" in fails(errors.main, run, "--worst", 0)
