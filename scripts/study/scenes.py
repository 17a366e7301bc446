"""A split told apart: whether what a remedy does to the tail holds in every scene, and in every part of a clip."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from common.comparison import Difference, holm, number, of_differences, paired_by_seed
from common.metrics import Convention
from scripts.study.numbers import decided, percent, score, total_of

SHOWN: Convention = "detectron2"  # a class that a part does not show is in no mean of it
BLOCKS = (
    "Scene by scene, each a block of neighbouring frames named by the first of them, seeds together: mIoU(tail) of "
    "{baseline}, and what it changes by. A class that a scene does not show is in no mean of it. The ± of the last "
    "column is by Student's t over scenes, and speaks of others like them for networks of these seeds, too surely "
    "where scenes of one drive are alike; **bold** where Holm's p over all remedies of the table, run or not, is below "
    "0.05:\n"
)
PIECES = (
    "The {parts} consecutive parts of the clip, named by their first frames, seeds together: mIoU(tail) of {baseline}, "
    "and what it changes by. A class that a part does not show is in no mean of it. They are of one scene, so nothing "
    "here speaks of another:\n"
)


def pieces_of(images: Sequence[str], pieces: int) -> list[list[str]]:
    """Consecutive parts of about the same number of images. ValueError for fewer images than parts."""
    if len(images) < pieces:
        raise ValueError(f"{len(images)} images cannot make {pieces} pieces")
    return [part.tolist() for part in np.array_split(np.array(images), pieces)]


def blocks_of(images: Sequence[str], blocks: Mapping[str, int]) -> list[list[str]]:
    """The images of each block, in the order of their first images. ValueError for an image of none, or one block."""
    found: dict[int, list[str]] = {}
    for image in images:
        if image not in blocks:
            raise ValueError(f"no block has the image {image}; make the folds anew")
        found.setdefault(blocks[image], []).append(image)

    if len(found) == 1:
        raise ValueError("all images are of one block, which is no scene among others; take `pieces`")
    return list(found.values())


def scenes_table(split: Mapping[str, Any], scenes: Mapping[str, Any], remedies: Sequence[str]) -> list[str]:
    """mIoU(tail) of the first of `remedies` in every part, and its change by the others; over scenes the mean change.

    scenes: `of`, blocks or pieces, and `parts`, the images of each.
    """
    baseline = remedies[0]
    columns = [_tails({**split, "convention": SHOWN}, part, remedies) for part in scenes["parts"]]
    changes = [paired_by_seed(column, baseline) for column in columns]
    told = [name for name in remedies[1:] if name in changes[0]]
    if not told:
        return []

    over = {name: _over_scenes([part[name][0].mean for part in changes]) for name in told}
    adjusted = holm({name: difference.p for name, difference in over.items()}, len(remedies) - 1)
    by_scene = scenes["of"] == "blocks"
    heads = [f"{part[0]} ({len(part)})" for part in scenes["parts"]] + ["mean change"] * by_scene
    levels = [percent(float(np.mean(list(column[baseline].values())))) for column in columns]

    lines = [(BLOCKS if by_scene else PIECES).format(baseline=baseline, parts=len(columns))]
    lines += [f"| | {' | '.join(heads)} |", "|---" * (len(heads) + 1) + "|"]
    lines.append(f"| {baseline} | {' | '.join([*levels, *[''] * by_scene])} |")
    for name in told:
        cells = [number(Difference(part[name][0].mean, 1)) for part in changes]
        cells += [decided(over[name], adjusted[name])] * by_scene
        lines.append(f"| {name} | {' | '.join(cells)} |")

    return ["\n".join([*lines, ""])]


def _over_scenes(values: Sequence[float]) -> Difference:
    """Of the scenes that show a class of the tail."""
    defined = [value for value in values if math.isfinite(value)]
    return of_differences(defined) if defined else Difference(math.nan, 0)


def _tails(split: Mapping[str, Any], part: Sequence[str], remedies: Sequence[str]) -> dict[str, dict[str, float]]:
    """Remedy → seed → mIoU(tail) of the images of one part."""
    place = {image: i for i, image in enumerate(split["images"])}
    rows = [place[image] for image in part]
    size = len(split["classes"])
    return {
        name: {
            seed: score(total_of([run["matrices"][row] for row in rows], size), split, "miou_tail")
            for seed, run in split["runs"][name].items()
        }
        for name in remedies
        if name in split["runs"]
    }
