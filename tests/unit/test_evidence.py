"""The evidence script: its steps on a command that only leaves what a training leaves, and its page."""

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
import yaml

from common.config import read_tree, typed
from scripts import evidence

pytestmark = pytest.mark.usefixtures("unchanged")
ROOT = Path(__file__).parents[2]
CLASSES = ["road", "tree", "pole"]

# What a training leaves; its quality is `gain` of the settings and a little of the seed.
FAKE = """
import json, sys
from pathlib import Path
import numpy as np
words = dict(word.split("=", 1) for word in sys.argv[1:] if "=" in word)
seed, gain = int(words["seed"]), float(words.get("gain", 0))
hits = int(60 + 3 * seed % 5 + 10 * gain)
matrices = np.array([[[900, 50, 0], [30, 700, 0], [100 - hits, 0, hits]]] * 2)
folder = Path(words["output"]) / words["name"]
folder.mkdir(parents=True, exist_ok=True)
iou = hits / 100
per_class = [{"name": n, "id": i, "tail": n == "pole"} for i, n in enumerate(["road", "tree", "pole"])]
result = {"miou": iou, "miou_tail": -iou, "per_class": per_class, "convention": "nan_mean",
          "confusion": matrices.sum(0).tolist(), "identity": {"dataset": words.get("images", "a"), "images": 2}}
(folder / "evaluation.json").write_text(json.dumps(result))
(folder / "run.json").write_text(json.dumps({"minutes": 1.5, "commit": "abc"}))
np.savez_compressed(folder / "per_image.npz", names=np.array(words.get("names", "x,y").split(",")), matrices=matrices)
"""


# What an evaluation of its checkpoint leaves: the same, and further scores.
FAKE_SCORE = """
import json, sys
from pathlib import Path
checkpoint, scores = (Path(word.removeprefix("--json=")) for word in sys.argv[1:])
result = json.loads((checkpoint.parents[1] / "evaluation.json").read_text())
iou = result["miou"]
for item in result["per_class"]:
    item |= {"tolerant_iou": iou + 0.1, "boundary_f": 0.5, "ece": 0.25, "mass": 1.5}
further = {"tolerant_miou_tail": iou + 0.1, "boundary_f_tail": 0.5, "ece": 0.0625, "ece_tail": None}
scores.parent.mkdir(parents=True, exist_ok=True)
scores.write_text(json.dumps(result | further | {"boundary": {"pixels": 2}}))
"""


@pytest.fixture
def plan(tmp_path) -> Path:
    (tmp_path / "fake.py").write_text(FAKE)
    tree = {
        "command": f"python {tmp_path / 'fake.py'} {{settings}}", "config": "", "output": str(tmp_path / "out"),
        "choices": str(tmp_path / "choices.json"), "results": str(tmp_path / "results.json"),
        "page": str(tmp_path / "page.md"), "tune": [], "final": {"blocks": [], "official": ["images=b"]},
        "seeds": [1, 2, 3],
        "remedies": {"baseline": {"a": [], "b": ["gain=-1"]}, "good": {"weak": ["gain=1"], "strong": ["gain=2.5"]}},
    }  # fmt: skip
    path = tmp_path / "plan.yaml"
    path.write_text(yaml.safe_dump(tree, sort_keys=False))
    return path


