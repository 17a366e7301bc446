"""The page of scripts/evidence.py: what its file of results says, in tables and sentences."""

import math
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from common.comparison import LEVEL, Difference, holm, number, of_differences, pairs_needed, verdict
from common.metrics import precision_and_recall
from scripts.study import plot
from scripts.study.further import further_tables
from scripts.study.numbers import (
    HEAD_ALLOWED,
    Compared,
    best_free,
    between,
    changed,
    changes_of,
    compare,
    matrices_of,
    of_curve,
    percent,
    score,
    unpaired,
)
from scripts.study.pools import blocks_table, folds_table, told_splits, unfinished
from scripts.study.scenes import scenes_table
from scripts.study.strengths import STRENGTHS, curves_of, strengths

SCORES = {"miou": "mIoU", "miou_tail": "mIoU(tail)", "miou_head": "mIoU(head)", "macc": "mean accuracy"}
EFFECTS = (2, 3, 5)  # points of mIoU(tail)
HEAD = """# {title}

Made by `python scripts/evidence.py page {plan}` from the results of its other steps; nothing here is written by hand.
Differences are taken seed by seed, over the seeds that a row shares with what it is held against; means are of all
seeds of a row. The last checkpoint counts. In percent; ± is half of a 95 % interval by Student's t over seeds; "better"
and "worse" are said where Holm's p over all remedies that a table is to have, run or not, is below 0.05. Such intervals
speak of other seeds on the same images, of other scenes only where a table says so.
"""
FREE_HEAD = (
    "Against what is free: of the baseline and all strengths of changes in it (below), the one with the highest "
    "mIoU(tail) whose mIoU(head) is at most half a point below the remedy's, on the same seeds. It is picked on these "
    "images, in its favour."
)
STARTS_HEAD = "Where they begin (bold), and how far each goes from there, seed by seed:\n"
ABSENT = {  # convention of common/metrics.py → what a class without a true pixel does to means
    "nan_mean": "such a class counts as 0 where it is predicted, and not at all where it is not",
    "absent_zero": "such a class counts as 0",
    "ltss": "such a class counts as 0 where it is predicted, and not at all where it is not",
    "detectron2": "such a class is in no mean",
}
AGAINST_HEAD = "Against each other, Holm's p over these pairs:\n"
TRUNK_HEAD = (
    "Against {trunk} to its own end ({seeds} seeds: {means}), from which a row differs by its settings and nothing "
    "else; Holm's p over these pairs:\n"
)
FREE_IN_OTHERS_HEAD = (
    "Against what is free in the networks that a remedy is held against: of them and all strengths of changes in them, "
    "the one with the highest mIoU(tail), its mIoU(head) and its choice as above."
)
FREE_AT_ANY_COST = "The same against the highest mIoU(tail) that is free, whatever it costs of the head:\n"
NOTHING_FREE = "nothing that is free comes within half a point of its mean mIoU(head) on the same seeds."
NOT_YET = "## Split {name}\n\nNo run is done of {splits}, so its splits are not put together yet.\n"
NOTHING = "\n**Nothing has been run yet**: there is no file of results, hence no numbers.\n"


def page_of(results: Mapping[str, Any] | None, plan: str, title: str) -> str:
    """Markdown. results: what the step `collect` has left; None: nothing. plan: the file of the comparison."""
    head = HEAD.format(title=title, plan=plan)
    if results is None:
        return head + NOTHING

    parts = [head, protocol(results), strengths(results, picture_of(plan, STRENGTHS))]
    pools = results.get("pools", {})
    for name, split in told_splits(results).items():
        parts.append(section(name, split, results, picture_of(plan, name)))
        if name in pools:
            parts += pool_tables(split, pools[name], results)
    parts += [NOT_YET.format(name=name, splits=", ".join(missing)) for name, missing in unfinished(results).items()]

    return "\n".join(parts)


def picture_of(plan: str, split: str) -> str:
    """Where the plot of a split lies, seen from the page."""
    return f"images/evidence_{Path(plan).stem}_{split}.svg"


def pictures(results: Mapping[str, Any], plan: str) -> dict[str, str]:
    """File, seen from the page → SVG, of each split with something to compare, and of the strengths that were tried."""
    found = {}
    for name, split in told_splits(results).items():
        changes = changes_of(split, list(results["remedies"]), list(results["after"]))
        if changes is not None:
            found[picture_of(plan, name)] = plot.plot(*changes, changed(results))

    if tried := curves_of(results):
        found[picture_of(plan, STRENGTHS)] = plot.plot_strengths(tried)

    return found


