"""The range test of the learning rate: a loss of closed form, its drawing, and a run on toy scenes."""

import sys
from xml.etree import ElementTree

import numpy as np
import pytest

from scripts import lr_find

pytestmark = pytest.mark.usefixtures("unchanged")


def logistic(middle: float) -> lr_find.Test:
    """A loss that falls as a logistic curve over ln rate, the fastest at `middle`, and then rises."""
    rates = np.geomspace(1e-6, 1, 121)
    falling = 3 / (1 + np.exp(2 * (np.log(rates) - np.log(middle))))
    return lr_find.Test(rates.tolist(), (falling + 30 * rates).tolist())


@pytest.mark.parametrize("middle", [1e-4, 1e-3])
def test_the_steepest_place_of_a_curve(middle):
    found = logistic(middle)
    assert found.steepest == pytest.approx(middle, rel=0.15)
    assert found.lowest > found.steepest


def test_too_few_points_are_said():
    with pytest.raises(ValueError, match="blew up after 4; lower --low or raise --steps"):
        _ = lr_find.Test([1, 2, 3, 4], [1, 1, 1, 9]).steepest


def test_the_drawing_marks_both_rates():
    found = logistic(1e-3)
    root = ElementTree.fromstring(lr_find.drawing(found))
    texts = [node.text for node in root.iter() if node.tag.endswith("text")]
    assert f"falls fastest: {found.steepest:.1e}" in texts and f"lowest: {found.lowest:.1e}" in texts


def test_a_run_on_toy_scenes(config, tmp_path, monkeypatch, capsys):
    """It leaves the drawing alone, and says two rates of those that were taken."""
    monkeypatch.chdir(tmp_path)
    before = set(tmp_path.rglob("*"))
    words = ["--low", "1e-4", "--high", "1e-1", "--steps", "14", "--out", "lr.svg", "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", ["lr_find.py", str(config), *words])
    lr_find.main()
    assert "try optim.lr=" in capsys.readouterr().out
    made = {path for path in set(tmp_path.rglob("*")) - before if ".cache" not in path.parts}
    assert made - {tmp_path / "runs"} == {tmp_path / "lr.svg"}


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["--low", "1", "--high", "0.1"], "give two rates above 0, the second one higher"),
        (["--steps", "10"], "--steps 10: give more than 10"),
        (["--out", "lr.png"], "--out lr.png: the name has to end in .svg"),
    ],
)
def test_bad_words(words, text, fails):
    assert text in fails(lr_find.main, "some.yaml", *words)
