"""What the evidence script says of its results: numbers, picture, page and the README's table; the project's plans."""

import json
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from scipy import stats

from common.comparison import Difference, head_and_tail, of_differences, pairs_needed
from common.config import load_config, read_tree, typed
from common.report.compared import Change
from scripts import evidence
from scripts.study import numbers, page, plot, records, strengths, summary

pytestmark = pytest.mark.usefixtures("unchanged")
ROOT = Path(__file__).parents[2]
CLASSES = ["road", "tree", "pole"]


def grass_tree_pole(tree: int, pole: int) -> dict:
    """A recorded run with so many hits of the last two classes."""
    matrix = np.array([[900, 50, 0], [100 - tree, tree, 0], [100 - pole, 0, pole]])
    return {"minutes": 1.0, "commit": "abc", "machine": None, "matrices": records.packed(matrix[None])}


def test_a_remedy_is_held_against_the_best_that_is_free():
    """Of three strengths the first two cost less of the head than the remedy; the second has the higher tail."""
    made = {"baseline": (90, 40), "late": (80, 60), "free t_1": (88, 50), "free t_2": (84, 56), "free t_3": (70, 70)}
    runs = {
        name: {str(s): grass_tree_pole(tree - s, pole + s) for s in range(3)} for name, (tree, pole) in made.items()
    }
    split = {"classes": CLASSES, "tail": [2], "convention": "nan_mean", "images": ["x"], "runs": runs}
    name, difference = numbers.best_free(split, "baseline", "late", ["free t_1", "free t_2", "free t_3"])
    assert name == "free t_2" and difference.n == 3 and difference.mean == pytest.approx(0.04)
    assert numbers.best_free(split, "baseline", "late", []) is None
    text = "\n".join(page.against_free(split, ["baseline", "late"], {"free": "baseline"}))
    alike, any_cost = text.split("whatever it costs of the head")
    assert "- **late** against free t_2: mIoU(tail) +4.0 ± 0.0 points over 3 pairs: better" in alike
    assert "- **late** against free t_3: mIoU(tail) -10.0 ± 0.0 points over 3 pairs: worse" in any_cost

    runs["late"] = {str(s): grass_tree_pole(99 - s, 60 + s) for s in range(3)}
    text = "\n".join(page.against_free(split, ["baseline", "late"], {"free": "baseline"}))
    assert "- **late**: nothing that is free comes within half a point of its mean mIoU(head)" in text


def test_a_remedy_is_held_against_what_is_free_in_the_networks_of_its_pair():
    """Not against what is free in the baseline's, which keeps the head worse and has the higher tail."""
    made = {"baseline": (50, 40), "method": (90, 40), "with it": (90, 50)}
    made |= {"free t_1": (50, 90), "then t_1": (90, 47), "then t_2": (80, 70)}
    runs = {
        name: {str(s): grass_tree_pole(tree - s, pole + s) for s in range(3)} for name, (tree, pole) in made.items()
    }
    split = {"classes": CLASSES, "tail": [2], "convention": "nan_mean", "images": ["x"], "runs": runs}
    after = {"free": "baseline", "then": "method"}
    text = "\n".join(page.against_free_in_others(split, {"with it": "method"}, after))
    alike, any_cost = text.split("whatever it costs of the head")
    assert "- **with it** against then t_1: mIoU(tail) +3.0 ± 0.0 points over 3 pairs: better" in alike
    assert "- **with it** against then t_2: mIoU(tail) -20.0 ± 0.0 points over 3 pairs: worse" in any_cost
    assert not page.against_free_in_others(split, {"with it": "baseline"}, {"then": "method"})