def test_from_tuning_to_the_page(plan, tmp_path, monkeypatch, capsys, fails):
    def step(*words) -> int:
        monkeypatch.setattr(sys, "argv", ["evidence.py", *map(str, words)])
        return evidence.main()

    assert step("page", plan) == 0 and "Nothing has been run yet" in (tmp_path / "page.md").read_text()
    assert "end the step `tune` first" in fails(evidence.main, "choose", plan)
    assert "take the steps `tune` and `choose` first" in fails(evidence.main, "final", plan)
    assert step("tune", plan) == 0 and step("choose", plan) == 0
    choices = json.loads((tmp_path / "choices.json").read_text())
    assert [choices[name]["chosen"] for name in choices] == ["a", "strong"] and choices["good"]["by_tail"] == "weak"
    assert "--force" in fails(evidence.main, "choose", plan), "choices are not changed after a look at results"

    assert "no final run is done" in fails(evidence.main, "collect", plan)
    assert step("final", plan) == 0 and step("collect", plan) == 0 and step("page", plan) == 0
    results = json.loads((tmp_path / "results.json").read_text())
    assert list(results["splits"]) == ["blocks", "official"]
    assert set(results["splits"]["blocks"]["runs"]["good"]) == {"1", "2", "3"}
    text = (tmp_path / "page.md").read_text()
    assert "## Split blocks: 2 images" in text and "| good | strong | weak |" in text
    assert "mIoU(tail) +" in text and ": better" in text


def edited(plan: Path, **changes) -> Path:
    plan.write_text(yaml.safe_dump({**yaml.safe_load(plan.read_text()), **changes}, sort_keys=False))
    return plan


def take(monkeypatch, *steps) -> None:
    for step in steps:
        monkeypatch.setattr(sys, "argv", ["evidence.py", *map(str, step)])
        assert evidence.main() == 0


def test_remedies_begin_at_a_step_of_the_baseline(plan, tmp_path, monkeypatch, capsys):
    fixed = {"baseline": {"a": []}, "good": {"strong": ["gain=2.5"]}}
    edited(plan, remedies=fixed, branch=40, note="**Read this.**")
    take(monkeypatch, ("tune", plan), ("choose", plan), ("final", plan), ("collect", plan), ("page", plan))
    assert "there is nothing to choose among" in capsys.readouterr().out

    command = json.loads((tmp_path / "out/blocks/good_2/job.json").read_text())["command"]
    assert f"train.branch={tmp_path}/out/blocks/baseline_2/checkpoints/step_00000040" in command
    assert "branch" not in json.loads((tmp_path / "out/blocks/baseline_2/job.json").read_text())["command"]
    text = (tmp_path / "page.md").read_text()
    assert "Up to step 40 a seed's runs are one and the same" in text
    assert "**Read this.**" in text and "no strength was tuned" in text and "| good | strong | `gain=2.5` |" in text