def pool_tables(split: Mapping[str, Any], pool: Mapping[str, Any], results: Mapping[str, Any]) -> list[str]:
    """What only splits that were put together can say. split: they as one."""
    remedies = list(results["remedies"])
    if remedies[0] not in split["runs"]:
        return []
    return [*blocks_table(split, pool, remedies), *folds_table(results["splits"], pool, remedies)]


def protocol(results: Mapping[str, Any]) -> str:
    """What was trained, from when on, and where."""
    settings = " ".join(results["settings"])
    lines = ["## Protocol", "", f"`{results['config']}` with `{settings}`."]
    if results["branch"] is not None:
        lines.append(
            f"Up to step {results['branch']} a seed's runs are one and the same, without any remedy; "
            "each remedy is in force from there on."
        )

    lines.append(f"Trained on {'; '.join(machines(results))}.")
    if results["note"]:
        lines += ["", results["note"]]

    return "\n".join([*lines, ""])


def machines(results: Mapping[str, Any]) -> list[str]:
    """Every machine that a run was trained on, in words."""
    found = {}
    for split in results["splits"].values():
        for seeds in split["runs"].values():
            for run in seeds.values():
                machine = run["machine"] or {}
                chip = machine.get("gpu") or f"{machine.get('threads')} thread(s) of {machine.get('processor')}"
                found[f"{chip}, torch {machine.get('torch')}, commit {run['commit']}"] = None

    return list(found)


def section(name: str, split: Mapping[str, Any], results: Mapping[str, Any], picture: str) -> str:
    """The tables of one split. Remedies without a pair with the baseline are named as such."""
    remedies, after = list(results["remedies"]), changed(results)
    baseline = remedies[0]
    head = f"## Split {name}: {len(split['images'])} images\n"
    if baseline not in split["runs"]:
        return f"{head}\nNo run of the baseline is done, so nothing can be compared.\n"

    matrices = matrices_of(split, remedies)
    compared = {key: compare(matrices, baseline, split, key, len(remedies) - 1) for key in SCORES}
    lines = [head]
    if changes_of(split, remedies, list(after)) is not None:
        lines.append(f"![Change of mIoU(tail) against change of mIoU(head), by remedy]({picture})\n")
    lines += absent_words(matrices[baseline], split)
    lines += [main_table(matrices, baseline, split, compared), tail_table(matrices, split)]
    if name in results.get("scenes", {}):
        lines += scenes_table(split, results["scenes"][name], remedies)
    lines += starts_table(split, results)
    lines += further_tables(split, remedies)
    lines += [pairs_table(compared["miou_tail"]), *words(compared, unpaired(matrices, baseline))]
    lines += against_others(split, results.get("against", {}))
    lines += against_trunk(split, results)
    absent = [name for name in remedies if name not in split["runs"]]
    if absent:
        lines.append(f"Not run yet: {', '.join(absent)}.\n")
    lines += against_free(split, remedies, after)
    lines += against_free_in_others(split, results.get("against", {}), after)
    for remedy, of in after.items():
        lines.append(after_training(remedy, of, split, baseline))

    return "\n".join([*lines, ""])


def absent_words(matrices: Mapping[str, np.ndarray], split: Mapping[str, Any]) -> list[str]:
    """Which classes no image shows, and what that does to the scores; nothing where all are shown."""
    pixels = next(iter(matrices.values())).sum(1)
    absent = [name for name, count in zip(split["classes"], pixels, strict=True) if not count]
    if not absent:
        return []
    return [f"No image shows {', '.join(absent)}; by `{split['convention']}`, {ABSENT[split['convention']]}.\n"]


def pairs_table(compared: Compared) -> str:
    """How far the differences spread, and how many pairs would find an effect of a given size."""
    every = {name: difference.sd for name, (difference, _) in compared.items()}
    spread = {name: sd for name, sd in every.items() if sd and math.isfinite(sd)}
    if not spread:
        return ""

    head = (
        "Standard deviation of the paired differences of mIoU(tail), and how many pairs find a true difference of so "
        f"many points with a chance of 80 % at a level of {100 * (1 - LEVEL):.0f} % (of one test; the deviation is "
        "itself a guess from few pairs):\n"
    )
    lines = [head, "| | pairs | deviation | " + " | ".join(f"{points} points" for points in EFFECTS) + " |"]
    lines.append("|---" * (len(EFFECTS) + 3) + "|")
    for name, sd in spread.items():
        needed = [str(pairs_needed(100 * sd, points)) for points in EFFECTS]
        lines.append(f"| {name} | {compared[name][0].n} | {100 * sd:.1f} | {' | '.join(needed)} |")

    return "\n".join([*lines, ""])


