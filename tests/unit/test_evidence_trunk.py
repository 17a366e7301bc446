"""Comparisons whose runs all begin at a trunk of their own: in tuning as at the end, and told apart from others."""

import json

import pytest

from scripts import evidence
from tests.unit.test_evidence import edited, plan, take  # noqa: F401 (a fixture)

pytestmark = pytest.mark.usefixtures("unchanged")


def test_remedies_and_their_strengths_begin_at_a_trunk(plan, tmp_path, monkeypatch, fails):  # noqa: F811
    edited(plan, steps={"trunk": []}, branch=40, trunk="trunk", seeds=[1, 2], final={"blocks": []})
    take(monkeypatch, ("tune", plan), ("choose", plan), ("final", plan), ("collect", plan), ("page", plan))

    for part, names in (("tune", ["baseline-1_0", "good-0_0"]), ("blocks", ["baseline_2", "good_2"])):
        for name in names:
            command = json.loads((tmp_path / f"out/{part}/{name}/job.json").read_text())["command"]
            trunk = f"trunk_{name.rpartition('_')[2]}"
            assert f"train.branch={tmp_path}/out/{part}/{trunk}/checkpoints/step_00000040" in command

    assert "branch" not in json.loads((tmp_path / "out/tune/trunk_0/job.json").read_text())["command"]
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["before"] == {"baseline": ["trunk"], "good": ["trunk"]}
    text = (tmp_path / "page.md").read_text()
    assert "Up to step 40 a seed's runs are one and the same" in text
    assert list(results["splits"]["blocks"]["starts"]) == ["trunk"]
    assert "Where they begin" not in text, "the trunk is evaluated at its end, where nothing begins"
    told = text.split("Against trunk to its own end (2 seeds: ")[1]
    assert "mIoU(tail) 62.0, " in told.splitlines()[0], "of seed 1 60 + 3, of seed 2 60 + 1 hits in a hundred pixels"
    good = next(line for line in told.splitlines() if line.startswith("- **good** against trunk: "))
    assert "mIoU(tail) +25.0 ± 0.0 points over 2 pairs: better" in good, "ten more hits for each point of gain"
    assert "- **baseline** against trunk: mIoU +0.0 ± 0.0 points over 2 pairs: not told apart" in told

    edited(plan, branch=10)
    assert "baseline: was chosen among other strengths, or settings, than" in fails(evidence.main, "final", plan)
    edited(plan, branch=40, steps={"trunk": ["gain=0.5"]})
    assert "was chosen among other strengths, or settings, than" in fails(evidence.main, "final", plan)


def test_runs_with_a_trunk_and_without_are_not_joined(plan, tmp_path, monkeypatch, fails):  # noqa: F811
    fixed = {"baseline": {"a": []}, "good": {"strong": ["gain=2.5"]}}
    edited(plan, remedies=fixed, branch=40, seeds=[1, 2], final={"blocks": []})
    take(monkeypatch, ("choose", plan), ("final", plan), ("collect", plan))
    edited(plan, steps={"trunk": []}, trunk="trunk", seeds=[1, 2, 3])
    assert "its runs were trained with another value of trunk than the plan has" in fails(evidence.main, "final", plan)
