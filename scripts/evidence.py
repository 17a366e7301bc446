"""Which remedies help, by paired seeds: `python scripts/evidence.py STEP PLAN [--at-once N] [--minutes M] …`.

PLAN is a file such as scripts/evidence_plans/camvid.yaml. The steps, each of which goes on where it stopped:

    tune       every strength of every remedy, trained with one seed and scored on the tuning images
    choose     the strength of each with the highest mIoU there → the file of choices; commit it before the next step
    final      the chosen strengths with every seed, on the final splits
    collect    the confusion matrix of every image of the final runs that are done → the file of results
    page       the page of what the results say

Runs, logs, exit codes and refusals are those of scripts/run_many.py. The `last` checkpoint counts, never the best.
"""

import argparse
import json
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for the other scripts, which are not installed

from common import cli
from common.config import read_tree, typed
from common.config.bounds import Count, Whole
from common.data.catalogue.lists import read_list, write_list
from common.evaluation.identity import differences
from common.evaluation.per_image import FILE, read_per_image
from common.files import load_json, read_artifact, read_json, refuse_to_overwrite, replacing, write_json
from common.jobs import Run, run_all, state_of, table
from common.jobs.plan import ROOT, Jobs, plan_of
from scripts import evidence_page, run_many

STEPS = ("tune", "choose", "final", "collect", "page")


@dataclass(frozen=True)
class Plan:
    """A comparison. Files are relative to the repository."""

    command: str
    config: str
    output: str
    choices: str
    results: str
    page: str
    tune: tuple[str, ...]  # settings by which the tuning images are evaluated
    final: Mapping[str, tuple[str, ...]]  # split → settings
    remedies: Mapping[str, Mapping[str, tuple[str, ...]]]  # name → strength → settings; the first is the baseline
    settings: tuple[str, ...] = ()  # of all runs
    seeds: tuple[Whole, ...] = (0, 1, 2, 3, 4)
    tuning_seed: Whole = 0
    threads: Count = 1
    lists: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # name → list files that make one, in {data}

    def __post_init__(self):
        if not self.remedies:
            raise ValueError("remedies: names no baseline")
        for name, strengths in self.remedies.items():
            if not strengths:
                raise ValueError(f"remedies.{name}: names no strength")
        if self.tuning_seed in self.seeds:
            raise ValueError(f"seeds: {self.tuning_seed} is the seed that strengths are chosen with; take others")

    def tuning(self) -> Jobs:
        """A run for each strength."""
        strengths = {
            f"{name}-{i}": (*self.tune, *settings)
            for name, tried in self.remedies.items()
            for i, settings in enumerate(tried.values())
        }
        return self._jobs("tune", strengths, (self.tuning_seed,))

    def finals(self, choices: Mapping[str, Any]) -> dict[str, Jobs]:
        """Split → a run for each remedy and seed."""
        chosen = {name: self.remedies[name][choices[name]["chosen"]] for name in self.remedies}
        return {
            split: self._jobs(split, {name: (*own, *settings) for name, settings in chosen.items()}, self.seeds)
            for split, own in self.final.items()
        }

    def _jobs(self, part: str, runs: Mapping[str, tuple[str, ...]], seeds: tuple[int, ...]) -> Jobs:
        places = {"{data}": data_folder(), "{lists}": str(ROOT / self.output / "lists")}
        return Jobs(
            command=self.command,
            config=self.config,
            output=f"{self.output}/{part}",
            runs={name: [_placed(text, places) for text in settings] for name, settings in runs.items()},
            settings=self.settings,
            seeds=seeds,
            threads=self.threads,
        )


def _placed(text: str, places: Mapping[str, str]) -> str:
    for word, value in places.items():
        text = text.replace(word, value)
    return text.replace("{", "{{").replace("}", "}}")  # what is left in braces is a value, not a word to fill in


def data_folder() -> str:
    return os.environ.get("LTS_DATA", str(ROOT / "datasets"))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=STEPS)
    parser.add_argument("plan")
    run_many.add_pool(parser)
    cli.add_force(parser)
    args = parser.parse_args()
    run_many.check_pool(args)
    plan = typed(Plan, read_tree(Path(args.plan)), args.plan)

    if args.step in ("tune", "final"):
        return train(plan, args)
    if args.step == "choose":
        choose(plan, args.force)
    elif args.step == "collect":
        collect(plan)
    else:
        page(plan)
    return 0


def train(plan: Plan, args: argparse.Namespace) -> int:
    """Run the trainings of a step; its exit code."""
    parts = [plan.tuning()] if args.step == "tune" else list(plan.finals(read_choices(plan)).values())
    write_lists(plan)
    runs = [run for jobs in parts for run in runs_of(jobs, args)]
    ended = run_all(runs, args.at_once, args.minutes)
    print(table(runs))
    return run_many.exit_code(ended)