def test_the_picture_puts_changes_where_they_belong():
    """Of a field from (−1, −2) to (1, 2) points: right is a better head, up a better tail."""

    def change(head, tail):
        return (Difference(head / 100, 2, half_width=0.001), Difference(tail / 100, 2, half_width=0.001))

    points = {"worse": change(-1, -2), "better": change(1, 2)}
    curves = {"free": [change(0, 1)], "then": [change(1, 3)]}
    of = {"free": "baseline", "then": "better"}
    root = ElementTree.fromstring(plot.plot(points, {}, {}))
    dots = [dot for dot in root.iter() if dot.tag.endswith("circle")][:2]
    (x0, y0), (x1, y1) = [(float(dot.get("cx")), float(dot.get("cy"))) for dot in dots]
    assert x0 < x1 and y0 > y1, "pixels grow downwards"
    zeros = [line for line in root.iter() if line.get("class") == "zero"]
    centre = ((x0 + x1) / 2, (y0 + y1) / 2)
    assert (float(zeros[0].get("x1")), float(zeros[1].get("y1"))) == pytest.approx(centre, abs=0.2)

    root = ElementTree.fromstring(plot.plot(points, curves, of))
    free, then = [line.get("points").split(" ") for line in root.iter() if line.tag.endswith("polyline")]
    dots = [f"{dot.get('cx')},{dot.get('cy')}" for dot in root.iter() if dot.tag.endswith("circle")]
    assert then[0] == dots[3] and free[1:] + then[1:] == dots[:2], "a line begins at the remedy that it changes"
    assert free[0].split(",")[0] == free[1].split(",")[0], "at the baseline, right below a gain of the tail alone"


def test_packed_matrices_come_back():
    matrices = np.random.default_rng(0).integers(0, 3, (4, 5, 5))
    packed = records.packed(matrices)
    assert (numbers.total_of(packed, 5) == matrices.sum(0)).all()
    assert numbers.total_of([packed[1]], 5).tolist() == matrices[1].tolist()


def test_numbers_of_the_page_are_scipys():
    draw = np.random.default_rng(1)
    runs = {}
    for remedy, hits in (("baseline", 60), ("logits", 70), ("alone", 65)):
        seeds = range(5) if remedy != "alone" else range(7, 9)
        runs[remedy] = {str(seed): one_run(hits + int(draw.integers(-4, 5))) for seed in seeds}
    split = {"classes": CLASSES, "tail": [2], "convention": "nan_mean", "images": ["x"], "runs": runs}
    results = {"remedies": dict.fromkeys(("baseline", "logits", "alone", "missing")), "after": {}}
    text = page.section("blocks", split, results, "x.svg")

    tails = {name: [tail_of(run) for run in seeds.values()] for name, seeds in runs.items()}
    test = stats.ttest_rel(tails["logits"], tails["baseline"])
    mean = 100 * np.mean(np.subtract(tails["logits"], tails["baseline"]))
    half = 100 * test.confidence_interval(0.95).high - mean
    assert f"mIoU(tail) {mean:+.1f} ± {half:.1f} points over 5 pairs" in text
    spread = 100 * np.std(np.subtract(tails["logits"], tails["baseline"]), ddof=1)
    assert f"| logits | 5 | {spread:.1f} | {pairs_needed(spread, 2)} | {pairs_needed(spread, 3)} |" in text
    assert f"{100 * np.mean(tails['logits']):.1f} ({mean:+.1f} ± {half:.1f})" in text
    assert f"mIoU(tail) {100 * np.std(tails['baseline'], ddof=1):.1f}" in text
    assert "**alone**: no seed in common with the baseline yet" in text and "Not run yet: missing." in text


def test_a_class_that_no_image_shows():
    """By detectron2's rule it is in no mean, by MMSegmentation's it is 0 where it is predicted."""
    made = {"baseline": [[90, 0, 10, 0], [0, 80, 20, 0], [30, 20, 50, 0], [0, 0, 0, 0]]}
    made["late"] = [[90, 0, 10, 0], [0, 80, 20, 0], [30, 10, 50, 10], [0, 0, 0, 0]]
    runs = {
        name: {s: {**one_run(0), "matrices": records.packed(np.array([matrix]))} for s in "12"}
        for name, matrix in made.items()
    }
    split = {"classes": [*CLASSES, "sign"], "tail": [2, 3], "images": ["x"], "runs": runs}
    results = {"remedies": dict.fromkeys(made), "after": {}}
    text = page.section("dusk", {**split, "convention": "detectron2"}, results, "x.svg")
    assert "No image shows sign; by `detectron2`, such a class is in no mean." in text
    assert "| late | 2 | 60.1 (+2.0 ± 0.0) | 38.5 (+0.0 ± 0.0) |" in text and "| pole |" in text
    text = page.section("dusk", {**split, "convention": "nan_mean"}, results, "x.svg")
    assert "such a class counts as 0 where it is predicted" in text
    assert "| late | 2 | 45.1 (-13.0 ± 0.0) | 19.2 (-19.2 ± 0.0) |" in text


