"""What is not one method: networks changed after training, tests beside trainings, folders without a config; and
methods that do not have the same seeds."""

import csv
import json

import numpy as np
import pytest

from common.report.groups import find_runs, grouped
from common.report.seeds import methods
from scripts import compare
from tests.unit.test_compare import BASE, CLASSES, make_run

pytestmark = pytest.mark.usefixtures("unchanged")


def changed(folder, seed, name, run="ce", **options):
    """As scripts/rebalance.py leaves a result: the config is the trained network's."""
    change = {"checkpoint": f"{folder.parent}/{run}_{seed}/checkpoints/step_1/model.safetensors", "name": name}
    return make_run(folder, BASE[None], seed, result={"rebalance": {**change, "options": options}})


def names_of(*folders):
    runs = find_runs(folders)[0]
    found = [(group.name, list(group.runs)) for group in grouped(runs)]
    assert [seeds for _, seeds in found] == [list(group.runs) for group in methods(runs)]
    return found


def test_a_network_that_was_changed_after_training_is_another_method(tmp_path, call):
    """Not a further seed of the one that it was made from, and each strength for itself."""
    for seed in (0, 1):
        make_run(tmp_path / f"ce_{seed}", BASE[None], seed)
        changed(tmp_path / f"ce_{seed}_logit_adjustment", seed, "logit_adjustment", tau=0.5)
        for tau in (0.25, 1):
            changed(tmp_path / f"ce_{seed}_tau_norm" / f"tau_{tau}", seed, "tau_norm", tau=tau)

    assert names_of(tmp_path / "ce_0", tmp_path / "ce_1_logit_adjustment") == [
        ("ce", [0]),
        ("ce_logit_adjustment", [1]),
    ]
    expected = [("ce", [0, 1]), ("ce_logit_adjustment", [0, 1]), ("tau_0.25", [0, 1]), ("tau_1", [0, 1])]
    assert names_of(tmp_path) == expected
    assert "| ce_logit_adjustment | 2 |" in call(compare.main, tmp_path, "--baseline", "ce")


def test_tests_of_several_networks_are_several_methods(tmp_path):
    for seed in (0, 1):
        run = make_run(tmp_path / f"ce_{seed}", BASE[None], seed)
        for network in ("student", "teacher"):
            test = make_run(
                run / "test" / f"step_9_{network}-0123456{seed}", BASE[None], seed, result={"network": network}
            )
            (test / "run.json").write_text(json.dumps({"seed": seed, "kind": "test"}))

    tests = [tmp_path / f"ce_{s}/test/step_9_{n}-0123456{s}" for s in (0, 1) for n in ("student", "teacher")]
    found = names_of(tmp_path / "ce_0", tmp_path / "ce_1", *tests)
    assert [seeds for _, seeds in found] == [[0, 1]] * 3 and found[0][0] == "ce"
    assert {name.split(" ")[-1] for name, _ in found[1:]} == {"step_9_student", "step_9_teacher"}


def test_folders_of_scores_without_a_config_are_methods_of_their_own(tmp_path, call):
    """As scripts/score.py leaves them, all of one name."""
    for method in "AB":
        folder = make_run(tmp_path / f"m{method}" / "scores", BASE[None])
        (folder / "config.yaml").unlink()
        (folder / "run.json").unlink()
    text = call(compare.main, tmp_path / "mA/scores", tmp_path / "mB/scores")
    assert "Against mA/scores" in text and "| mB/scores | 1 |" in text


def test_calibration_of_other_tail_classes_is_not_compared(tmp_path, call):
    """A class that gets no probability worth counting has no error, and would not be missed in the mean."""
    for seed in (0, 1):
        for name, errors in (("ce", {3: 0.1, 4: 0.2}), ("new", {3: 0.1, 4: None if seed else 0.3})):
            run = make_run(tmp_path / f"{name}_{seed}", BASE[None], seed, loss=name)
            result = json.loads((run / "evaluation.json").read_text())
            for item in result["per_class"]:
                item["ece"] = errors.get(item["id"], 0.0)
            result["ece_tail"] = np.mean([error for error in errors.values() if error is not None])
            (run / "evaluation.json").write_text(json.dumps(result | {"ece": 0.05}))

    head, _, row = [line for line in call(compare.main, tmp_path).splitlines() if line.startswith("| ")][:3]
    cells = dict(zip(head.split("|"), row.split("|"), strict=True))
    assert cells[" ECE(tail) "] == " 15.0 (–) " and cells[" ECE "].startswith(" 5.0 (+0.0")


def test_unequal_seeds(tmp_path, call):
    """The method is 2 points of recall better on every seed that it has, and lacks the easiest one."""

    def matrix(recall):
        return np.array([[900, 20, 5, 1, 1], [30, 700, 5, 1, 1], [5, 5, 300, 1, 1], [100 - recall, 0, 0, recall, 0],
                         [20, 30, 5, 0, 45]])[None]  # fmt: skip

    for seed, recall in enumerate((10, 12, 80)):
        make_run(tmp_path / f"ce_{seed}", matrix(recall), seed, loss="ce")
        if seed < 2:
            make_run(tmp_path / f"new_{seed}", matrix(recall + 2), seed, loss="new")

    text = call(compare.main, tmp_path)
    row = next(line for line in text.splitlines() if line.startswith(f"| {CLASSES[3][:4]}"))
    assert row.endswith("| 13.0 (+2.0) |")
    note = (
        "new and ce have other seeds: changes are of seeds 0, 1, which both have; means of scores are of all that each"
    )
    assert note in text

    call(compare.main, tmp_path, "--output", tmp_path / "t.csv")
    lines = list(csv.DictReader((tmp_path / "t.csv").open()))
    ours = [line for line in lines if line["method"] == "new"]
    assert len(ours) == 10 and all(line["seeds"] == "2" for line in ours)
    for line in ours:
        change = float(line["mean"]) - float(line["baseline"])
        assert change == pytest.approx(float(line["difference"]), abs=1e-12)
    assert "have other seeds" not in call(
        compare.main, tmp_path / "ce_0", tmp_path / "ce_1", tmp_path / "new_0", tmp_path / "new_1"
    )
