"""Rare, common and frequent classes: the rule by rank, thresholds, lists, and when nothing is said."""

import dataclasses

import numpy as np
import pytest

from common.config import ConfigError
from common.data import DATASETS
from common.data.catalogue.folder import folder_row
from common.data.groups import by_rank, grouping, groups_config
from common.data.imbalance import groups
from common.data.statistics import Statistics
from common.evaluation import format_table, summarise
from common.metrics import group_scores

NAMES = ["a", "b", "c", "d", "e", "f"]
ROW = folder_row({"images": "x", "classes": NAMES})


def shown_in(*images, total=1000):
    """Statistics in which class k is shown by images[k] of `total` images, with one pixel of ten in each."""
    presence = np.arange(total)[:, None] < np.array(images)
    return Statistics(presence.astype(np.int64), np.full(total, 10) - presence.sum(1))


# By rank -----------------------------------------------------------------------------------------------------------


def test_absent_classes_take_no_part():
    counts = np.arange(1, 11)
    with_absent = np.insert(counts, [0, 5, 10], 0)
    rank = groups(with_absent)
    assert rank[with_absent == 0].tolist() == [-1, -1, -1]
    assert rank[with_absent > 0].tolist() == groups(counts).tolist()
    assert groups(np.zeros(4, int)).tolist() == [-1] * 4


@pytest.mark.parametrize("images", [(90, 10), (90, 10, 5), (90, 50, 10, 5), (7, 7, 7, 7, 7, 7), (9, 0, 0, 0, 4, 0)])
def test_a_rule_that_has_nothing_to_say(images):
    """Of fewer than five classes the lowest fifth is none; of equal counts all are frequent."""
    assert by_rank(shown_in(*images)) is None


def test_the_rule_is_named():
    found = by_rank(shown_in(1, 2, 0, 4, 5, 6))
    assert found.levels["image"] == ["rare", "common", "absent", "frequent", "frequent", "frequent"]
    assert found.rule.startswith(
        "by rank among the 5 classes that occur in training (1 do not): the lowest fifth is rare"
    )
    assert set(found.levels) == {"image", "pixel"}


def test_published_groups_stay():
    for name in ("coco_stuff_lt_40k", "mhpv2_lt_7k", "ade20k_full"):
        row = DATASETS[name]
        found = grouping(None, row, None)
        assert found.levels is row.groups and "published" in found.rule
        assert "absent" not in row.groups["image"]


# By the config -----------------------------------------------------------------------------------------------------


def test_thresholds():
    config = groups_config({"rare": 10, "common": 100}, ROW)
    found = grouping(config, ROW, shown_in(0, 1, 10, 11, 100, 101))
    assert found.levels == {"image": ["absent", "rare", "rare", "common", "common", "frequent"]}
    assert found.rule == "at most 10 training images is rare, at most 100 common (data.groups)"

    config = groups_config({"rare": 0.5, "level": "pixel"}, ROW)
    found = grouping(config, ROW, shown_in(4, 5, 6, 0, 0, 0))
    assert found.levels == {"pixel": ["rare", "rare", "frequent", "absent", "absent", "absent"]}
    assert grouping(config, ROW, None) is None  # nothing was counted


def test_lists():
    config = groups_config({"rare": ["b"], "common": ["f", "a"]}, ROW)
    found = grouping(config, ROW, None)
    assert found.levels == {"listed": ["common", "rare", "frequent", "frequent", "frequent", "common"]}
    published = DATASETS["coco_stuff_lt_40k"]
    names = list(published.classes)
    config = groups_config({"rare": names[:3], "frequent": names[3:]}, published)
    assert grouping(config, published, None).levels["listed"][:4] == ["rare"] * 3 + ["frequent"]


@pytest.mark.parametrize("options, message", [
    ({}, r"data.groups: missing key 'rare'"),
    ({"rare": ["g"]}, r"data.groups.rare: 'g' is none of the classes"),
    ({"rare": ["a"], "common": ["b", "a"]}, r"data.groups.common: 'a' is in rare too; a class has one group"),
    ({"rare": ["a"], "frequent": ["b", "c", "d"]}, r"data.groups: 'e' is in no list; add it, or leave `frequent` out"),
    ({"rare": 10, "common": ["a"]}, r"data.groups.common: is of another kind than rare"),
    ({"rare": 10, "common": 5}, r"data.groups.common: 5 is less than rare: 10"),
    ({"rare": 10, "frequent": ["a"]}, r"data.groups.frequent: is what has more than `common`"),
    ({"rare": "a"}, r"data.groups.rare: expected"),
])  # fmt: skip
def test_groups_that_contradict_themselves(options, message):
    with pytest.raises(ConfigError, match=message):
        groups_config(options, ROW)


# In results --------------------------------------------------------------------------------------------------------


def test_absent_classes_are_in_no_mean():
    matrix = np.diag([10, 10, 10, 10, 10, 10])
    matrix[5] = [0, 0, 0, 0, 10, 0]
    names = ["rare", "common", "absent", "frequent", "frequent", "absent"]
    got = group_scores(matrix, {"image": names}, "nan_mean")["image"]
    assert got == {"rare": 1.0, "common": 1.0, "frequent": 0.75}
    with pytest.raises(ValueError, match="'often' is not one of rare, common, frequent, absent"):
        group_scores(matrix, {"image": ["often"] * 6}, "nan_mean")


def test_the_table_names_the_rule():
    result = summarise(np.diag([1, 2, 3, 4, 5, 6]), dataclasses.replace(ROW), "nan_mean", {"image": ["rare"] * 6})
    text = format_table({**result, "images": 1, "group_rule": "by some rule"})
    assert "\ngroups: by some rule\n" in text
    without = summarise(np.eye(6, dtype=int), ROW, "nan_mean", None)
    assert "groups" not in format_table({**without, "images": 1})