def one_run(hits: int) -> dict:
    matrix = np.array([[900, 50, 0], [30, 700, 0], [100 - hits, 0, hits]])
    return {"minutes": 1.0, "commit": "abc", "matrices": records.packed(matrix[None])}


def tail_of(run: dict) -> float:
    return head_and_tail(numbers.total_of(run["matrices"], 3), [2])["miou_tail"]


def test_scores_are_the_librarys():
    matrix = np.random.default_rng(4).integers(0, 50, (3, 3))
    for convention in ("nan_mean", "absent_zero", "detectron2"):
        expected = head_and_tail(matrix, [2], convention)
        split = {"tail": [2], "convention": convention}
        assert {key: numbers.score(matrix, split, key) for key in expected} == expected


def test_the_front_is_what_no_other_beats():
    """Against every pair of places."""
    places = [tuple(pair) for pair in np.random.default_rng(2).integers(0, 30, (40, 2)).tolist()]

    def beaten(place):
        return any(other != place and other[0] >= place[0] and other[1] >= place[1] for other in places)

    expected = {place for place in places if not beaten(place)}
    got = plot.front(places)
    assert set(got) == expected and len(got) == len(expected) > 1
    assert got == sorted(got, reverse=True)


def test_the_picture_of_the_strengths():
    """Each lies where its scores are, against the chosen strength of the baseline, and has the legend's number."""
    tried = {
        "base": {"low": (0.5, 0.2, 0.7), "high": (0.6, 0.3, 0.8)},
        "good": {"weak": (0.6, 0.35, 0.79), "<strong>": (0.6, 0.4, 0.7)},
    }
    choices = {
        name: {
            "chosen": list(strengths)[-1],
            "tried": {
                strength: dict(zip(("miou", "miou_tail", "miou_head"), scores, strict=True))
                for strength, scores in strengths.items()
            },
        }
        for name, strengths in tried.items()
    }
    results = {"remedies": {"base": [], "good": []}, "choices": choices}
    curves = strengths.curves_of(results)
    assert curves["base"]["high"] == (0, 0)
    assert curves["good"]["<strong>"] == pytest.approx((-10, 10))

    drawn = ElementTree.fromstring(plot.plot_strengths(curves))
    dots = [(float(c.get("cx")), float(c.get("cy"))) for c in drawn.iter("{http://www.w3.org/2000/svg}circle")]
    low, high, weak, strong = dots
    assert strong[0] == pytest.approx(low[0], abs=0.11) and low[0] < weak[0] < high[0]
    assert strong[1] < weak[1] < high[1] < low[1]
    words = [text.text for text in drawn.iter("{http://www.w3.org/2000/svg}text")]
    assert {"1  weak", "2  <strong>"} <= set(words) and words.count("2") == 2

    choices["good"]["tried"]["weak"]["miou_tail"] = float("-inf")  # images without a class of the tail
    assert strengths.curves_of(results) == {}
    del choices["good"]["tried"]["weak"]["miou_head"]  # a file of choices that was made before
    assert strengths.curves_of(results) == {}


def test_the_plans_of_the_project():
    """Four strengths a remedy, seeds that did not choose, configs that load; the page is what the results say."""
    for path in sorted((ROOT / "scripts" / "evidence_plans").glob("*.yaml")):
        plan = typed(evidence.Plan, read_tree(path), path.name)
        plan = replace(plan, seeds=plan.seeds[:1])  # the others differ in their number
        assert {len(tried) for tried in plan.remedies.values()} in ({4}, {1}), "tuned alike, or not at all"
        runs = evidence.runs_of(plan.tuning()) if plan.tuned() else []
        choices = {name: {"chosen": next(iter(tried))} for name, tried in plan.remedies.items()}
        runs += [run for jobs in plan.finals(choices).values() for run in evidence.runs_of(jobs)]
        for run in runs:
            config = next(word for word in run.command if word.endswith((".yaml", ".json")) and "=" not in word)
            load_config(run.cwd / config, [word for word in run.command if "=" in word])

        results = ROOT / plan.results
        known = json.loads(results.read_text()) if results.is_file() else None
        file = f"scripts/evidence_plans/{path.name}"
        assert (ROOT / plan.page).read_text() == page.page_of(known, file, plan.title)
        for name, picture in page.pictures(known, file).items() if known else ():
            assert ((ROOT / plan.page).parent / name).read_text() == picture
        if known:
            readme = (ROOT / "README.md").read_text()
            table = summary.summary(known, next(iter(known["splits"])))
            assert summary.renewed(readme, file, table) == readme