def words(compared: Mapping[str, Compared], without: list[str]) -> list[str]:
    """A sentence a remedy."""
    lines = ["In words:\n"]
    for remedy in compared["miou_tail"]:
        said = [f"{SCORES[key]} {verdict(*compared[key][remedy])}" for key in ("miou", "miou_tail", "miou_head")]
        lines.append(f"- **{remedy}**: {'; '.join(said)}.")

    lines += [f"- **{name}**: no seed in common with the baseline yet." for name in without]
    return [*lines, ""]


def against_others(split: Mapping[str, Any], pairs: Mapping[str, str], head: str = AGAINST_HEAD) -> list[str]:
    """A sentence a pair of remedies, neither of which need be the baseline."""
    compared = {key: between(split, pairs, key) for key in ("miou", "miou_tail", "miou_head")}
    if not compared["miou"]:
        return []

    lines = [head]
    for remedy in compared["miou"]:
        said = [f"{SCORES[key]} {verdict(*differences[remedy])}" for key, differences in compared.items()]
        lines.append(f"- **{remedy}** against {pairs[remedy]}: {'; '.join(said)}.")

    return [*lines, ""]


def against_trunk(split: Mapping[str, Any], results: Mapping[str, Any]) -> list[str]:
    """A sentence a remedy: what it changes where all else, the learning rate too, is as in the trunk to its end."""
    trunk = results.get("trunk")
    if not trunk or trunk not in split.get("starts", {}):
        return []

    together = {**split, "runs": {**split["runs"], trunk: split["starts"][trunk]}}
    seeds = matrices_of(together, [trunk])[trunk].values()
    means = [f"{SCORES[key]} {percent(np.mean([score(m, split, key) for m in seeds]))}" for key in SCORES]
    head = TRUNK_HEAD.format(trunk=trunk, seeds=len(seeds), means=", ".join(means))
    return against_others(together, dict.fromkeys(results["remedies"], trunk), head)


def against_free(split: Mapping[str, Any], remedies: list[str], after: Mapping[str, str]) -> list[str]:
    """A sentence a remedy: its mIoU(tail) against the best that costs no training and hardly more of the head, and
    against the best whatever it costs of the head."""
    baseline = remedies[0]
    curve = [run for name, of in after.items() if of == baseline for run in of_curve(split, name)]
    further = [run for name, of in after.items() if of != baseline for run in of_curve(split, name)]
    planned = dict.fromkeys([*remedies[1:], *further], baseline)
    if not curve or not set(planned) & set(split["runs"]):
        return []

    return free_tables(FREE_HEAD, split, planned, {baseline: curve}, further)


def against_free_in_others(split: Mapping[str, Any], pairs: Mapping[str, str], after: Mapping[str, str]) -> list[str]:
    """A sentence a pair of remedies whose other has changed classifiers of its own: whether training had to change."""
    curves = {
        other: [run for name, of in after.items() if of == other for run in of_curve(split, name)]
        for other in dict.fromkeys(pairs.values())
    }
    planned = {remedy: other for remedy, other in pairs.items() if curves[other]}
    return free_tables(FREE_IN_OTHERS_HEAD, split, planned, curves) if set(planned) & set(split["runs"]) else []


def free_tables(
    head: str,
    split: Mapping[str, Any],
    planned: Mapping[str, str],
    curves: Mapping[str, list[str]],
    untold: Collection[str] = (),
) -> list[str]:
    """A sentence a remedy and choice of what is free: head alike, then any.

    planned: remedy, run or not → whose networks what is free was made of; curves: those → what was made of them.
    untold: of the remedies those that are not held against these networks elsewhere.
    """
    lines = [head]
    told = {remedy: of for remedy, of in planned.items() if remedy not in untold}
    compared = {remedy: of for remedy, of in planned.items() if remedy in split["runs"]}
    for words, allowed in (("", HEAD_ALLOWED), (FREE_AT_ANY_COST, math.inf)):
        found = {remedy: best_free(split, of, remedy, curves[of], allowed) for remedy, of in compared.items()}
        lines += [words, *free_words(found, told, len(planned)), ""]

    return lines


def free_words(found: Mapping[str, tuple[str, Difference] | None], of: Mapping[str, str], planned: int) -> list[str]:
    """found: remedy → what is free and its difference to that. of: remedy → the network that it is held against.
    planned: number of remedies, with those that are not run yet.

    Where that network itself is the best, the comparison stands above already, in a family of tests of its own.
    """
    above = [remedy for remedy, pair in found.items() if pair is not None and pair[0] == of.get(remedy)]
    tests = {remedy: pair[1].p for remedy, pair in found.items() if pair is not None and remedy not in above}
    adjusted = holm(tests, planned - len(above))
    lines = []
    for remedy, pair in found.items():
        if pair is None:
            lines.append(f"- **{remedy}**: {NOTHING_FREE}")
        elif remedy in above:
            lines.append(f"- **{remedy}**: {pair[0]} itself is the best of them; the comparison is above.")
        else:
            lines.append(f"- **{remedy}** against {pair[0]}: mIoU(tail) {verdict(pair[1], adjusted[remedy])}.")

    return lines


