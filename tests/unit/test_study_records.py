"""What the evidence script keeps of changes after training."""

import json
import shutil

import pytest

from common.evaluation.identity import differences
from common.jobs.plan import Jobs
from common.steps import digest_of
from scripts.study.plan import runs_of
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
