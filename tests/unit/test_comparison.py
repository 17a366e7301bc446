"""Statistics of paired runs against scipy's tests, a bootstrap, a simulation and hand-worked cases."""

import math

import numpy as np
import pytest
from scipy import stats

from common.comparison import (
    head_and_tail,
    holm,
    of_differences,
    paired,
    paired_by_seed,
    pairs_needed,
    power,
    verdict,
)
from common.metrics import precision_and_recall as rates


@pytest.mark.parametrize("n", [2, 5, 16])
def test_paired_differences_are_scipys(n):
    draw = np.random.default_rng(n)
    a, b = draw.normal(0.6, 0.02, n), draw.normal(0.58, 0.02, n)
    ours, theirs = paired(a, b), stats.ttest_rel(a, b)
    assert ours.p == pytest.approx(theirs.pvalue) and ours.n == n and ours.mean == pytest.approx((a - b).mean())
    assert ours.interval == pytest.approx(tuple(theirs.confidence_interval(0.95)))


def test_the_interval_is_that_of_a_bootstrap():
    """Of many pairs, where the percentile bootstrap holds too; every resample drawn."""
    draw = np.random.default_rng(0)
    values = draw.normal(1.0, 2.0, 400)
    means = values[draw.integers(0, 400, (10000, 400))].mean(1)
    low, high = np.percentile(means, [2.5, 97.5])
    assert of_differences(values).interval == pytest.approx((low, high), abs=0.02)


def test_few_pairs():
    one = paired([0.7], [0.6])
    assert one.n == 1 and one.interval is None and one.p is None and "one pair" in verdict(one, None)
    same = paired([0.5, 0.6], [0.4, 0.5])
    assert same.half_width == pytest.approx(0, abs=1e-12) and same.p < 1e-6
    assert paired([0.5, 0.5], [0.5, 0.5]).p == 1.0
    for pair in (([], []), ([1.0], [1.0, 2.0])):
        with pytest.raises(ValueError, match="cannot be paired"):
            paired(*pair)


def test_holm_is_the_step_down_rule():
    """By definition: the i-th smallest times the number that are left, never falling, at most 1."""
    assert holm({"a": 0.01, "b": 0.04, "c": 0.03, "d": None}) == {
        "a": pytest.approx(0.03), "b": pytest.approx(0.06), "c": pytest.approx(0.06), "d": None,
    }  # fmt: skip
    assert holm({"a": 0.6, "b": 0.9}) == {"a": 1.0, "b": 1.0} and holm({}) == {}


def test_tests_that_are_planned_count_before_they_are_run():
    """As if their p were 1: what is said of some of them is said of all."""
    some = {"a": 0.02, "b": 0.03}
    assert holm(some, 2) == holm(some) == {"a": pytest.approx(0.04), "b": pytest.approx(0.04)}
    assert holm(some, 4) == {key: holm({**some, "c": 1.0, "d": 1.0})[key] for key in some}
    assert holm(some, 1) == holm(some) and holm({}, 3) == {}

    values = {"base": {0: 0.5, 1: 0.6, 2: 0.5}, "new": {0: 0.7, 1: 0.81, 2: 0.7}}
    alone, of_three = paired_by_seed(values, "base"), paired_by_seed(values, "base", 3)
    assert of_three["new"][1] == pytest.approx(3 * alone["new"][1])


def test_what_is_undefined_has_no_p_and_does_not_count():
    """A score that no image defines is NaN, and so is its p: the others are a family without it, whatever its name."""
    others = holm({"b": 0.01, "c": 0.04})
    for name in ("a", "z"):
        assert holm({name: float("nan"), "b": 0.01, "c": 0.04}) == {**others, name: None}

    scores = {"base": [0.5, 0.6, 0.5], "late": [0.7, 0.81, 0.7], "none": [0.5, math.nan, 0.5]}
    found = paired_by_seed({name: dict(enumerate(values)) for name, values in scores.items()}, "base")
    assert found["late"][1] == pytest.approx(stats.ttest_rel(scores["late"], scores["base"]).pvalue)
    assert verdict(*found["none"]) == "–, undefined in a run of 3 pairs"


def test_holm_keeps_the_error_of_a_family():
    """Of 5 true null hypotheses, one or more are rejected in 5 % of the families at most."""
    draw = np.random.default_rng(1)
    families = draw.uniform(size=(2000, 5))
    wrong = [min(holm(dict(enumerate(map(float, family)))).values()) < 0.05 for family in families]
    assert abs(np.mean(wrong) - 0.05) < 0.015


def test_power_by_simulation():
    draw = np.random.default_rng(2)
    samples = draw.normal(1.0, 1.25, (4000, 15))
    found = np.mean(stats.ttest_1samp(samples, 0, axis=1).pvalue < 0.05)
    assert power(15, 1.25, 1.0) == pytest.approx(found, abs=0.02)


def test_power_is_that_of_the_noncentral_t():
    """Where SciPy's gives a number; where it gives none, as for 2 pairs and a large effect, the power still does."""
    for pairs in (2, 3, 8, 40):
        critical = stats.t.ppf(0.975, pairs - 1)
        for effect in (0.1, 0.5, 1.0, 2.0, 3.0):
            shift = effect * np.sqrt(pairs)
            expected = stats.nct.sf(critical, pairs - 1, shift) + stats.nct.cdf(-critical, pairs - 1, shift)
            if np.isfinite(expected):
                assert power(pairs, 1.0, effect) == pytest.approx(expected, abs=1e-5)

    chances = [power(2, 1.0, effect) for effect in np.linspace(0.5, 40, 200)]
    assert np.isfinite(chances).all() and (np.diff(chances) > 0).all() and chances[-1] > 0.99
    assert [pairs_needed(0.35, effect) for effect in (2, 3, 5)] == [3, 3, 2]


def test_pairs_needed():
    """The least n whose power is enough, for spreads between a quarter of a point and 3.7 points."""
    spreads = [0.25, 0.5, 0.8, 1.0, 1.25, 1.5, 2.0, 2.6, 3.7]
    assert [pairs_needed(s, 1.0) for s in spreads] == [3, 5, 8, 10, 15, 20, 34, 56, 110]
    assert pairs_needed(2.6, 2.0) == 16 and power(16, 2.6, 2.0) >= 0.8 > power(15, 2.6, 2.0)
    with pytest.raises(ValueError, match="above 0"):
        pairs_needed(0, 1)


def test_head_and_tail():
    matrix = np.array([[6, 2, 0], [0, 4, 0], [1, 0, 3]])
    iou = [6 / 9, 4 / 6, 3 / 4]
    got = head_and_tail(matrix, tail=[2])
    assert got["miou_tail"] == iou[2] and got["miou_head"] == pytest.approx((iou[0] + iou[1]) / 2)
    assert got["miou"] == pytest.approx(sum(iou) / 3) and math.isnan(head_and_tail(matrix, tail=[])["miou_tail"])

    precision, recall, ratio = rates(matrix)
    assert precision == pytest.approx([6 / 7, 4 / 6, 1]) and recall == pytest.approx([6 / 8, 1, 3 / 4])
    assert ratio == pytest.approx([7 / 8, 6 / 4, 3 / 4])


def test_words():
    clear = paired([0.50, 0.52, 0.54], [0.40, 0.41, 0.45])
    assert verdict(clear, 0.01).endswith("over 3 pairs: better") and verdict(clear, 0.2).endswith("not told apart")
    assert verdict(paired([0.40, 0.41, 0.45], [0.50, 0.52, 0.54]), 0.01).endswith("worse")
