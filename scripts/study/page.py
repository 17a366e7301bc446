"""The page of scripts/evidence.py: what its file of results says, in tables and sentences."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from common.comparison import LEVEL, Difference, holm, number, of_differences, paired_by_seed, pairs_needed, verdict
from common.metrics import precision_and_recall
from scripts.study import plot
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
    score,
    unpaired,
)

SCORES = {"miou": "mIoU", "miou_tail": "mIoU(tail)", "miou_head": "mIoU(head)", "macc": "mean accuracy"}
FURTHER = {"tolerant_miou_tail": "mIoU~(tail)", "boundary_f_tail": "F~(tail)", "ece": "ECE", "ece_tail": "ECE(tail)"}
FURTHER_OF_CLASS = ("tolerant_iou", "boundary_f", "ece", "mass")
EFFECTS = (2, 3, 5)  # points of mIoU(tail)
TITLE = "Which remedies help"
HEAD = """# {title}

Made by `python scripts/evidence.py page {plan}` from the results of its other steps; nothing here is written by hand.
Every remedy is trained with the seeds of the baseline, and differences are taken seed by seed. The last checkpoint
counts. In percent; ± is half of a 95 % interval by Student's t over seeds; "better" and "worse" are said where Holm's p
over all remedies of a table is below 0.05. Such intervals speak of other seeds on the same images, not of other scenes.
"""
FURTHER_HEAD = (
    "Beyond IoU ([scores.md](scores.md)): `~` forgives the pixels of `eval.boundary` at borders, ECE is the expected "
    "calibration error (of the best class; of a class over the pixels with p ≥ 0.05), mass a class's predicted "
    "probability over its pixels. Of ECE less is better, of mass 1 is best.\n"
)
FREE_HEAD = (
    "Against what is free: of the baseline and all strengths of changes in it (below), the one with the highest "
    "mIoU(tail) whose mIoU(head) is at most half a point below the remedy's, on the same seeds. It is picked on these "
    "images, in its favour."
)
AGAINST_HEAD = "Against each other, Holm's p over these pairs:\n"
FREE_AT_ANY_COST = "The same against the highest mIoU(tail) that is free, whatever it costs of the head:\n"
NOTHING_FREE = "nothing that is free comes within half a point of its mean mIoU(head) on the same seeds."
UNTUNED = "One strength each, fixed before any result of its own: **nothing is tuned, the baseline neither.**"
NOTHING = "\n**Nothing has been run yet**: there is no file of results, hence no numbers.\n"


def page_of(results: Mapping[str, Any] | None, plan: str) -> str:
    """Markdown. results: what the step `collect` has left; None: nothing. plan: the file of the comparison."""
    title = TITLE if results is None else results.get("title", TITLE)
    head = HEAD.format(title=title, plan=plan)
    if results is None:
        return head + NOTHING

    parts = [head, protocol(results), strengths(results)]
    for name, split in results["splits"].items():
        parts.append(section(name, split, results, picture_of(plan, name)))

    return "\n".join(parts)


def picture_of(plan: str, split: str) -> str:
    """Where the plot of a split lies, seen from the page."""
    return f"images/evidence_{Path(plan).stem}_{split}.svg"


def pictures(results: Mapping[str, Any], plan: str) -> dict[str, str]:
    """File, seen from the page → SVG, of each split with something to compare."""
    found = {}
    for name, split in results["splits"].items():
        changes = changes_of(split, list(results["remedies"]), list(results["after"]))
        if changes is not None:
            found[picture_of(plan, name)] = plot.plot(*changes, changed(results))

    return found


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


def strengths(results: Mapping[str, Any]) -> str:
    """The settings of every remedy; where several strengths were tried, which was chosen, and what they scored."""
    lines = ["## Strengths", "", "| remedy | strength | settings |", "|---|---|---|"]
    for name, settings in results.get("steps", {}).items():
        lines.append(f"| {name} | comes before others | `{' '.join(settings)}` |")
    for name, settings in results["remedies"].items():
        lines.append(f"| {name} | {results['choices'][name]['chosen']} | `{' '.join(settings)}` |")

    tuned = {name: choice for name, choice in results["choices"].items() if choice["tried"]}
    if tuned:
        lines += ["", "Chosen on images of their own, with a seed of their own:", "", choices_table(tuned)]
    else:
        lines += ["", UNTUNED]

    return "\n".join([*lines, ""])


def choices_table(choices: Mapping[str, Any]) -> str:
    """What was chosen, and among what."""
    lines = ["| remedy | chosen | best for the tail | tried: mIoU / mIoU(tail) |"]
    lines.append("|---|---|---|---|")
    for name, choice in choices.items():
        tried = "; ".join(
            f"{strength}: {100 * scores['miou']:.1f} / {100 * scores['miou_tail']:.1f}"
            for strength, scores in choice["tried"].items()
        )
        lines.append(f"| {name} | {choice['chosen']} | {choice['by_tail']} | {tried} |")

    return "\n".join(lines)


def section(name: str, split: Mapping[str, Any], results: Mapping[str, Any], picture: str) -> str:
    """The tables of one split. Remedies without a pair with the baseline are named as such."""
    remedies, after = list(results["remedies"]), changed(results)
    baseline = remedies[0]
    head = f"## Split {name}: {len(split['images'])} images\n"
    if baseline not in split["runs"]:
        return f"{head}\nNo run of the baseline is done, so nothing can be compared.\n"

    matrices = matrices_of(split, remedies)
    compared = {key: compare(matrices, baseline, split, key) for key in SCORES}
    lines = [head]
    if changes_of(split, remedies, list(after)) is not None:
        lines.append(f"![Change of mIoU(tail) against change of mIoU(head), by remedy]({picture})\n")
    lines += [main_table(matrices, baseline, split, compared), tail_table(matrices, split)]
    lines += further_tables(split, remedies)
    lines += [pairs_table(compared["miou_tail"]), *words(compared, unpaired(matrices, baseline))]
    lines += against_others(split, results.get("against", {}))
    absent = [name for name in remedies if name not in split["runs"]]
    if absent:
        lines.append(f"Not run yet: {', '.join(absent)}.\n")
    lines += against_free(split, remedies, after)
    for remedy, of in after.items():
        lines.append(after_training(remedy, of, split, baseline))

    return "\n".join([*lines, ""])


def pairs_table(compared: Compared) -> str:
    """How far the differences spread, and how many pairs would find an effect of a given size."""
    spread = {name: difference.sd for name, (difference, _) in compared.items() if difference.sd}
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


def against_others(split: Mapping[str, Any], pairs: Mapping[str, str]) -> list[str]:
    """A sentence a pair of remedies, neither of which need be the baseline."""
    compared = {key: between(split, pairs, key) for key in ("miou", "miou_tail", "miou_head")}
    if not compared["miou"]:
        return []

    lines = [AGAINST_HEAD]
    for remedy in compared["miou"]:
        said = [f"{SCORES[key]} {verdict(*differences[remedy])}" for key, differences in compared.items()]
        lines.append(f"- **{remedy}** against {pairs[remedy]}: {'; '.join(said)}.")

    return [*lines, ""]


def against_free(split: Mapping[str, Any], remedies: list[str], after: Mapping[str, str]) -> list[str]:
    """A sentence a remedy: its mIoU(tail) against the best that costs no training and hardly more of the head, and
    against the best whatever it costs of the head."""
    baseline = remedies[0]
    curve = [run for name, of in after.items() if of == baseline for run in of_curve(split, name)]
    further = [run for name, of in after.items() if of != baseline for run in of_curve(split, name)]
    compared = [remedy for remedy in [*remedies[1:], *further] if curve and remedy in split["runs"]]
    if not compared:
        return []

    lines = [FREE_HEAD]
    for head, allowed in (("", HEAD_ALLOWED), (FREE_AT_ANY_COST, math.inf)):
        found = {remedy: best_free(split, baseline, remedy, curve, allowed) for remedy in compared}
        lines += [head, *free_words(found), ""]

    return lines


def free_words(found: Mapping[str, tuple[str, Difference] | None]) -> list[str]:
    """found: remedy → what is free and its difference to that."""
    adjusted = holm({remedy: None if pair is None else pair[1].p for remedy, pair in found.items()})
    return [
        f"- **{remedy}**: {NOTHING_FREE}"
        if pair is None
        else f"- **{remedy}** against {pair[0]}: mIoU(tail) {verdict(pair[1], adjusted[remedy])}."
        for remedy, pair in found.items()
    ]


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


def tail_table(matrices: Mapping[str, Mapping[str, np.ndarray]], split: Mapping[str, Any]) -> str:
    """IoU / precision / recall / predicted over true pixels of each class of the tail, over all seeds of a remedy."""
    names = [split["classes"][k] for k in split["tail"]]
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
        cells = [" / ".join([*(percent(rate[k]) for rate in rates), f"{ratio[k]:.2f}"]) for k in split["tail"]]
        lines.append(f"| {remedy} | {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


def further_tables(split: Mapping[str, Any], names: list[str]) -> list[str]:
    """What precise borders and probabilities say of the runs that were scored for them; nothing where none was."""
    found = {
        name: {seed: run["further"] for seed, run in split["runs"].get(name, {}).items() if run.get("further")}
        for name in names
    }
    found = {name: seeds for name, seeds in found.items() if seeds}
    if not found:
        return []

    return [FURTHER_HEAD, _further_means(found, names[0]), _further_classes(found)]


def _further_means(found: Mapping[str, Mapping[str, Any]], baseline: str) -> str:
    lines = ["| | seeds | " + " | ".join(FURTHER.values()) + " |", "|---" * (len(FURTHER) + 2) + "|"]
    columns = {key: _further_column(found, baseline, key) for key in FURTHER}
    for name, seeds in found.items():
        cells = [columns[key][name] for key in FURTHER]
        lines.append(f"| {name} | {len(seeds)} | {' | '.join(cells)} |")

    return "\n".join([*lines, ""])


def _further_column(found: Mapping[str, Mapping[str, Any]], baseline: str, key: str) -> dict[str, str]:
    """Name → mean of one score, with the change against the baseline where both have it."""
    values = {
        name: {seed: run[key] for seed, run in seeds.items() if run.get(key) is not None}
        for name, seeds in found.items()
    }
    changes = paired_by_seed(values, baseline) if baseline in values else {}
    cells = {}
    for name, scored in values.items():
        mean = percent(np.mean(list(scored.values()))) if scored else "–"
        cells[name] = f"{mean} ({number(changes[name][0])})" if name in changes else mean

    return cells


def _further_classes(found: Mapping[str, Mapping[str, Any]]) -> str:
    """IoU~ / F~ / ECE / mass of each class of the tail, means over the seeds."""
    classes = list(dict.fromkeys(name for seeds in found.values() for run in seeds.values() for name in run["classes"]))
    lines = ["IoU~ / F~ / ECE / mass:", "", "| | " + " | ".join(classes) + " |", "|---" * (len(classes) + 1) + "|"]
    for remedy, seeds in found.items():
        runs = [run["classes"] for run in seeds.values()]
        cells = [" / ".join(_mean_of(runs, name, key) for key in FURTHER_OF_CLASS) for name in classes]
        lines.append(f"| {remedy} | {' | '.join(cells)} |")

    return "\n".join([*lines, ""])


def _mean_of(runs: list[Mapping[str, Any]], name: str, key: str) -> str:
    values = [run[name][key] for run in runs if run.get(name, {}).get(key) is not None]
    if not values:
        return "–"
    return f"{np.mean(values):.2f}" if key == "mass" else percent(np.mean(values))


def percent(value: float) -> str:
    return f"{100 * value:.1f}" if np.isfinite(value) else "–"
