"""Splits put together: the folds of a cross-validation, which test each image once."""

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from common.comparison import Difference, bootstrap, holm, number, of_differences
from scripts.study.numbers import compare, decided, matrices_of

TOLD = {"miou": "mIoU", "miou_tail": "mIoU(tail)", "miou_head": "mIoU(head)"}
BLOCKS_HEAD = (
    "Other scenes: the same networks on resampled blocks of neighbouring frames, {blocks} of them, seeds together; ± "
    "is half of a 95 % interval, **bold** where Holm's p over a column is below 0.05:\n"
)
FOLDS_HEAD = (
    "Change of mIoU(tail), fold by fold, and the mean over folds; its ± is by Student's t, with a variance that allows "
    "for the training images that folds share (Nadeau and Bengio, 2003):\n"
)


def read_blocks(path: Path) -> dict[str, int]:
    """Image → block, of what scripts/prepare_folds.py writes. ValueError where it is no such file."""
    try:
        with path.open(newline="", encoding="utf-8") as file:
            return {row["image"]: int(row["block"]) for row in csv.DictReader(file)}
    except OSError as error:
        raise ValueError(f"{path}: cannot read the blocks ({error.strerror})") from error
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: has no columns image and block with numbers, as prepare_folds.py writes") from error


def pool_of(splits: Mapping[str, Any], names: Sequence[str], blocks: Mapping[str, int]) -> dict[str, Any]:
    """What the file of results holds of a pool: its splits, and the block of every image of those that are done.

    ValueError for an image without a block, or in two splits.
    """
    seen: dict[str, str] = {}
    for name in names:
        for image in splits.get(name, {"images": []})["images"]:
            if image not in blocks:
                raise ValueError(f"{name}: no block of the pool has the image {image}; make its folds anew")
            if image in seen:
                raise ValueError(f"{name}: the image {image} is one of {seen[image]} too, and would count twice")
            seen[image] = name

    return {"splits": list(names), "blocks": {image: blocks[image] for image in seen}}


def pooled(splits: Mapping[str, Any], pool: Mapping[str, Any]) -> dict[str, Any]:
    """The splits of a pool as one, with the runs of those names and seeds that all of them have."""
    parts = [splits[name] for name in pool["splits"]]
    first = parts[0]
    runs: dict[str, dict[str, Any]] = {}
    for name, seeds in first["runs"].items():
        for seed, run in seeds.items():
            found = [part["runs"].get(name, {}).get(seed) for part in parts]
            if all(found):
                matrices = [image for one in found for image in one["matrices"]]
                runs.setdefault(name, {})[seed] = {**run, "matrices": matrices, "further": {}}

    images = [image for part in parts for image in part["images"]]
    kept = {key: first[key] for key in ("classes", "tail", "convention")}
    return {**kept, "images": images, "runs": runs, "starts": {}}


def absent(splits: Mapping[str, Any], pool: Mapping[str, Any]) -> list[str]:
    """The splits of a pool of which nothing is done."""
    return [name for name in pool["splits"] if name not in splits]


def told_splits(results: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """What has a section with numbers: the splits that are of no pool, and the pools whose splits are all begun."""
    splits, pools = results["splits"], results.get("pools", {})
    folds = {split for pool in pools.values() for split in pool["splits"]}
    whole = {name: pooled(splits, pool) for name, pool in pools.items() if not absent(splits, pool)}
    return {name: split for name, split in splits.items() if name not in folds} | whole


def unfinished(results: Mapping[str, Any]) -> dict[str, list[str]]:
    """Of each pool that has no section the splits of which nothing is done."""
    found = {name: absent(results["splits"], pool) for name, pool in results.get("pools", {}).items()}
    return {name: missing for name, missing in found.items() if missing}


def blocks_table(split: Mapping[str, Any], pool: Mapping[str, Any], remedies: Sequence[str]) -> list[str]:
    """What other scenes might say of each remedy: its changes over resampled blocks.

    split: what `pooled` gives.
    """
    found = block_differences(split, pool, remedies)
    if not found:
        return []

    adjusted = {key: holm({name: changes[key].p for name, changes in found.items()}, len(remedies) - 1) for key in TOLD}
    lines = [BLOCKS_HEAD.format(blocks=len(set(pool["blocks"].values())))]
    lines += ["| | seeds | " + " | ".join(TOLD.values()) + " |", "|---" * (len(TOLD) + 2) + "|"]
    for name, changes in found.items():
        seeds = len(set(split["runs"][name]) & set(split["runs"][remedies[0]]))
        cells = [decided(changes[key], adjusted[key][name]) for key in TOLD]
        lines.append(f"| {name} | {seeds} | {' | '.join(cells)} |")

    return ["\n".join([*lines, ""])]


def block_differences(
    split: Mapping[str, Any], pool: Mapping[str, Any], remedies: Sequence[str]
) -> dict[str, dict[str, Difference]]:
    """Remedy → its differences to the baseline by score, the confusion matrices of their common seeds summed."""
    baseline, size = remedies[0], len(split["classes"])
    blocks = [pool["blocks"][image] for image in split["images"]]
    found = {}
    for name in remedies[1:]:
        seeds = sorted(set(split["runs"].get(name, {})) & set(split["runs"][baseline]))
        if seeds:
            sides = [sum(_unpacked(split["runs"][side][seed], size) for seed in seeds) for side in (name, baseline)]
            found[name] = bootstrap(*sides, split["tail"], split["convention"], blocks=blocks)[0]

    return found


def _unpacked(run: Mapping[str, Any], size: int) -> np.ndarray:
    """The confusion matrices (N, K, K) of a recorded run."""
    matrices = np.zeros((len(run["matrices"]), size * size))
    for matrix, image in zip(matrices, run["matrices"], strict=True):
        matrix[image[0::2]] = image[1::2]

    return matrices.reshape(-1, size, size)


def folds_table(splits: Mapping[str, Any], pool: Mapping[str, Any], remedies: Sequence[str]) -> list[str]:
    """The change of mIoU(tail) in each of a pool's splits, and over all that have it."""
    names = pool["splits"]
    by_fold: dict[str, dict[str, float]] = {}
    for name in names:
        matrices = matrices_of(splits[name], [remedy for remedy in remedies if remedy in splits[name]["runs"]])
        for remedy, (difference, _) in compare(matrices, remedies[0], splits[name], "miou_tail").items():
            by_fold.setdefault(remedy, {})[name] = difference.mean
    whole = {remedy: changes for remedy, changes in by_fold.items() if len(changes) == len(names)}
    if not whole:
        return []

    means = {remedy: of_folds(list(changes.values())) for remedy, changes in whole.items()}
    adjusted = holm({remedy: difference.p for remedy, difference in means.items()})
    lines = [FOLDS_HEAD, f"| | {' | '.join(names)} | mean |", "|---" * (len(names) + 2) + "|"]
    for remedy, changes in whole.items():
        cells = [number(Difference(changes[name], 1)) for name in names]
        lines.append(f"| {remedy} | {' | '.join(cells)} | {decided(means[remedy], adjusted[remedy])} |")

    return ["\n".join([*lines, ""])]


def of_folds(values: Sequence[float]) -> Difference:
    """Mean, interval and test of the differences of all folds of a cross-validation.

    Any two training sets share most of their images, so that the variance of the mean is 1/k + 1/(k − 1) of that of a
    difference, where independent ones have 1/k: what is tested over what is trained on is 1/(k − 1).
    """
    k = len(values)
    return of_differences(values, shared=1 / (k - 1) if k > 1 else 0.0)
