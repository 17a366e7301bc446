"""Folds put together: each image once, intervals over blocks and over folds, and the page of them."""

import json
import sys

import numpy as np
import pytest
import yaml
from scipy import stats

from common.comparison import bootstrap, head_and_tail, of_differences
from common.config import typed
from scripts import evidence
from scripts.study import pools, records
from scripts.study.plan import Plan
from tests.unit.test_evidence import FAKE
from tests.unit.test_study_records import plan_of

pytestmark = pytest.mark.usefixtures("unchanged")


def recorded(matrices: np.ndarray) -> dict:
    return {"minutes": 1.0, "commit": "abc", "machine": None, "strength": "a", "matrices": records.packed(matrices)}


@pytest.fixture
def results() -> dict:
    """Two folds of three and two images; `good` has one seed more in the first."""
    draw = np.random.default_rng(3)
    splits = {}
    for fold, (images, seeds) in {"one": ("abc", "12"), "two": ("de", "1")}.items():
        runs = {
            name: {seed: recorded(draw.integers(1, 50, (len(images), 3, 3))) for seed in kept}
            for name, kept in (("base", "12"), ("good", seeds))
        }
        kept = {"classes": ["road", "tree", "pole"], "tail": [2], "convention": "nan_mean"}
        splits[fold] = {**kept, "images": list(images), "runs": runs, "starts": {}}

    blocks = {"a": 4, "b": 4, "c": 5, "d": 6, "e": 6}
    return {"splits": splits, "pools": {"all": {"splits": ["one", "two"], "blocks": blocks}}}


def whole(results: dict, name: str, seed: str) -> np.ndarray:
    parts = [pools._unpacked(split["runs"][name][seed], 3) for split in results["splits"].values()]
    return np.concatenate(parts)


def test_a_run_is_put_together_where_every_fold_has_it(results):
    split = pools.pooled(results["splits"], results["pools"]["all"])
    assert split["images"] == list("abcde")
    assert {name: list(seeds) for name, seeds in split["runs"].items()} == {"base": ["1", "2"], "good": ["1"]}
    got = pools._unpacked(split["runs"]["base"]["2"], 3)
    np.testing.assert_array_equal(got, whole(results, "base", "2"))


def test_other_scenes_are_resampled_blocks(results):
    split = pools.pooled(results["splits"], results["pools"]["all"])
    found = pools.block_differences(split, results["pools"]["all"], ["base", "good", "never run"])
    sides = [whole(results, name, "1") for name in ("good", "base")]
    expected, _ = bootstrap(*sides, [2], blocks=[0, 0, 1, 2, 2])
    assert found == {"good": expected} and found["good"]["miou"].n == 3

    change = [head_and_tail(side.sum(0), [2])["miou_tail"] for side in sides]
    text = "\n".join(pools.blocks_table(split, results["pools"]["all"], ["base", "good"]))
    assert f"{100 * (change[0] - change[1]):+.1f} ± " in text and "neighbouring frames, 3 of them" in text


def test_the_interval_over_folds_allows_for_shared_training_images():
    """For the k folds of a cross-validation: t with k − 1 degrees, and the variance times 1/k + 1/(k − 1)."""
    values = [0.02, 0.05, 0.01, 0.03, 0.06]
    found = pools.of_folds(values)
    error = np.std(values, ddof=1) * np.sqrt(1 / 5 + 1 / 4)
    assert found.half_width == pytest.approx(stats.t.ppf(0.975, 4) * error)
    assert found.p == pytest.approx(2 * stats.t.sf(np.mean(values) / error, 4))
    assert of_differences(values).half_width == pytest.approx(found.half_width / 1.5)
    assert pools.of_folds([0.1]).half_width is None


def test_fold_by_fold(results):
    text = "\n".join(pools.folds_table(results["splits"], results["pools"]["all"], ["base", "good"]))
    tails = [
        [
            head_and_tail(pools._unpacked(split["runs"][name][seed], 3).sum(0), [2])["miou_tail"]
            for name in ("good", "base")
        ]
        for split, seed in zip([results["splits"]["one"]] * 2 + [results["splits"]["two"]], "121", strict=True)
    ]
    changes = [100 * (good - base) for good, base in tails]
    assert f"| good | {np.mean(changes[:2]):+.1f} | {changes[2]:+.1f} | " in text

    del results["splits"]["two"]["runs"]["good"]
    assert pools.folds_table(results["splits"], results["pools"]["all"], ["base", "good"]) == []


