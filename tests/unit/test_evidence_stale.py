"""The evidence script does not tell what was trained otherwise, and says what it cannot do before it begins."""

import json
import sys
from pathlib import Path

import pytest
import yaml

from scripts import evidence
from scripts.study.plan import After
from tests.unit.test_evidence import FAKE, FAKE_SCORE, edited, take

pytestmark = pytest.mark.usefixtures("unchanged")


@pytest.fixture
def tuned(tmp_path) -> Path:
    """A plan with two strengths of one remedy."""
    (tmp_path / "fake.py").write_text(FAKE)
    (tmp_path / "score.py").write_text(FAKE_SCORE)
    tree = {name: str(tmp_path / f"{name}.json") for name in ("choices", "results", "page")}
    tree |= {"command": f"python {tmp_path / 'fake.py'} {{settings}}", "config": "", "output": str(tmp_path / "out")}
    tree |= {"tune": ["images=t"], "final": {"blocks": []}, "seeds": [1, 2]}
    tree |= {"remedies": {"plain": {"a": []}, "good": {"weak": ["gain=1"], "strong": ["gain=2.5"]}}}
    path = tmp_path / "plan.yaml"
    path.write_text(yaml.safe_dump(tree, sort_keys=False))
    return path


@pytest.mark.parametrize(
    "changes",
    [
        {"remedies": {"plain": {"a": []}, "good": {"strong": ["gain=2.5"], "weak": ["gain=1"]}}},
        {"remedies": {"plain": {"a": []}, "good": {"weak": ["gain=1"], "strong": ["gain=-2"]}}},
        {"tune": ["images=other"]},
        {"settings": ["train.steps=9"]},
    ],
)
def test_strengths_are_chosen_by_what_was_trained(changes, tuned, monkeypatch, fails, capsys):
    """Not by the runs of another strength, or of other images, that lie at the same place."""
    take(monkeypatch, ("tune", tuned))
    edited(tuned, **changes)
    assert "is finished as another run" in fails(evidence.main, "choose", tuned)


@pytest.mark.parametrize(
    "changes",
    [
        {"remedies": {"plain": {"a": []}, "good": {"weak": ["gain=1"], "strong": ["gain=2"]}}},
        {"remedies": {"plain": {"a": []}, "good": {"weak": ["gain=1"], "strong": ["gain=2.5"], "more": ["gain=3"]}}},
        {"tune": ["images=other"]},
    ],
)
def test_a_choice_holds_for_what_it_was_made_among(changes, tuned, monkeypatch, fails, capsys):
    take(monkeypatch, ("tune", tuned), ("choose", tuned))
    edited(tuned, note="another", seeds=[1, 2, 3])
    take(monkeypatch, ("final", tuned))
    edited(tuned, **changes)
    assert "good: was chosen among other strengths, or settings" in fails(evidence.main, "final", tuned)


def test_further_scores_are_those_of_the_command(tuned, tmp_path, monkeypatch, fails, capsys):
    command = f"{sys.executable} {tmp_path / 'score.py'} {{checkpoint}} --json={{scores}}"
    edited(tuned, score=command, remedies={"plain": {"a": []}, "good": {"b": ["gain=1"]}})
    take(monkeypatch, ("choose", tuned), ("final", tuned), ("score", tuned), ("collect", tuned))
    edited(tuned, score=f"{command} eval.boundary=5")
    assert "is finished as another run" in fails(evidence.main, "collect", tuned)


def test_changed_classifiers_are_those_of_the_options(tuned, tmp_path, monkeypatch, fails, capsys):
    """Of one strength, too, whose folder is named as it would be among several."""
    after = {"then": {"name": "tau_norm", "options": ["tau=1", "eval.boundary=2"]}}
    edited(tuned, after=after, remedies={"plain": {"a": []}, "good": {"b": ["gain=1"]}}, seeds=[1])
    script = f"import sys\nfrom pathlib import Path\nout = Path(sys.argv[sys.argv.index('--output') + 1])\n{LEAVES}"
    (tmp_path / "rebalance.py").write_text(script)
    plain = evidence.Plan._jobs_after

    def jobs(plan, split):
        made = plain(plan, split)
        name, entry = next(iter(made.runs.items()))
        words = entry["command"].replace("scripts/rebalance.py", str(tmp_path / "rebalance.py"))
        return evidence.replace(made, runs={name: {"command": words}})

    monkeypatch.setattr(evidence.Plan, "_jobs_after", jobs)
    take(monkeypatch, ("choose", tuned), ("final", tuned), ("after", tuned), ("collect", tuned))
    runs = json.loads((tmp_path / "results.json").read_text())["splits"]["blocks"]["runs"]
    assert list(runs) == ["plain", "good", "then tau_1"]

    after["then"]["options"].append("bias=drop")
    edited(tuned, after=after)
    assert "is finished as another run" in fails(evidence.main, "collect", tuned)


LEAVES = """
import shutil
shutil.copytree(Path(sys.argv[1]), out)
"""


def test_the_folder_of_one_strength_is_named_as_among_several():
    assert After("tau_norm", ("tau=0.5,1", "bias=drop")).folder() == ""
    assert After("tau_norm", ("eval.boundary=2,3", "tau=0.5")).folder() == "/tau_0.5"
    assert After("tau_norm", ()).folder() == "/tau_norm"


@pytest.mark.parametrize(
    ("words", "changes", "why"),
    [
        (("final", "--seeds", "0"), {}, "seeds: 0 is the seed that strengths are chosen with"),
        (("final", "--minutes", "nan"), {}, "--minutes: nan; give more than 0"),
        (("final", "--only", "then"), {}, "no 'then' for the step `final`; it has plain, good"),
        (("after", "--only", "good"), {}, "no 'good' for the step `after`; it has then"),
        (("tune", "--only", "plain"), {}, "no 'plain' for the step `tune`; it has good"),
        (("final",), {"seeds": []}, "seeds: names none"),
        (("final",), {"final": {}}, "final: names none"),
        (("final",), {"final": {"a/b": []}}, "final.a/b: is the name of a folder"),
    ],
)
def test_what_would_run_nothing_is_said(words, changes, why, tuned, fails):
    edited(tuned, after={"then": {"name": "tau_norm", "options": ["tau=1"]}}, **changes)
    assert why in fails(evidence.main, words[0], tuned, *words[1:])
