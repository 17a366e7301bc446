"""The table in the README that says which remedies help, made from the results of one plan."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from common.comparison import holm
from scripts.study.numbers import HEAD_ALLOWED, best_free, changed, compare, decided, matrices_of, of_curve, score

BEGIN, END = "<!-- begin: what helps, of {plan} -->", "<!-- end: what helps -->"
HEAD = (
    "| | seeds | mIoU(tail) | mIoU(head) | tail against the best that is free, head alike | … whatever its head |\n"
    "|---|---|---|---|---|---|"
)


def summary(results: Mapping[str, Any], split_name: str) -> str:
    """A line a remedy in the order of the tail, and one for the best strength of each change after training."""
    split, remedies = results["splits"][split_name], list(results["remedies"])
    baseline = remedies[0]
    curves = {name: runs for name in results["after"] if (runs := of_curve(split, name))}
    of = changed(results)
    curve = [run for name, runs in curves.items() if of[name] == baseline for run in runs]
    best = {best_of(split, runs): of[name] for name, runs in curves.items()}
    free = [name for name, remedy in best.items() if remedy == baseline]
    further = [name for name in best if name not in free]

    matrices = matrices_of(split, [*remedies, *best])
    trained = [name for name in [*remedies[1:], *further] if name in matrices]
    planned = len(remedies) - 1 + len(best)
    tails, heads = (compare(matrices, baseline, split, key, planned) for key in ("miou_tail", "miou_head"))
    held = len(remedies) - 1 + len(further)
    against = [against_free(split, baseline, trained, curve, allowed, held) for allowed in (HEAD_ALLOWED, math.inf)]

    lines = [HEAD]
    for name in sorted(tails, key=lambda name: -tails[name][0].mean):
        cells = [decided(*tails[name]), decided(*heads[name])]
        cells += ["free", ""] if name in free else [found[name] for found in against]
        lines.append(f"| {name} | {tails[name][0].n} | {' | '.join(cells)} |")

    return "\n".join(lines)


def best_of(split: Mapping[str, Any], names: list[str]) -> str:
    """The strength with the highest mean mIoU."""
    matrices = matrices_of(split, names)
    return max(names, key=lambda name: np.mean([score(m, split, "miou") for m in matrices[name].values()]))


def against_free(
    split: Mapping[str, Any], baseline: str, remedies: list[str], curve: list[str], allowed: float, planned: int
) -> dict[str, str]:
    """Remedy → its difference in mIoU(tail) to what `best_free` finds; `planned` remedies are to be held so."""
    found = {remedy: best_free(split, baseline, remedy, curve, allowed) for remedy in remedies}
    above = [remedy for remedy, pair in found.items() if pair is not None and pair[0] == baseline]
    tests = {remedy: pair[1].p for remedy, pair in found.items() if pair is not None and remedy not in above}
    adjusted = holm(tests, planned - len(above))
    cells = {}
    for remedy, pair in found.items():
        if pair is None:
            cells[remedy] = "nothing keeps the head as well"
        else:
            cells[remedy] = decided(pair[1], adjusted[remedy]) if remedy in adjusted else "nothing is better than none"

    return cells


def renewed(text: str, plan: str, table: str) -> str:
    """The README with the table in its place; as it is where it has no place for this plan.

    ValueError where the place has no end.
    """
    begin = BEGIN.format(plan=plan)
    if begin not in text:
        return text

    before, _, rest = text.partition(begin)
    _, end, after = rest.partition(END)
    if not end:
        raise ValueError(f"README.md: no {END!r} after {begin!r}; put it behind the table")

    return f"{before}{begin}\n\n{table}\n\n{END}{after}"


def renew(readme: Path, plan: str, results: Mapping[str, Any]) -> bool:
    """Write the table of the first split into the README; whether it has a place for it."""
    old = readme.read_text(encoding="utf-8")
    new = renewed(old, plan, summary(results, next(iter(results["splits"]))))
    if new != old:
        readme.write_text(new, encoding="utf-8")

    return BEGIN.format(plan=plan) in new
