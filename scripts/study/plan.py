"""The plan of a comparison, and the runs that it asks for: what scripts/evidence.py reads."""

import argparse
import os
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from common.config.bounds import Count, Whole
from common.jobs import Run
from common.jobs.plan import ROOT, Jobs, plan_of

SCORES = "scores"  # in the folder of a run of `score`: what its command leaves
STRENGTHS = "strengths"  # in the folder of a run of `after`: what scripts/rebalance.py leaves


@dataclass(frozen=True)
class After:
    """A remedy of scripts/rebalance.py, and its options: `tau=0.1,0.2`, one of which has several values.

    of: the remedy whose networks it changes; empty: the baseline's, which costs no training.
    """

    name: str
    options: tuple[str, ...]
    of: str = ""


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
    branch: Count | None = None  # step of the baseline's final runs at which those of the remedies begin
    threads: Count = 1
    score: str = ""  # command that scores {checkpoint} once more, with further scores, and leaves {scores}
    note: str = ""  # what a reader of the page has to know
    after: Mapping[str, After] = field(default_factory=dict)
    lists: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # name → list files that make one, in {data}

    def __post_init__(self):
        if not self.remedies:
            raise ValueError("remedies: names no baseline")
        for name, strengths in self.remedies.items():
            if not strengths:
                raise ValueError(f"remedies.{name}: names no strength")
        for name, after in self.after.items():
            if name in self.remedies:
                raise ValueError(f"after.{name}: is the name of a remedy; take another")
            if after.of and after.of not in self.remedies:
                raise ValueError(f"after.{name}.of: {after.of!r} is no remedy of the plan: {', '.join(self.remedies)}")
            for other in self.after:
                if other.startswith(f"{name} "):  # results are named NAME STRENGTH
                    raise ValueError(f"after.{other}: begins with the name of another; take one that does not")
        if self.tuning_seed in self.seeds:
            raise ValueError(f"seeds: {self.tuning_seed} is the seed that strengths are chosen with; take others")

    @property
    def baseline(self) -> str:
        return next(iter(self.remedies))

    def changed(self, name: str) -> str:
        """The remedy whose trained networks `after.NAME` changes."""
        return self.after[name].of or self.baseline

    def tuned(self) -> dict[str, Mapping[str, tuple[str, ...]]]:
        """The remedies of which a strength has to be chosen."""
        return {name: tried for name, tried in self.remedies.items() if len(tried) > 1}

    def tuning(self) -> Jobs:
        """A run for each strength that has to be compared with another."""
        strengths = {
            f"{name}-{i}": (*self.tune, *settings)
            for name, tried in self.tuned().items()
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

    def scorings(self) -> dict[str, Jobs]:
        """Split → a run for each remedy and seed, which scores what it trained once more."""
        return {split: self._jobs_score(split) for split in self.final} if self.score else {}

    def _jobs_score(self, split: str) -> Jobs:
        commands = {}
        for name in self.remedies:
            places = {
                "{checkpoint}": f"{self.output}/{split}/{name}_{{seed}}/checkpoints/last",
                "{scores}": f"{{output}}/{{label}}/{SCORES}.json",
            }
            commands[name] = _filled(self.score, places)

        return self._commands(f"{split}/{SCORES}", commands)

    def afters(self) -> dict[str, Jobs]:
        """Split → a run for each change of a trained classifier, and seed."""
        return {split: self._jobs_after(split) for split in self.final} if self.after else {}

    def _jobs_after(self, split: str) -> Jobs:
        left = f"--output {{output}}/{{label}}/{STRENGTHS} {{device}}"
        commands = {}
        for name, after in self.after.items():
            trained = f"{{output}}/{self.changed(name)}_{{seed}}"
            commands[name] = f"python scripts/rebalance.py {trained} {after.name} {shlex.join(after.options)} {left}"

        return self._commands(split, commands)

    def _commands(self, part: str, commands: Mapping[str, str]) -> Jobs:
        """Runs with a command of their own each, for every seed."""
        return Jobs(
            command="",
            output=f"{self.output}/{part}",
            runs={name: {"command": command} for name, command in commands.items()},
            seeds=self.seeds,
            threads=self.threads,
        )

    def _jobs(self, part: str, runs: Mapping[str, tuple[str, ...]], seeds: tuple[int, ...]) -> Jobs:
        return Jobs(
            command=self.command,
            config=self.config,
            output=f"{self.output}/{part}",
            runs={name: self._entry(part, name, settings) for name, settings in runs.items()},
            settings=self.settings,
            seeds=seeds,
            threads=self.threads,
        )

    def _entry(self, part: str, name: str, settings: tuple[str, ...]) -> dict[str, Any]:
        """A run as a file of jobs has it."""
        places = {"{data}": data_folder(), "{lists}": str(ROOT / self.output / "lists")}
        placed = [_placed(text, places) for text in settings]
        if self.branch is None or name == self.baseline or part not in self.final:
            return {"settings": placed}

        trunk = f"{self.output}/{part}/{self.baseline}_{{seed}}/checkpoints/step_{self.branch:08d}"
        return {"settings": [*placed, f"train.branch={trunk}"], "after": self.baseline}


def _placed(text: str, places: Mapping[str, str]) -> str:
    text = _filled(text, places)
    return text.replace("{", "{{").replace("}", "}}")  # what is left in braces is a value, not a word to fill in


def _filled(text: str, places: Mapping[str, str]) -> str:
    for word, value in places.items():
        text = text.replace(word, value)
    return text


def data_folder() -> str:
    return os.environ.get("LTS_DATA", str(ROOT / "datasets"))


def runs_of(jobs: Jobs, args: argparse.Namespace | None = None) -> list[Run]:
    if args is None:
        return plan_of(jobs, jobs.output)
    return plan_of(jobs, jobs.output, args.seeds, args.device, args.threads)
