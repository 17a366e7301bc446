"""A split told scene by scene: which images are of one, what the page says of each, and of all."""

import numpy as np
import pytest
from scipy import stats

from common.comparison import head_and_tail
from scripts import evidence
from scripts.study import records, scenes
from scripts.study.plan import Scenes
from tests.unit.test_evidence import edited, plan, take  # noqa: F401
from tests.unit.test_study_records import plan_of

pytestmark = pytest.mark.usefixtures("unchanged")

SEEDS = {"base": "12", "good": "1", "other": "12"}
IMAGES = list("abcdefg")
PARTS = [["a", "b"], ["c", "d", "e"], ["f", "g"]]
ROWS = [slice(0, 2), slice(2, 5), slice(5, 7)]  # of PARTS
TAIL = [1, 2]


@pytest.fixture
def matrices() -> dict[str, dict[str, np.ndarray]]:
    """Remedy → seed → (7, 3, 3). Class 2 is in no image of the first scene; `good` has one seed less."""
    draw = np.random.default_rng(5)
    found = {name: {seed: draw.integers(1, 60, (7, 3, 3)) for seed in seeds} for name, seeds in SEEDS.items()}
    for seeds in found.values():
        for matrix in seeds.values():
            matrix[:2, 2] = 0
    return found


@pytest.fixture
def split(matrices) -> dict:
    runs = {
        name: {seed: {"matrices": records.packed(matrix)} for seed, matrix in seeds.items()}
        for name, seeds in matrices.items()
    }
    kept = {"classes": ["road", "sign", "pole"], "tail": TAIL, "convention": "nan_mean"}
    return {**kept, "images": IMAGES, "runs": runs}


def tail_of(matrix: np.ndarray, rows: slice) -> float:
    """mIoU(tail) in percent of the classes that the images show, from its definition."""
    whole = matrix[rows].sum(0)
    shown = [k for k in TAIL if whole[k].sum()]
    return 100 * np.mean([whole[k, k] / (whole[k].sum() + whole[:, k].sum() - whole[k, k]) for k in shown])


def cells(text: str, name: str) -> list[str]:
    line = next(line for line in text.splitlines() if line.startswith(f"| {name} |"))
    return [cell.strip() for cell in line.strip("|").split("|")[1:]]


def test_scenes_are_told_with_the_classes_that_they_show(split, matrices):
    (text,) = scenes.scenes_table(split, {"of": "blocks", "parts": PARTS}, ["base", "good", "other", "not run"])
    assert "| a (2) | c (3) | f (2) | mean change |" in text
    means = [np.mean([tail_of(matrix, rows) for matrix in matrices["base"].values()]) for rows in ROWS]
    assert cells(text, "base")[:3] == [f"{mean:.1f}" for mean in means]

    for name, seeds in (("good", "1"), ("other", "12")):
        sides = matrices[name], matrices["base"]
        changes = [np.mean([tail_of(sides[0][s], rows) - tail_of(sides[1][s], rows) for s in seeds]) for rows in ROWS]
        assert cells(text, name)[:3] == [f"{change:+.1f}" for change in changes]
        low, high = stats.ttest_1samp(changes, 0).confidence_interval()
        assert cells(text, name)[3] == f"{np.mean(changes):+.1f} ± {(high - low) / 2:.1f}"


def test_a_change_in_every_scene_is_decided_over_all_that_are_planned(split):
    """Three changes that are much alike: decided for one remedy, and not for one among many that could be chance."""
    truth, swap = np.diag([50, 40, 30]), np.array([[0, 0, 0], [1, -1, 0], [0, 0, 0]])
    missed = {"base": [10] * 7, "good": [0, 0, 1, 1, 1, 0, 0]}  # pixels of class 1, image by image
    split["runs"] = {
        name: {"1": {"matrices": records.packed(np.array([truth + n * swap for n in counts]))}}
        for name, counts in missed.items()
    }
    many = [f"not run {i}" for i in range(1000)]
    for remedies, bold in ((["base", "good"], True), (["base", "good", *many], False)):
        (text,) = scenes.scenes_table(split, {"of": "blocks", "parts": PARTS}, remedies)
        assert cells(text, "good")[3].startswith("**") is bold


def test_parts_of_one_clip_say_nothing_of_others(split):
    (text,) = scenes.scenes_table(split, {"of": "pieces", "parts": PARTS}, ["base", "good"])
    assert "one scene" in text
    assert "mean change" not in text
    assert len(cells(text, "good")) == 3