def test_the_table_of_the_readme():
    """A line a remedy and the best strength after training, by their tails; bold what Holm's p decides."""
    made = {"baseline": (90, 40), "late": (80, 60), "bad": (90, 30), "free t_1": (90, 50), "free t_2": (20, 52)}
    jitter = {"late": [0, 0, 1], "bad": [0, 1, 0], "free t_1": [0, 0, 0], "free t_2": [0, 0, 0]}
    runs = {
        name: {str(s): grass_tree_pole(tree, pole + jitter.get(name, [0, 0, 0])[s]) for s in range(3)}
        for name, (tree, pole) in made.items()
    }
    split = {"classes": CLASSES, "tail": [2], "convention": "nan_mean", "images": ["x"], "runs": runs}
    remedies = {"baseline": [], "late": [], "bad": []}
    results = {"remedies": remedies, "after": {"free": {"of": "baseline"}}, "splits": {"s": split}}
    rows = [line.split(" | ") for line in summary.summary(results, "s").splitlines()[2:]]
    assert [row[0] for row in rows] == ["| late", "| free t_1", "| bad"]
    assert rows[0][1:3] == ["3", "**+20.3 ± 1.4**"]
    assert rows[0][4:] == ["**+10.3 ± 1.4**", "**+8.3 ± 1.4** |"], "against t_1, which keeps the head, and t_2"
    # the head gains where fewer poles are taken for its first class
    assert rows[1][2:] == ["**+10.0 ± 0.0**", "**+0.4 ± 0.0**", "free", " |"]
    assert rows[2][2].startswith("**-9.7")


def test_one_comparison_has_one_verdict():
    """Where nothing that is free is better than the network itself, that comparison is not tested once more."""
    hits = {"baseline": (40, 41, 42), "late": (44, 46, 46), "then t_1": (30, 31, 31), "late, then t_1": (43, 45, 45)}
    runs = {name: {str(s): one_run(hit) for s, hit in enumerate(some)} for name, some in hits.items()}
    split = {"classes": CLASSES, "tail": [2], "convention": "nan_mean", "images": ["x"], "runs": runs}
    after = {"then": "baseline", "late, then": "late"}
    lines = page.against_free(split, ["baseline", "late"], after)
    same = "- **late**: baseline itself is the best of them; the comparison is above."
    assert lines.count(same) == 2, "head alike, and whatever its head"
    test = stats.ttest_rel([tail_of(run) for run in runs["late, then t_1"].values()],
                           [tail_of(run) for run in runs["baseline"].values()])  # fmt: skip
    word = "better" if test.pvalue < 0.05 else "not told apart"
    row = next(line for line in lines if line.startswith("- **late, then t_1** against baseline: mIoU(tail)"))
    assert row.endswith(f"{word}."), "a family of one: it is told nowhere else"
    others = page.against_free_in_others({**split, "runs": runs}, {"late": "baseline"}, after)
    assert same in others


def test_the_readme_keeps_what_is_not_the_table():
    begin = summary.BEGIN.format(plan="a.yaml")
    text = f"before\n{begin}\nold\n{summary.END}\nafter"
    new = summary.renewed(text, "a.yaml", "new")
    assert new == f"before\n{begin}\n\nnew\n\n{summary.END}\nafter"
    assert summary.renewed(new, "a.yaml", "new") == new
    assert summary.renewed(text, "b.yaml", "new") == text
    with pytest.raises(ValueError, match="no '<!-- end: what helps -->' after"):
        summary.renewed(text.replace(summary.END, ""), "a.yaml", "new")


def test_differences_that_are_undefined_have_no_number_of_pairs():
    """Of a score that one of the runs does not define."""
    undefined = of_differences([0.1, float("nan")])
    compared = {"b": (undefined, None), "c": (of_differences([0.1, 0.3]), 0.3)}
    table = page.pairs_table(compared)
    assert "| c | 2 |" in table and "| b |" not in table
    assert page.pairs_table({"b": compared["b"]}) == ""
    assert Change(undefined, None).word == "undefined"