def test_what_comes_before_and_pairs_of_remedies(plan, tmp_path, monkeypatch, capsys, fails):
    """Steps run first and are where remedies begin; a remedy has a config and a command of its own, and another to be
    held against. What is recorded already needs no steps."""
    first = {"after": "second", "settings": ["gain=1", "model.checkpoint={runs}/second_{seed}/{split}"]}
    remedies = {"baseline": {"a": {"after": "trunk"}}, "good": {"b": first}, "better": {"c": {"settings": ["gain=2"]}}}
    steps = {"second": {"after": "trunk", "settings": ["gain=2"]}, "trunk": []}
    edited(plan, remedies=remedies, steps=steps, seeds=[1, 2], against={"better": "good"}, final={"blocks": []})
    take(monkeypatch, ("choose", plan), ("final", plan), ("collect", plan), ("page", plan))

    made = json.loads((tmp_path / "results.json").read_text())
    assert list(made["splits"]["blocks"]["runs"]) == ["baseline", "good", "better"]
    assert list(made["splits"]["blocks"]["starts"]) == ["trunk", "second"]
    assert made["before"] == {"baseline": ["trunk"], "good": ["second", "trunk"], "better": []}
    command = (tmp_path / "out" / "blocks" / "good_2" / "job.json").read_text()
    assert f"model.checkpoint={tmp_path}/out/blocks/second_2/blocks" in command
    text = (tmp_path / "page.md").read_text()
    assert "- **better** against good: mIoU +3.6 ± 0.0 points over 2 pairs" in text
    assert "| second | comes before others | `gain=2` |" in text
    begin = [line.split(" | ") for line in text.split("Where they begin")[1].splitlines() if line.startswith("| ")][1:]
    assert [(row[0], row[1], row[3]) for row in begin[:4]] == [
        ("| **trunk**", "2", "62.0"), ("| baseline", "2", "+0.0 ± 0.0"),
        ("| **second**", "2", "82.0"), ("| good", "2", "-10.0 ± 0.0"),
    ]  # fmt: skip

    assert "--only: the plan has no 'gone' for the step `final`; it has baseline, good, better" in fails(
        evidence.main, "final", plan, "--only", "gone"
    )
    (tmp_path / "results.json").rename(tmp_path / "other.json")
    monkeypatch.setattr(sys, "argv", ["evidence.py", "final", str(plan), "--only", "better", "--seeds", "3"])
    capsys.readouterr()
    assert evidence.main() == 0
    assert "better_3" in (said := capsys.readouterr().out) and "trunk_3" not in said and "good_3" not in said

    (tmp_path / "other.json").rename(tmp_path / "results.json")
    shutil.rmtree(tmp_path / "out")
    capsys.readouterr()
    take(monkeypatch, ("final", plan))
    assert "second" not in capsys.readouterr().out and not (tmp_path / "out" / "blocks").exists()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"steps": {"good": []}}, "steps.good: is the name of a remedy"),
        ({"against": {"good": "gone"}}, "against.good: 'gone' is no remedy of the plan: baseline, good"),
        ({"convention": "detectron2"}, "convention: strengths are chosen by that of the runs"),
        ({"remedies": {"baseline": {"a": {"sets": []}}}}, "unknown key 'sets'"),
        ({"trunk": "gone", "branch": 40}, "trunk: 'gone' has to be one of `steps`"),
        ({"trunk": "first", "steps": {"first": []}}, "and `branch` to say at which step of it"),
        (
            {"remedies": {"baseline": {"a": []}, "good": {"weak": {"after": "first"}}}, "branch": 40},
            "remedies.good: comes after first, but by `branch` it begins at baseline",
        ),
    ],
)
def test_plans_that_do_not_fit_are_refused(plan, fails, change, said):
    edited(plan, **change)
    with pytest.raises((ValueError, SystemExit)) as error:
        typed(evidence.Plan, read_tree(plan), "plan").finals({"baseline": {"chosen": "a"}, "good": {"chosen": "weak"}})
    assert said in str(error.value)


def test_results_of_several_machines_are_joined(plan, tmp_path, monkeypatch):
    """What the file of results holds is not trained again, and stays when other seeds join it."""
    edited(plan, remedies={"baseline": {"a": []}, "good": {"strong": ["gain=2.5"]}}, seeds=[1, 2])
    take(monkeypatch, ("choose", plan), ("final", plan), ("collect", plan))
    first = json.loads((tmp_path / "results.json").read_text())["splits"]["blocks"]["runs"]

    edited(plan, output=str(tmp_path / "elsewhere"), seeds=[2, 3])
    take(monkeypatch, ("final", plan), ("collect", plan))
    assert sorted(path.name for path in (tmp_path / "elsewhere/blocks").iterdir()) == ["baseline_3", "good_3"]
    both = json.loads((tmp_path / "results.json").read_text())["splits"]["blocks"]["runs"]
    assert list(both["good"]) == ["1", "2", "3"] and both["good"]["1"] == first["good"]["1"]


def test_some_of_the_splits(plan, tmp_path, monkeypatch, fails):
    """What the others hold stays."""
    edited(plan, remedies={"baseline": {"a": []}}, seeds=[1])
    take(monkeypatch, ("choose", plan))
    for split, expected in (("official", ["official"]), ("blocks", ["blocks", "official"])):
        take(monkeypatch, ("final", plan, "--splits", split), ("collect", plan, "--splits", split))
        trained = sorted(path.name for path in (tmp_path / "out").iterdir())
        known = json.loads((tmp_path / "results.json").read_text())["splits"]
        assert sorted(known) == trained == expected

    assert "the step `page` is of none" in fails(evidence.main, "page", plan, "--splits", "blocks")
    assert "--splits: the plan has no 'gone'; it has blocks, official" in fails(
        evidence.main, "final", plan, "--splits", "blocks", "gone"
    )


