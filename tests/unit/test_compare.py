"""Comparing runs through the command line: seeds together, images resampled, the three forms, refusals."""

import csv
import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import yaml
from scipy import stats

from common.comparison import bootstrap, head_and_tail
from common.evaluation import summarise
from common.evaluation.per_image import FILE
from common.report.compared import blocks_of
from common.report.groups import find_runs, grouped
from scripts import compare

pytestmark = pytest.mark.usefixtures("unchanged")
CLASSES, TAIL = ("road", "tree", "car", "sign & <post>|", "pedestrian"), (3, 4)
BASE = np.array([[900, 20, 5, 1, 1], [30, 700, 5, 1, 1], [5, 5, 300, 1, 1], [25, 20, 5, 50, 0], [20, 30, 5, 0, 45]])
GOOD = np.array([[900, 20, 5, 1, 1], [30, 700, 5, 1, 1], [25, 15, 270, 1, 1], [8, 7, 5, 80, 0], [5, 10, 5, 0, 80]])
IDENTITY = {"dataset": "street", "split": "val", "images": 12, "files": "12", "labels": "ab", "convention": "nan_mean"}


def images(matrix: np.ndarray, seed: int, count: int = 12) -> np.ndarray:
    """Matrices of some images, as a method of this mean matrix with this seed would make them."""
    return np.random.default_rng(seed).poisson(matrix, (count, *matrix.shape))


def make_run(folder: Path, matrices: np.ndarray, seed=0, per_image=False, step=100, tail=TAIL, **changes) -> Path:
    folder.mkdir(parents=True)
    row = SimpleNamespace(name="street", classes=CLASSES, palette=[(9, 9, 9)] * 5, tail=tail, counts=None)
    result = summarise(matrices.sum(0), row, "nan_mean") | {"images": 12, "step": step, **changes.pop("result", {})}
    result["identity"] = IDENTITY | changes.pop("identity", {})
    config = {"seed": seed, "name": folder.name, "output": str(folder.parent), "train": {"steps": 100}, **changes}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    (folder / "run.json").write_text(json.dumps({"seed": seed, "name": folder.name}))
    (folder / "evaluation.json").write_text(json.dumps(result))
    if per_image:
        names = [f"{'ab'[i > 5]}/{i:02d}" for i in range(12)]
        np.savez_compressed(folder / FILE, names=np.array(names), matrices=matrices)
    return folder


@pytest.fixture
def runs(tmp_path) -> Path:
    """Three seeds of two methods, whose weights come from a run of the same seed."""
    for seed in range(3):
        for name, matrix, loss in (("ce", BASE, "ce"), ("logits", GOOD, "la")):
            own = {"remedies": {"logits": {"name": loss}}, "init": f"runs/start_{seed}/checkpoints"}
            make_run(tmp_path / "runs" / f"{name}_{seed}", images(matrix, seed), seed, **own)
    return tmp_path / "runs"


@pytest.fixture
def program(monkeypatch, capsys):
    def call(*words) -> str:
        monkeypatch.setattr(sys, "argv", ["compare.py", *map(str, words)])
        compare.main()
        return capsys.readouterr().out

    return call


def test_seeds_are_one_method(runs, program):
    """Numbers are those of scipy's paired test on the seeds."""
    text = program(runs)
    scored = {}
    for name, matrix in (("ce", BASE), ("logits", GOOD)):
        scored[name] = [head_and_tail(images(matrix, seed).sum(0), TAIL) for seed in range(3)]
    said = {}
    for key in ("miou_tail", "miou_head", "miou"):
        a, b = ([100 * values[key] for values in scored[name]] for name in ("logits", "ce"))
        mean = np.mean(np.subtract(a, b))
        said[key] = f"{mean:+.1f} ± {stats.ttest_rel(a, b).confidence_interval(0.95).high - mean:.1f}"
    first = text.splitlines()[2]
    assert first.startswith(f"- logits: tail {said['miou_tail']} over 3 seeds; head {said['miou_head']}")
    assert f"all {said['miou']}" in first and "gained: " in first and "pedestrian" in first and "lost: car" in first
    assert f"({said['miou_tail']})" in text and "| ce | 3 |" in text

    rows = [line for line in text.splitlines() if "| higher |" in line or "| lower |" in line]
    gains = [re.split(r"(?<!\\)\|", line)[4].split("±")[0] for line in rows]
    assert len(rows) >= 3 and list(map(float, gains)) == sorted(map(float, gains), reverse=True)
    assert text.count(" * |") == 2, "the tail is marked"
    assert "| sign & <post>\\| * |" in text