def test_images_of_two_folds_or_of_no_block_are_refused(results):
    blocks = results["pools"]["all"]["blocks"]
    with pytest.raises(ValueError, match="two: no block of the pool has the image d"):
        pools.pool_of(results["splits"], ["one", "two"], {name: blocks[name] for name in "abc"})
    results["splits"]["two"]["images"] = ["c", "d"]
    with pytest.raises(ValueError, match="two: the image c is one of one too"):
        pools.pool_of(results["splits"], ["one", "two"], blocks)


def test_files_of_blocks(tmp_path):
    path = tmp_path / "blocks.csv"
    with pytest.raises(ValueError, match="blocks.csv: cannot read"):
        pools.read_blocks(path)
    for text in ("image,fold\na,1\n", "image,block\na,x\n", "image,block\na\n"):
        path.write_text(text)
        with pytest.raises(ValueError, match="blocks.csv: has no columns image and block"):
            pools.read_blocks(path)
    path.write_text("image,block,fold\na,3,1\n")
    assert pools.read_blocks(path) == {"a": 3}


@pytest.mark.parametrize(
    ("pool", "name", "why"),
    [
        ({"splits": ["blocks", "x"]}, "all", "'x' is no split of the plan: blocks, other"),
        ({"splits": ["blocks", "other"]}, "blocks", "is the name of a split"),
        ({"splits": ["blocks"]}, "all", "fewer than two splits"),
        ({"splits": ["blocks", "blocks"]}, "all", "or one twice"),
    ],
)
def test_pools_that_are_none(pool, name, why):
    with pytest.raises(ValueError, match=why):
        plan_of(final={"blocks": [], "other": []}, pools={name: {**pool, "blocks": "x.csv"}})


def test_from_folds_to_the_page(tmp_path, monkeypatch, capsys):
    """A pool is told once all of its folds are begun, in place of them."""
    (tmp_path / "fake.py").write_text(FAKE)
    (tmp_path / "blocks.csv").write_text("image,block,fold\na,1,1\nb,2,1\nc,3,2\nd,4,2\n")
    tree = {name: str(tmp_path / name) for name in ("choices", "results", "page", "output")}
    tree |= {"command": f"python {tmp_path / 'fake.py'} {{settings}}", "config": "", "tune": [], "seeds": [1, 2]}
    tree |= {"remedies": {"plain": {"a": []}, "good": {"b": ["gain=2"]}}}
    tree |= {"final": {"blocks": [], "one": ["names=a,b"], "two": ["names=c,d"]}}
    tree |= {"pools": {"folds": {"splits": ["one", "two"], "blocks": str(tmp_path / "blocks.csv")}}}
    plan = tmp_path / "plan.yaml"
    plan.write_text(yaml.safe_dump(tree, sort_keys=False))
    typed(Plan, tree, "plan")

    def take(*steps) -> str:
        for step in steps:
            monkeypatch.setattr(sys, "argv", ["evidence.py", step[0], str(plan), *step[1:]])
            assert evidence.main() == 0
        return (tmp_path / "page").read_text()

    text = take(("choose",), ("final", "--splits", "blocks", "one"), ("collect",), ("page",))
    assert "## Split one" not in text and "No run is done of two" in text and "## Split blocks: 2 images" in text

    text = take(("final",), ("collect",), ("page",))
    assert "## Split folds: 4 images" in text and "## Split one" not in text and "No run is done" not in text
    assert "neighbouring frames, 4 of them" in text and "| | one | two | mean |" in text
    assert (tmp_path / "images/evidence_plan_folds.svg").is_file()
    assert json.loads((tmp_path / "results").read_text())["pools"]["folds"]["blocks"] == {
        "a": 1,
        "b": 2,
        "c": 3,
        "d": 4,
    }