def test_results_of_other_images_do_not_join(plan, tmp_path, monkeypatch, fails):
    edited(plan, remedies={"baseline": {"a": []}}, seeds=[1])
    take(monkeypatch, ("choose", plan), ("final", plan), ("collect", plan))
    edited(plan, output=str(tmp_path / "elsewhere"), seeds=[2])
    take(monkeypatch, ("final", plan))
    file = tmp_path / "elsewhere/blocks/baseline_2/evaluation.json"
    file.write_text(file.read_text().replace('"dataset": "a"', '"dataset": "c"'))
    assert "holds results of other images or settings" in fails(evidence.main, "collect", plan)
    edited(plan, settings=["images=c"])
    for step in ("final", "collect"):
        assert "results.json: its runs were trained with another value of settings than the plan" in fails(
            evidence.main, step, plan
        )


def test_results_join_where_one_does_not_say_a_setting(plan, tmp_path, monkeypatch, fails):
    """Recorded before an evaluation named it; what is named once is not forgotten."""
    edited(plan, remedies={"baseline": {"a": []}}, seeds=[1], final={"blocks": []})
    take(monkeypatch, ("choose", plan), ("final", plan), ("collect", plan))

    def found(seed, **more):
        edited(plan, output=str(tmp_path / f"clone_{seed}"), seeds=[seed])
        take(monkeypatch, ("final", plan))
        file = tmp_path / f"clone_{seed}/blocks/baseline_{seed}/evaluation.json"
        result = json.loads(file.read_text())
        file.write_text(json.dumps({**result, "identity": {**result["identity"], **more}}))

    for seed, more in ((2, {"window_softmax": False}), (3, {})):
        found(seed, **more)
        take(monkeypatch, ("collect", plan))
    results = json.loads((tmp_path / "results.json").read_text())
    assert list(results["splits"]["blocks"]["runs"]["baseline"]) == ["1", "2", "3"]
    found(4, window_softmax=True)
    assert "other images or settings: window_softmax False against True" in fails(evidence.main, "collect", plan)


def test_runs_that_are_no_longer_the_plans_are_refused(plan, tmp_path, monkeypatch, fails):
    """What is done was trained with another strength or other settings; where the runs are not, that is no matter."""
    fixed = {"baseline": {"a": {"after": "trunk"}}, "good": {"b": ["gain=1"]}}
    edited(plan, remedies=fixed, seeds=[1, 2], final={"blocks": []}, steps={"trunk": []})
    take(monkeypatch, ("choose", plan), ("final", plan), ("collect", plan))
    before = (tmp_path / "results.json").read_text()
    changes = {
        "good_1": {"remedies": {**fixed, "good": {"b": ["gain=2"]}}},
        "baseline_1": {"remedies": {**fixed, "baseline": {"a": {"after": "trunk", "settings": ["gain=0.5"]}}}},
        "trunk_1": {"steps": {"trunk": ["gain=1"]}},
    }
    for name, change in changes.items():
        kept = plan.read_text()
        edited(plan, **change)
        said = fails(evidence.main, "collect", plan)
        assert f"out/blocks/{name}: is finished as another run: command (was" in said and "remove that folder" in said
        assert (tmp_path / "results.json").read_text() == before
        edited(plan, output=str(tmp_path / "elsewhere"))
        take(monkeypatch, ("collect", plan))
        (tmp_path / "results.json").write_text(before)
        plan.write_text(kept)


