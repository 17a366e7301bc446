"""Rare, common and frequent classes: by what rule, and at which levels of counting."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from common.config import ConfigError, typed
from common.data.catalogue.row import DatasetRow
from common.data.imbalance import ABSENT, FEWEST_CLASSES, GROUPS, groups
from common.data.statistics import Statistics

WHERE = "data.groups"  # how errors name the section


@dataclass(frozen=True)
class Grouping:
    """The groups of a data set's classes.

    rule: what decides, in words. levels: level of counting ("image", "pixel", or "listed") → each class's group (K,),
    one of GROUPS, or ABSENT where the training set does not show it.
    """

    rule: str
    levels: Mapping[str, Sequence[str]]


@dataclass(frozen=True)
class GroupsConfig:
    """The `groups` section: numbers, or lists of class names.

    rare, common: the highest count of a rare, of a common class (None: as `rare`, so that none is common); what has
    more is frequent. Or their names; classes that are in no list are frequent. frequent: only with lists, for which
    every class is then named. level: what numbers count, images that show the class, or summed shares of the images.
    """

    rare: float | tuple[str, ...]
    common: float | tuple[str, ...] | None = None
    frequent: tuple[str, ...] | None = None
    level: Literal["image", "pixel"] = "image"

    def __post_init__(self):
        lists = isinstance(self.rare, tuple)
        if self.common is not None and isinstance(self.common, tuple) != lists:
            raise ValueError(
                "common: is of another kind than rare; give two numbers or two lists of classes"
            )
        if lists:
            return

        if self.frequent is not None:
            raise ValueError(
                "frequent: is what has more than `common`; leave it out, or give lists of classes"
            )
        if self.common is not None and not 0 <= self.rare <= self.common:
            raise ValueError(f"common: {self.common:g} is less than rare: {self.rare:g}")


def groups_config(options: Mapping[str, Any] | None, row: DatasetRow) -> GroupsConfig | None:
    """The typed `groups` section. ConfigError also for names that are none of the row's classes."""
    if options is None:
        return None

    config = typed(GroupsConfig, options, WHERE)
    if isinstance(config.rare, tuple):
        _listed(config, row)

    return config


def grouping(
    config: GroupsConfig | None, row: DatasetRow, statistics: Statistics | None
) -> Grouping | None:
    """The groups that the config gives, else the row's published ones, else those of the counted labels by rank.

    None where nothing says what is rare: no counts, or a rule that does not tell these classes apart.
    """
    if config is not None and isinstance(config.rare, tuple):
        return Grouping(f"as listed in {WHERE}", {"listed": _listed(config, row)})
    if config is not None:
        return None if statistics is None else _by_threshold(config, statistics)
    if row.groups is not None:
        return Grouping("by training counts, as published with the data set (LTSS)", row.groups)

    return None if statistics is None else by_rank(statistics)


def by_rank(statistics: Statistics) -> Grouping | None:
    """The groups of the LTSS benchmark's rule (see `groups`), at the levels at which it tells classes apart."""
    ranks = {level: groups(statistics.count(level)) for level in ("image", "pixel")}
    levels = {level: named(rank) for level, rank in ranks.items() if tells_apart(rank)}
    if not levels:
        return None

    occurring = int((statistics.image_count > 0).sum())
    absent = len(statistics.image_count) - occurring
    missing = f" ({absent} do not)" if absent else ""
    rule = f"by rank among the {occurring} classes that occur in training{missing}: the lowest fifth is rare, the next"

    return Grouping(f"{rule} common (LTSS)", levels)


def tells_apart(rank: np.ndarray) -> bool:
    """Whether a ranking says anything: of few classes none can be rare, of equal counts all are frequent."""
    occurring = rank[rank >= 0]
    return len(occurring) >= FEWEST_CLASSES and len(np.unique(occurring)) > 1


def named(rank: np.ndarray) -> list[str]:
    """The group names of what `groups` returns."""
    return [ABSENT if k < 0 else GROUPS[k] for k in rank]


def _by_threshold(config: GroupsConfig, statistics: Statistics) -> Grouping:
    counts = statistics.count(config.level)
    common = config.rare if config.common is None else config.common
    rank = np.searchsorted([config.rare, common], counts, side="left")
    rank[counts == 0] = -1

    unit = "training images" if config.level == "image" else "images' areas"
    rule = f"at most {config.rare:g} {unit} is rare, at most {common:g} common ({WHERE})"

    return Grouping(rule, {config.level: named(rank)})


def _listed(config: GroupsConfig, row: DatasetRow) -> list[str]:
    """Each class's group by the lists. ConfigError for a name that is no class, is in two lists, or is missing."""
    group_of: dict[str, str] = {}
    for group in GROUPS:
        for name in getattr(config, group) or ():
            if name not in row.classes:
                raise ConfigError(
                    f"{WHERE}.{group}: {name!r} is none of the classes of data set {row.name!r}"
                )
            if group_of.setdefault(name, group) != group:
                raise ConfigError(
                    f"{WHERE}.{group}: {name!r} is in {group_of[name]} too; a class has one group"
                )

    left = [name for name in row.classes if name not in group_of]
    if left and config.frequent is not None:
        raise ConfigError(
            f"{WHERE}: {left[0]!r} is in no list; add it, or leave `frequent` out: it takes all others"
        )

    return [group_of.get(name, "frequent") for name in row.classes]