def test_nothing_to_compare_is_no_table(split):
    del split["runs"]["good"], split["runs"]["other"]
    assert scenes.scenes_table(split, {"of": "blocks", "parts": PARTS}, ["base", "good", "other"]) == []


def test_a_scene_without_a_class_of_the_tail_is_in_no_mean(split, matrices):
    """The first scene loses its only one."""
    for name, seeds in matrices.items():
        for seed, matrix in seeds.items():
            matrix[:2, 1:] = 0
            split["runs"][name][seed]["matrices"] = records.packed(matrix)

    (text,) = scenes.scenes_table(split, {"of": "blocks", "parts": PARTS}, ["base", "other"])
    sides = matrices["other"], matrices["base"]
    changes = [np.mean([tail_of(sides[0][s], rows) - tail_of(sides[1][s], rows) for s in "12"]) for rows in ROWS[1:]]
    low, high = stats.ttest_1samp(changes, 0).confidence_interval()
    assert cells(text, "base")[0] == cells(text, "other")[0] == "–"
    assert cells(text, "other")[3] == f"{np.mean(changes):+.1f} ± {(high - low) / 2:.1f}"


def test_which_images_are_of_one():
    assert scenes.pieces_of(IMAGES, 3) == [list("abc"), list("de"), list("fg")]
    blocks = dict(zip(IMAGES, (7, 7, 2, 2, 2, 9, 9), strict=True))
    assert scenes.blocks_of(IMAGES, blocks) == PARTS

    with pytest.raises(ValueError, match="7 images cannot make 8 pieces"):
        scenes.pieces_of(IMAGES, 8)
    with pytest.raises(ValueError, match="no block has the image g"):
        scenes.blocks_of(IMAGES, {name: 1 for name in "abcdef"})
    with pytest.raises(ValueError, match="all images are of one block"):
        scenes.blocks_of(IMAGES, dict.fromkeys(IMAGES, 3))


def test_head_and_tail_agrees_on_what_is_shown(matrices):
    """The definition above against the library's, with the convention of the table."""
    matrix = matrices["base"]["1"][:2].sum(0)
    assert tail_of(matrices["base"]["1"], slice(0, 2)) == pytest.approx(
        100 * head_and_tail(matrix, TAIL, scenes.SHOWN)["miou_tail"]
    )


@pytest.mark.parametrize("given", [{}, {"blocks": "a.csv", "pieces": 4}], ids=["none", "both"])
def test_scenes_are_blocks_or_pieces(given):
    with pytest.raises(ValueError, match="either a file of blocks or a number of pieces"):
        Scenes(**given)


def test_scenes_are_of_a_split_that_is_planned():
    with pytest.raises(ValueError, match="scenes: 'gone' is no split of the plan: blocks"):
        plan_of(scenes={"gone": {"pieces": 4}})


def test_from_the_plan_to_the_page(plan, tmp_path, monkeypatch, fails):  # noqa: F811
    """The scenes are those of the images that were evaluated, of the splits that are done."""
    (tmp_path / "blocks.csv").write_text("image,block,fold\nx,1,1\ny,2,1\n")
    remedies = {"baseline": {"a": []}, "good": {"strong": ["gain=2.5"]}}
    told = {"blocks": {"blocks": str(tmp_path / "blocks.csv")}, "official": {"pieces": 2}}
    edited(plan, remedies=remedies, seeds=[1, 2], scenes=told)
    take(monkeypatch, ("choose", plan), ("final", plan, "--splits", "blocks"), ("collect", plan), ("page", plan))
    text = (tmp_path / "page.md").read_text()
    assert "| | x (1) | y (1) | mean change |" in text and "consecutive parts" not in text

    take(monkeypatch, ("final", plan), ("collect", plan), ("page", plan))
    assert "| | x (1) | y (1) |\n" in (tmp_path / "page.md").read_text()

    for changed, why in (
        ({"blocks": {"pieces": 3}}, "scenes.blocks: 2 images cannot make 3 pieces"),
        ({"official": {"blocks": str(tmp_path / "gone.csv")}}, "gone.csv: cannot read the blocks"),
    ):
        edited(plan, scenes=changed)
        before = (tmp_path / "results.json").read_text()
        assert why in fails(evidence.main, "collect", plan)
        assert (tmp_path / "results.json").read_text() == before