def test_results_of_a_strength_that_is_no_longer_chosen_are_left_out(plan, tmp_path, monkeypatch, capsys):
    """And those of networks that were trained with it; the others stay, on a machine that has no runs, too."""
    change = {"name": "tau_norm", "options": ["tau=1"]}
    after = {"a": change, "b": {**change, "of": "good"}}
    edited(plan, remedies={"baseline": {"a": []}, "good": {"weak": ["gain=1"]}}, seeds=[1, 2], final={"blocks": []})
    take(monkeypatch, ("choose", plan), ("final", plan), ("collect", plan))
    file = tmp_path / "results.json"
    results = json.loads(file.read_text())
    runs = results["splits"]["blocks"]["runs"]
    runs |= {f"{name} tau_1": {"1": {**runs["good"]["1"], "strength": "tau_1"}} for name in after}
    file.write_text(json.dumps(results))

    edited(plan, remedies={"baseline": {"a": []}, "good": {"strong": ["gain=2.5"]}}, after=after)
    edited(plan, output=str(tmp_path / "elsewhere"))
    take(monkeypatch, ("choose", plan, "--force"))
    capsys.readouterr()
    take(monkeypatch, ("collect", plan), ("page", plan))
    said = capsys.readouterr().out
    kept = json.loads(file.read_text())["splits"]["blocks"]["runs"]
    assert kept == {name: runs[name] for name in ("baseline", "a tau_1")}
    for row in ("good, seed 1", "good, seed 2", "b tau_1, seed 1"):
        assert f"blocks: {row}: left out, it is of weak; strong is chosen now" in said

    monkeypatch.setattr(sys, "argv", ["evidence.py", "final", str(plan), "--only", "good", "--seeds", "2"])
    assert evidence.main() == 0
    file.write_text(json.dumps(results))
    take(monkeypatch, ("collect", plan))
    good = json.loads(file.read_text())["splits"]["blocks"]["runs"]["good"]
    assert {seed: run["strength"] for seed, run in good.items()} == {"2": "strong"}, "not seed 1, of weak"


def test_results_of_other_images_are_refused(plan, tmp_path, monkeypatch, fails):
    take(monkeypatch, ("tune", plan), ("choose", plan), ("final", plan))
    file = tmp_path / "out/blocks/good_2/evaluation.json"
    file.write_text(file.read_text().replace('"dataset": "a"', '"dataset": "c"'))
    assert "out/blocks/good_2: does not compare with the other runs: dataset c against a" in fails(
        evidence.main, "collect", plan
    )


def test_what_is_changed_after_training(plan, tmp_path, monkeypatch, fails):
    """The command of every seed whose baseline is done; its results, a strength each, make a table and a curve."""
    after = {
        "logit adjustment": {"name": "logit_adjustment", "options": ["tau=0.25,1"]},
        "good, then logit adjustment": {"name": "logit_adjustment", "options": ["tau=0.25,1"], "of": "good"},
    }
    edited(plan, remedies={"baseline": {"a": []}, "good": {"b": ["gain=1"]}}, seeds=[1, 2], after=after)
    parsed = typed(evidence.Plan, read_tree(plan), "plan")
    take(monkeypatch, ("choose", plan), ("final", plan))
    args = argparse.Namespace(only=None, step="after", seeds=None, device=None, threads=None)
    blocks = [run for run in evidence.wanted(parsed, args) if run.output.name == "blocks"]
    wanted = {(run.name, run.seed): run for run in blocks}
    (run, other) = (wanted["logit adjustment", seed] for seed in (1, 2))
    then = wanted["good, then logit adjustment", 1]
    assert len(wanted) == 4 and then.command[2] == f"{tmp_path}/out/blocks/good_1"
    trained, left = f"{tmp_path}/out/blocks/baseline_1", f"{tmp_path}/out/blocks/logit adjustment_1/strengths"
    words = [trained, "logit_adjustment", "tau=0.25,1", "--output", left]
    assert run.command[1:] == ("scripts/rebalance.py", *words)

    for done in (run, other, then):
        for i, strength in enumerate(("tau_1", "tau_0.25")):
            folder = done.folder / "strengths" / strength
            words = [f"gain={i - 1}", f"seed={done.seed}", f"output={folder.parent}", f"name={strength}"]
            subprocess.run([sys.executable, tmp_path / "fake.py", *words], check=True)
        (done.folder / "job.json").write_text('{"state": "done"}')
    take(monkeypatch, ("collect", plan), ("page", plan))
    runs = json.loads((tmp_path / "results.json").read_text())["splits"]["blocks"]["runs"]
    free, further = ([f"{name} tau_{tau}" for tau in (0.25, 1)] for name in after)
    assert list(runs) == ["baseline", "good", *free, *further]
    text = (tmp_path / "page.md").read_text()
    assert "### logit adjustment: after training, on the weights of baseline" in text
    assert "### good, then logit adjustment: after training, on the weights of good" in text
    assert "| logit adjustment tau_1 | 2 |" in text
    assert "- **good, then logit adjustment tau_1** against" in text and "- **logit adjustment tau_1**" not in text
    picture = (tmp_path / "images/evidence_plan_blocks.svg").read_text()
    assert "![Change of mIoU(tail) against change of mIoU(head), by remedy](images/evidence_plan_blocks.svg)" in text
    assert ElementTree.fromstring(picture).tag.endswith("svg") and "logit adjustment" in picture