def after_training(remedy: str, of: str, split: Mapping[str, Any], baseline: str) -> str:
    """The table of what was changed in the classifier of `of`, a line a strength."""
    head = f"### {remedy}: after training, on the weights of {of}\n"
    strengths = of_curve(split, remedy)
    matrices = matrices_of(split, [*dict.fromkeys([baseline, of]), *strengths])
    if not strengths:
        return f"{head}\nNot run yet.\n"

    compared = {key: compare(matrices, baseline, split, key) for key in SCORES}
    tables = [main_table(matrices, baseline, split, compared), tail_table(matrices, split)]
    return "\n".join([head, *tables, *further_tables(split, list(matrices))])


def main_table(
    matrices: Mapping[str, Mapping[str, np.ndarray]], baseline: str, split: Mapping[str, Any],
    compared: Mapping[str, Compared],
) -> str:  # fmt: skip
    lines = ["| | seeds | " + " | ".join(SCORES.values()) + " |", "|---" * (len(SCORES) + 2) + "|"]
    for remedy, seeds in matrices.items():
        cells = []
        for key in SCORES:
            mean = np.mean([score(matrix, split, key) for matrix in seeds.values()])
            change = compared[key].get(remedy)
            cells.append(f"{100 * mean:.1f}" + (f" ({number(change[0])})" if change else ""))
        lines.append(f"| {remedy} | {len(seeds)} | {' | '.join(cells)} |")
    spread = {key: of_differences([score(m, split, key) for m in matrices[baseline].values()]).sd for key in SCORES}
    if spread["miou"] is not None:
        words = ", ".join(f"{SCORES[key]} {100 * sd:.1f}" for key, sd in spread.items())
        lines += ["", f"Standard deviation of one run of {baseline} over its seeds: {words}."]
    return "\n".join([*lines, ""])


def starts_table(split: Mapping[str, Any], results: Mapping[str, Any]) -> list[str]:
    """How far each remedy went from the weights that it began at; nothing where no start was evaluated. That of the
    trunk is of its end, where no remedy began."""
    recorded = {step: seeds for step, seeds in split.get("starts", {}).items() if step != results.get("trunk")}
    before = results.get("before", {})  # remedy → the steps that it comes after, the nearest first
    begins = {remedy: next((step for step in steps if step in recorded), None) for remedy, steps in before.items()}
    pairs = {remedy: step for remedy, step in begins.items() if step and remedy in split["runs"]}
    if not pairs:
        return []

    together = {**split, "runs": {**recorded, **split["runs"]}}
    changes = {key: between(together, pairs, key) for key in SCORES}
    lines = [STARTS_HEAD, "| | seeds | " + " | ".join(SCORES.values()) + " |", "|---" * (len(SCORES) + 2) + "|"]
    for start, seeds in matrices_of(together, list(dict.fromkeys(pairs.values()))).items():
        means = [np.mean([score(matrix, split, key) for matrix in seeds.values()]) for key in SCORES]
        lines.append(f"| **{start}** | {len(seeds)} | {' | '.join(percent(mean) for mean in means)} |")
        for remedy in (name for name in changes["miou"] if pairs[name] == start):
            cells = [number(changes[key][remedy][0]) for key in SCORES]
            lines.append(f"| {remedy} | {changes['miou'][remedy][0].n} | {' | '.join(cells)} |")

    return ["\n".join([*lines, ""])]


def tail_table(matrices: Mapping[str, Mapping[str, np.ndarray]], split: Mapping[str, Any]) -> str:
    """IoU / precision / recall / predicted over true pixels of each class of the tail, over all seeds of a remedy."""
    pixels = sum(next(iter(matrices.values())).values()).sum(1)
    tail = [k for k in split["tail"] if pixels[k]]
    names = [split["classes"][k] for k in tail]
    lines = [
        "IoU / precision / recall / predicted over true pixels, seeds together:",
        "",
        "| | " + " | ".join(names) + " |",
        "|---" * (len(names) + 1) + "|",
    ]
    for remedy, seeds in matrices.items():
        total = sum(seeds.values())
        precision, recall, ratio = precision_and_recall(total)
        hits = np.diagonal(total)
        iou = hits / np.maximum(total.sum(0) + total.sum(1) - hits, 1)
        rates = [iou, precision, recall]
        cells = [" / ".join([*(percent(rate[k]) for rate in rates), f"{ratio[k]:.2f}"]) for k in tail]
        lines.append(f"| {remedy} | {' | '.join(cells)} |")
    return "\n".join([*lines, ""])