def runs_of(jobs: Jobs, args: argparse.Namespace | None = None) -> list[Run]:
    if args is None:
        return plan_of(jobs, jobs.output)
    return plan_of(jobs, jobs.output, args.seeds, args.device, args.threads)


def write_lists(plan: Plan) -> None:
    for name, files in plan.lists.items():
        names = [line for file in files for line in read_list(Path(data_folder()) / file)]
        path = ROOT / plan.output / "lists" / f"{name}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_list(path, names)


# Choices ------------------------------------------------------------------------------------------------------------


def choose(plan: Plan, force: bool) -> None:
    """Write the strength of each remedy that has the highest mIoU on the tuning images."""
    path = ROOT / plan.choices
    refuse_to_overwrite([path], force)
    runs = {run.name: run for run in runs_of(plan.tuning())}
    choices = {}
    for name, strengths in plan.remedies.items():
        tried = {strength: _tuned(runs[f"{name}-{i}"]) for i, strength in enumerate(strengths)}
        choices[name] = {
            "chosen": max(tried, key=lambda strength: tried[strength]["miou"]),
            "by_tail": max(tried, key=lambda strength: tried[strength]["miou_tail"]),
            "tried": tried,
        }
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, choices)
    print("\n".join(f"{name}: {choice['chosen']}" for name, choice in choices.items()))


def _tuned(run: Run) -> dict[str, float]:
    if state_of(run) != "done":
        raise ValueError(f"{run.title}: is {state_of(run)}; end the step `tune` first")
    result = read_json(run.folder / "evaluation.json")
    return {key: result[key] if result[key] is not None else float("-inf") for key in ("miou", "miou_tail")}


def read_choices(plan: Plan) -> dict[str, Any]:
    """The choices, which fit the plan. ValueError where they do not."""
    path = ROOT / plan.choices

    def parse(path: Path) -> dict[str, Any]:
        choices = load_json(path)
        for name, strengths in plan.remedies.items():
            chosen = choices.get(name, {}).get("chosen")
            if chosen not in strengths:
                raise ValueError(f"{name}: {chosen!r} is no strength of the plan")
        return choices

    return read_artifact(path, parse, "take the steps `tune` and `choose` first")


# Results ------------------------------------------------------------------------------------------------------------


def collect(plan: Plan) -> None:
    """Write what the final runs that are done say, compactly: every statistic can be made from it."""
    choices = read_choices(plan)
    splits = {split: _split(runs_of(jobs)) for split, jobs in plan.finals(choices).items()}
    splits = {name: split for name, split in splits.items() if split}
    if not splits:
        raise ValueError(f"{plan.output}: no final run is done; take the step `final` first")

    path = ROOT / plan.results
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"remedies": list(plan.remedies), "choices": choices, "splits": splits}, separators=(",", ":"))
    with replacing(path) as draft:
        draft.write_text(text)
    done = {name: sum(len(seeds) for seeds in split["runs"].values()) for name, split in splits.items()}
    print(f"{path}: " + ", ".join(f"{count} runs of {name}" for name, count in done.items()))


def _split(runs: list[Run]) -> dict[str, Any] | None:
    """The runs of one split that are done; None where none is."""
    first: dict[str, Any] | None = None
    found: dict[str, Any] = {}
    for run in runs:
        if state_of(run) != "done":
            continue
        result, kept = read_json(run.folder / "evaluation.json"), read_per_image(run.folder / FILE)
        first = first or {"result": result, "images": kept.names}
        if parts := differences(result, first["result"]):
            raise ValueError(f"{run.title}: does not compare with the other runs: {'; '.join(parts)}")

        made = read_json(run.folder / "run.json")
        record = {key: made.get(key) for key in ("minutes", "commit")} | {"matrices": packed(kept.matrices)}
        found.setdefault(run.name, {})[str(run.seed)] = record
    if first is None:
        return None
    classes = first["result"]["per_class"]
    return {
        "classes": [item["name"] for item in classes],
        "tail": [item["id"] for item in classes if item["tail"]],
        "convention": first["result"]["convention"],
        "identity": first["result"]["identity"],
        "images": first["images"],
        "runs": found,
    }


def packed(matrices: np.ndarray) -> list[list[int]]:
    """Of every image's matrix the numbers that are not 0: place, number, place, number, …"""
    flat = matrices.reshape(len(matrices), -1)
    return [np.stack([row.nonzero()[0], row[row.nonzero()]], 1).ravel().tolist() for row in flat]


def page(plan: Plan) -> None:
    path = ROOT / plan.results
    results = read_json(path) if path.is_file() else None
    text = evidence_page.page(results)
    (ROOT / plan.page).write_text(text, encoding="utf-8")
    print(ROOT / plan.page)


if __name__ == "__main__":
    cli.run(main)