def test_changes_after_training_are_of_a_remedy_and_told_apart(plan, fails):
    change = {"name": "logit_adjustment", "options": ["tau=1"]}
    edited(plan, after={"x": {**change, "of": "nothing"}})
    assert "after.x.of: 'nothing' is no remedy of the plan" in fails(evidence.main, "choose", plan)
    edited(plan, after={"x": change, "x of y": change})
    assert "after.x of y: begins with the name of another" in fails(evidence.main, "choose", plan)


def test_runs_are_scored_once_more(plan, tmp_path, monkeypatch, fails):
    """The further scores of the runs that are done stand on the page, with their changes by seed."""
    (tmp_path / "score.py").write_text(FAKE_SCORE)
    assert "score: names no command" in fails(evidence.main, "score", plan)
    edited(plan, remedies={"baseline": {"a": []}, "good": {"b": ["gain=1"]}}, seeds=[1, 2], final={"blocks": []})
    edited(plan, score=f"{sys.executable} {tmp_path / 'score.py'} {{checkpoint}} --json={{scores}}")
    take(monkeypatch, ("choose", plan), ("final", plan))
    (tmp_path / "out/blocks/good_2/job.json").unlink()
    take(monkeypatch, ("score", plan))
    made = sorted(path.parent.name for path in (tmp_path / "out/blocks/scores").glob("*/scores.json"))
    assert made == ["baseline_1", "baseline_2", "good_1"], "only what is done is scored"

    take(monkeypatch, ("final", plan), ("score", plan), ("collect", plan), ("page", plan))
    run = json.loads((tmp_path / "results.json").read_text())["splits"]["blocks"]["runs"]["good"]["2"]
    assert run["further"]["classes"] == {
        "pole": {"tolerant_iou": pytest.approx(0.81), "boundary_f": 0.5, "ece": 0.25, "mass": 1.5}
    }
    text = (tmp_path / "page.md").read_text()
    assert "| good | 2 | 82.0 (+10.0 ± 0.0) | 50.0 (+0.0 ± 0.0) | 6.2 (+0.0 ± 0.0) | – |" in text
    assert "| good | 82.0 / 50.0 / 25.0 / 1.50 |" in text

    edited(plan, convention="detectron2")
    assert "baseline: further scores are means by nan_mean" in fails(evidence.main, "collect", plan)
    edited(plan, convention=None)

    scores = tmp_path / "out/blocks/scores/good_1/scores.json"
    other = json.loads(scores.read_text())
    other["confusion"][0] = [1700, 200, 0]
    scores.write_text(json.dumps(other))
    assert "good_1/scores.json: 100 pixels are predicted otherwise" in fails(evidence.main, "collect", plan)
