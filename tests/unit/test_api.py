"""docs/api.md: its snippets run in their order, and give what the programs give."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from common import api
from common.config import ConfigError
from tests.unit.data_files import classes, make_folder, picture, save

PAGE = Path(__file__).resolve().parents[2] / "docs" / "api.md"
SNIPPETS = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def test_the_page(tmp_path, monkeypatch, capsys):
    make_folder(tmp_path / "factory", images=4)
    for k in range(2):
        save(picture(48, 64, seed=k), tmp_path / "factory/images/val" / f"im{k}.png")
        save(classes(48, 64, 5, seed=k), tmp_path / "factory/labels/val" / f"im{k}.png")
    monkeypatch.chdir(tmp_path)

    names: dict = {}
    for snippet in SNIPPETS:
        exec(compile(snippet, str(PAGE), "exec"), names)

    labels = [classes(48, 64, 5, seed=k) for k in range(2)]
    expected = sum(np.bincount(label.ravel(), minlength=5) for label in labels)
    assert np.array_equal(names["counted"].pixel_count, expected)
    assert names["found"]["miou"] == pytest.approx(names["result"]["miou"])  # of the same images by the same network
    assert names["labels"].shape == (48, 64) and Image.open("overlay.png").size == (64, 48)
    assert all(
        torch.equal(a, b) for a, b in zip(names["same"].parameters(), names["opened"].model.parameters(), strict=True)
    )
    training = next(snippet for snippet in SNIPPETS if "train(" in snippet)
    assert len([line for line in training.splitlines() if line]) <= 15
    assert "belt" in capsys.readouterr().out


def test_scores_by_hand():
    truth = np.array([[0, 0, 1, -1]])
    found = api.score([(np.array([[0, 1, 1, 1]]), truth)], 3)
    assert found["iou"][:2].tolist() == [0.5, 0.5] and np.isnan(found["iou"][2])
    assert (found["miou"], found["aacc"]) == (0.5, pytest.approx(2 / 3))
    assert api.score([], 2, "absent_zero")["iou"].tolist() == [0, 0]
    with pytest.raises(ValueError, match="convention 'mine': is none of nan_mean, absent_zero, ltss, detectron2"):
        api.score([], 2, "mine")
    with pytest.raises(ValueError, match="differ in shape"):
        api.score([(np.zeros((2, 2), int), truth)], 3)


def test_wrong_keys_are_named():
    with pytest.raises(ConfigError, match="model: unknown key 'clases'"):
        api.build({"name": "upernet", "clases": 3})
    with pytest.raises(ConfigError, match="data: unknown key 'rot'"):
        api.data_set({"dataset": "camvid", "rot": "x"})
    with pytest.raises(ConfigError, match="nowhere: no such checkpoint"):
        api.open_checkpoint("nowhere")


def test_segmenting_leaves_the_network_as_it_was():
    model = api.build({"name": "pspnet", "backbone": "resnet18", "num_classes": 2, "norm": "bn",
                       "options": {"channels": 8, "auxiliary": False}}).train()  # fmt: skip
    before = {name: value.clone() for name, value in model.state_dict().items()}
    labels = api.segment(model, picture(40, 56))
    assert model.training and labels.shape == (40, 56) and labels.dtype == np.int32
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
