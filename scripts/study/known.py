"""What a file of results holds, against what its plan says now: a row is one thing that was trained."""

from collections.abc import Mapping, Sequence
from typing import Any

from scripts.study.plan import Entry, Plan

TOLD = ("config", "settings", "branch", "trunk")  # of a plan, what holds for all its runs


def told(plan: Plan, choices: Mapping[str, Any]) -> dict[str, Any]:
    """How everything is trained, as the file of results and the page say it."""
    return {
        "config": plan.from_root(plan.config),
        "settings": list(plan.settings),
        "branch": plan.branch,
        "trunk": plan.trunk,
        "final": {name: list(own) for name, own in plan.final.items()},
        "steps": {name: said(plan, plan.step(name)) for name in plan.steps},
        "remedies": {name: said(plan, plan.entry(name, choices[name]["chosen"])) for name in plan.remedies},
        "before": {name: plan.before(name, choices[name]["chosen"]) for name in plan.remedies},
        "choices": choices,
    }


def changes(plan: Plan) -> dict[str, dict[str, Any]]:
    """What is changed after training, as the file of results says it."""
    return {
        name: {"of": plan.changed(name), "change": [after.name, *after.options]} for name, after in plan.after.items()
    }


def said(plan: Plan, entry: Entry) -> list[str]:
    """What a run has of its own, as the page tells it."""
    command = entry.command.replace("{device} ", "")
    if command and plan.folder != ".":
        command = f"cd {plan.folder} && {command}"

    return [word for word in (command, plan.from_root(entry.config), *entry.settings) if word]


def of_plan(results: Mapping[str, Any], plan: Plan, choices: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The splits of known results, with the runs that were trained as the plan and the choices say now; and a line for
    each that was not, which is left out: a mean over seeds of two strengths or settings would be of none.

    ValueError where all were trained otherwise, by the settings of the whole plan.
    """
    now = told(plan, choices)
    if changed := _changed(_of_all(results), _of_all(now)):
        raise ValueError(
            f"{plan.results}: its runs were trained with another value of {', '.join(changed)} than the plan has now; "
            "give the plan another `results`"
        )

    splits: dict[str, Any] = {}
    left = []

    for name, split in results["splits"].items():
        kept: dict[str, dict[str, Any]] = {}
        for row, seeds in split["runs"].items():
            for seed, run in seeds.items():
                change = _change(row, run, plan, results, now)
                if change is None:
                    kept.setdefault(row, {})[seed] = run
                else:
                    left.append(f"{plan.results}: {name}: {row}, seed {seed}: left out, {change}")

        starts = {
            step: seeds
            for step, seeds in split.get("starts", {}).items()
            if results["steps"].get(step) in (None, now["steps"].get(step))
        }
        if kept:
            splits[name] = {**split, "runs": kept, "starts": starts}

    return splits, left


def _change(row: str, run: Mapping[str, Any], plan: Plan, was: Mapping[str, Any], now: Mapping[str, Any]) -> str | None:
    """What a known run is otherwise than the plan says now, in words; None where nothing is known of that."""
    remedy = _remedy(row, plan, was)
    if remedy is None:
        return None  # no longer of the plan

    strength = run["strength"] if row == remedy else was["choices"][remedy]["chosen"]
    chosen = now["choices"][remedy]["chosen"]
    if strength != chosen:
        return f"it is of {strength}; {chosen} is chosen now"

    changed = _changed(_of_row(remedy, was), _of_row(remedy, now))
    after = _after(row, plan)
    if after is not None and after in was.get("after", {}):
        then, today = was["after"][after], changes(plan)[after]
        if then["of"] != today["of"] or _unswept(then["change"]) != _unswept(today["change"]):
            changed.append(f"after.{after}")

    return f"the plan has another value of {', '.join(changed)} now" if changed else None


def _remedy(row: str, plan: Plan, was: Mapping[str, Any]) -> str | None:
    """The remedy that a row is of, or whose trained networks it changes."""
    if row in plan.remedies:
        return row

    after = _after(row, plan)
    return None if after is None or plan.changed(after) not in was["choices"] else plan.changed(after)


def _after(row: str, plan: Plan) -> str | None:
    """The change after training that a row is a strength of."""
    return next((name for name in plan.after if row.startswith(f"{name} ")), None)


def _unswept(change: Sequence[str]) -> set[str]:
    """A change without the values of the option that has several: more of them can be tried later."""
    return {word.partition("=")[0] if "," in word.partition("=")[2] else word for word in change}


def _of_all(results: Mapping[str, Any]) -> dict[str, Any]:
    """What is said of all runs; earlier files say less."""
    splits = results.get("final", {})
    results = {"trunk": "", **results}  # which earlier plans did not have
    return {key: results[key] for key in TOLD if key in results} | {
        f"final.{name}": own for name, own in splits.items()
    }


def _of_row(remedy: str, results: Mapping[str, Any]) -> dict[str, Any]:
    """What is said of how a row was trained."""
    parts = {f"entry of {remedy}": results["remedies"].get(remedy)}
    parts |= {f"step {step}": results["steps"].get(step) for step in results["before"].get(remedy, [])}
    return {key: value for key, value in parts.items() if value is not None}


def _changed(was: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """The keys whose values differ, of those that were known and are known."""
    return [key for key, value in was.items() if key in now and value != now[key]]