def test_a_difference_within_noise_is_called_that(runs, program):
    for seed in range(3):
        make_run(runs / f"same_{seed}", images(BASE, seed + 10), seed, remedies="same")
    text = program(runs / "ce_0", runs / "ce_1", runs / "ce_2", *(runs / f"same_{seed}" for seed in range(3)))
    first = text.splitlines()[2]
    assert first.count("(within noise)") == 3 and first.endswith("no class beyond noise.")
    assert text.count("| within noise |") == 5 and ", within noise) |" in text


def test_the_baseline_is_named_by_method_or_run(runs, program):
    for name in ("logits", runs / "logits_1"):
        text = program(runs, "--baseline", name)
        assert text.startswith("Against logits") and "- ce: tail -" in text and "gained: car" in text


def test_only_seeds_in_common_are_paired(runs, program):
    text = program(runs / "ce_0", runs / "ce_1", runs / "ce_2", runs / "logits_1", runs / "logits_2")
    assert "over 2 seeds" in text and "| ce | 3 |" in text and "| logits | 2 |" in text
    text = program(runs / "ce_0", runs / "ce_1", runs / "logits_2")
    assert "- logits: no seed in common with ce, so nothing is paired." in text
    text = program(runs / "ce_0", runs / "ce_1", runs / "logits_1")
    assert "over seed 1 alone" in text and "±" not in text.split("One pair")[0].replace("± is", "")


def test_one_method_is_only_tabulated(runs, program):
    text = program(runs / "ce_0", runs / "ce_1")
    assert "| ce | 2 |" in text and "Against" not in text and "(" not in text.splitlines()[3]


