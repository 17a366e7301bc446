"""What the evidence script keeps of changes after training."""

import json
import shutil

import pytest

from common.config import typed
from common.evaluation.identity import differences
from common.jobs.plan import Jobs
from common.steps import digest_of
from scripts.study.known import changes as after_of
from scripts.study.known import of_plan, told
from scripts.study.plan import Plan, runs_of
from scripts.study.records import changed_after, unadjusted


@pytest.mark.parametrize(
    ("named", "change", "fits"),
    [
        (0.25, {"name": "logit_adjustment", "options": {"tau": 0.25}}, True),  # in the scores
        (0.0, {"name": "logit_adjustment", "options": {"tau": 0.25}}, True),  # in the network
        (0.5, {"name": "logit_adjustment", "options": {"tau": 0.25}}, False),
        (0.25, {"name": "tau_norm", "options": {"tau": 0.25}}, False),
    ],
)
def test_an_adjustment_of_the_scores_is_the_change_itself(named, change, fits, tmp_path):
    result = {"identity": {"dataset": "a", "logit_adjustment": named}, "rebalance": change}
    other = {"identity": {"dataset": "a", "logit_adjustment": 0.0}}
    assert (differences(unadjusted(result, other), other) == []) is fits

    adjusted = {"identity": {"dataset": "a", "logit_adjustment": 0.5}}  # as the runs themselves are
    result["identity"]["logit_adjustment"] = 0.5 + named
    assert (differences(unadjusted(result, adjusted), adjusted) == []) is fits


THEN = {"name": "tau_norm", "options": ["tau=1,3"], "of": "good"}


def plan_of(**changes):
    tree = {
        "command": "python train.py {config} {settings}", "config": "a.yaml", "output": "out", "choices": "c.json",
        "results": "r.json", "page": "p.md", "tune": [], "final": {"blocks": ["data=x"]}, "seeds": [1, 2],
        "settings": ["train.steps=9"], "steps": {"trunk": ["lr=1"], "other": ["lr=2"]},
        "remedies": {"baseline": {"a": []}, "good": {"b": {"after": "trunk", "settings": ["gain=1"]}}},
        "after": {"then": THEN},
    }  # fmt: skip
    return typed(Plan, tree | changes, "plan")


@pytest.mark.parametrize(
    ("changes", "rows", "starts", "why"),
    [
        ({}, {"baseline", "good", "then tau_1"}, {"trunk", "other"}, ""),
        ({"note": "x", "seeds": [3]}, {"baseline", "good", "then tau_1"}, {"trunk", "other"}, ""),
        ({"steps": {"trunk": ["lr=3"], "other": ["lr=2"]}}, {"baseline"}, {"other"}, "step trunk"),
        ({"remedies": {"baseline": {"a": []}, "good": {"b": {"after": "trunk", "settings": ["gain=2"]}}}},
         {"baseline"}, {"trunk", "other"}, "entry of good"),
        ({"after": {"then": {**THEN, "options": ["tau=1,2"]}}},
         {"baseline", "good", "then tau_1"}, {"trunk", "other"}, ""),
        ({"after": {"then": {**THEN, "options": ["tau=1,3", "bias=drop"]}}},
         {"baseline", "good"}, {"trunk", "other"}, "after.then"),
        ({"after": {"then": {**THEN, "of": "baseline"}}}, {"baseline", "good"}, {"trunk", "other"}, "after.then"),
    ],
)  # fmt: skip
def test_what_was_trained_otherwise_than_the_plan_says_now_is_left_out(changes, rows, starts, why):
    """A strength of the same name, with other settings, is not told as if it had been trained with them."""
    choices = {"baseline": {"chosen": "a"}, "good": {"chosen": "b"}}
    runs = {
        "baseline": {"1": {"strength": "a"}},
        "good": {"1": {"strength": "b"}},
        "then tau_1": {"1": {"strength": "tau_1"}},
    }
    split = {"runs": runs, "starts": {"trunk": {"1": {}}, "other": {"1": {}}}}
    known = {**told(plan_of(), choices), "after": after_of(plan_of()), "splits": {"blocks": split}}
    splits, left = of_plan(known, plan_of(**changes), choices)
    kept = splits.get("blocks", {"runs": {}, "starts": {}})
    assert set(kept["runs"]) == rows and set(kept["starts"]) == starts
    assert len(left) == 3 - len(rows) and all(
        f"left out, the plan has another value of {why} now" in line for line in left
    )


def test_results_of_other_settings_of_all_runs_are_refused():
    """Before anything is trained or dropped; what an earlier file does not say is not compared."""
    choices = {"baseline": {"chosen": "a"}, "good": {"chosen": "b"}}
    known = {**told(plan_of(), choices), "splits": {"blocks": {"runs": {"baseline": {"1": {"strength": "a"}}}}}}
    others = {
        "settings": ["train.steps=90"],
        "config": "b.yaml",
        "final": {"blocks": ["data=y"]},
    }
    for key, value in others.items():
        with pytest.raises(ValueError, match=rf"r.json: .* another value of {key}\S* than the plan has now; give"):
            of_plan(known, plan_of(**{key: value}), choices)
    for before, after in ((None, 40), (40, None)):
        with pytest.raises(ValueError, match="another value of branch than the plan has now"):
            of_plan({**known, "branch": before}, plan_of(branch=after), choices)

    del known["final"], known["branch"]
    splits, left = of_plan(known, plan_of(final={"blocks": ["data=z"], "more": []}, branch=40), choices)
    assert splits["blocks"]["runs"] == known["splits"]["blocks"]["runs"] and left == []


def test_changes_of_a_network_that_was_trained_anew_are_refused(tmp_path):
    """By a digest of its weights; where the run is gone, and of results that have none, nothing is known."""
    weights = tmp_path / "out/blocks/good_1/checkpoints/step_000002/model.safetensors"
    weights.parent.mkdir(parents=True)
    weights.write_bytes(b"first")
    (weights.parents[1] / "last").symlink_to(weights.parent.name)
    jobs = Jobs(command="", output="out/blocks", runs={"then": {"command": "true"}}, seeds=(1,), folder=str(tmp_path))
    (run,) = runs_of(jobs)
    strength = run.folder / "strengths/tau_1"
    strength.mkdir(parents=True)
    change = {"checkpoint": str(weights.relative_to(tmp_path)), "digest": digest_of(weights), "name": "tau_norm"}
    (strength / "evaluation.json").write_text(json.dumps({"rebalance": change}))
    assert changed_after([run]) == [], "it is not done"
    (run.folder / "job.json").write_text('{"state": "done"}')
    assert [result.name for result in changed_after([run])] == ["then tau_1"]

    weights.write_bytes(b"second")
    with pytest.raises(ValueError, match="out/blocks/then_1: is of weights that .*good_1 no longer has; remove it"):
        changed_after([run])
    longer = weights.parents[1] / "step_000003"
    weights.parent.rename(longer)
    (weights.parents[1] / "last").unlink()
    (weights.parents[1] / "last").symlink_to(longer.name)
    with pytest.raises(ValueError, match="no longer has"):  # a training of other steps
        changed_after([run])

    (strength / "evaluation.json").write_text(json.dumps({"rebalance": {**change, "digest": None}}))
    assert len(changed_after([run])) == 1
    (strength / "evaluation.json").write_text(json.dumps({"rebalance": change}))
    shutil.rmtree(weights.parents[1])
    assert len(changed_after([run])) == 1