def test_single_runs_are_compared_over_images(tmp_path, program):
    ours, base = images(GOOD, 1), images(BASE, 2)
    folders = (
        make_run(tmp_path / "ce", base, per_image=True),
        make_run(tmp_path / "la", ours, 1, per_image=True, remedies={"logits": "la"}),
    )
    text = program(*folders)
    found, _ = bootstrap(ours, base, TAIL)
    tail = found["miou_tail"]
    assert f"- la: tail {100 * tail.mean:+.1f} ± {100 * tail.half_width:.1f} over 12 images" in text
    assert "frames of a video are not independent" in text

    text = program(*folders, "--block", 4)
    wide = bootstrap(ours, base, TAIL, blocks=np.arange(12) // 4)[0]["miou_tail"]
    assert f"± {100 * wide.half_width:.1f} over 3 blocks of 12 images" in text and "--block N" not in text
    assert "over 2 blocks of 12 images" in program(*folders, "--block", "folder")
    (folders[1] / FILE).unlink()
    assert "over one pair" in (text := program(*folders)) and "eval.per_image=true" in text


def test_blocks():
    assert blocks_of(["a/1", "a/2", "b/1", "c"], "folder") == [0, 0, 1, 2]
    assert blocks_of(["a"] * 5, 2) == [0, 0, 1, 1, 2]


def test_csv_holds_every_number(runs, tmp_path, program):
    program(runs, "--output", tmp_path / "out" / "table.csv")
    lines = list(csv.DictReader((tmp_path / "out" / "table.csv").open()))
    tail = next(line for line in lines if line["method"] == "logits" and line["score"] == "miou_tail")
    assert float(tail["mean"]) - float(tail["baseline"]) == pytest.approx(float(tail["difference"]))
    assert float(tail["low"]) < float(tail["difference"]) < float(tail["high"]) and tail["over"] == "3 seeds"
    assert {f"iou/{name}" for name in CLASSES} < {line["score"] for line in lines}
    assert {line["verdict"] for line in lines} <= {"", "higher", "lower", "within noise"}


def test_latex_is_escaped(runs, program):
    text = program(runs, "--format", "latex")
    assert text.count(r"\begin{tabular}") == text.count(r"\end{tabular}") == 2 and r"sign \& <post>|" in text
    body = [line for line in text.splitlines() if not line.startswith("%")]
    assert r"$\pm$" in text and not any("±" in line or "_" in line for line in body)
    assert {line.count(" & ") for line in body if line.endswith(r"\\")} == {6}
    assert "$-$" in text and not any(line.lstrip().startswith(("+", "-")) for line in body)


def test_further_scores_are_compared_where_all_have_them(tmp_path, program):
    for seed in range(2):
        for name, ece in (("ce", 0.2), ("la", 0.1)):
            extra = {"result": {"ece": ece + 0.01 * seed, "ece_tail": None}, "remedies": name}
            make_run(tmp_path / f"{name}_{seed}", images(BASE, seed), seed, **extra)
    text = program(tmp_path)
    assert "| ECE | ECE(tail) |" in text and "10.5 (-10.0 ± 0.0)" in text and "| – (–) |" in text


def test_what_does_not_compare_is_refused(runs, tmp_path, fails):
    main = compare.main
    other = make_run(tmp_path / "other", images(BASE, 5), remedies="x", identity={"convention": "ltss"})
    line = fails(main, runs, other)
    assert f"{other} does not compare with {runs / 'ce_0'}: convention ltss against nan_mean" in line
    tails = make_run(tmp_path / "tails", images(BASE, 5), remedies="x", tail=(4,))
    assert "other classes make the tail" in fails(main, runs, tails)
    same = {"init": "runs/start_0/checkpoints", "remedies": {"logits": {"name": "ce"}}}
    twice = make_run(tmp_path / "again", images(BASE, 5), **same)
    assert f"{twice} and {runs / 'ce_0'} are of one config and seed 0" in fails(main, runs, twice)

    half = make_run(runs / "half_0", images(BASE, 5), remedies="half", step=50)
    assert f"{half}: it was evaluated at step 50 of 100; let it end" in fails(main, half)
    found, left = find_runs([runs])
    assert [group.name for group in grouped(found)] == ["ce", "logits"] and "half_0 is left out" in left[0]

    (tmp_path / "empty").mkdir()
    assert "neither a run nor a folder of runs" in fails(main, tmp_path / "empty")
    assert "no such run folder" in fails(main, tmp_path / "nowhere")
    assert "neither a run that is compared nor one of ce, logits" in fails(main, runs, "--baseline", "dice")
    assert "--block 0: give a number" in fails(main, runs, "--block", 0)
    assert "ends in none of .md, .csv, .tex" in fails(main, runs, "--output", tmp_path / "x.doc")
    (tmp_path / "there.md").touch()
    assert "--force" in fails(main, runs, "--output", tmp_path / "there.md")


def test_matrices_of_another_evaluation_are_refused(tmp_path, fails):
    a = make_run(tmp_path / "a", images(BASE, 0), per_image=True)
    b = make_run(tmp_path / "b", images(GOOD, 0), per_image=True, remedies="b")
    stored = dict(np.load(b / FILE))
    np.savez_compressed(b / FILE, names=stored["names"], matrices=images(GOOD, 1))
    assert "per_image.npz: is of another evaluation than evaluation.json" in fails(compare.main, a, b)
    np.savez_compressed(b / FILE, names=stored["names"][::-1] + "x", matrices=stored["matrices"])
    assert "is of other images than" in fails(compare.main, a, b)
