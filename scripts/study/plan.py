"""The plan of a comparison, and the runs that it asks for: what scripts/evidence.py reads."""

import argparse
import os
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

from common.config.bounds import AtLeast, Count, Whole
from common.jobs import Run
from common.jobs.plan import ROOT, Entry, Jobs, entry_of, plan_of
from common.metrics import Convention

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

    def folder(self) -> str:
        """Below a run's STRENGTHS the folder of the only strength; nothing where the script makes one of each."""
        own = [option for option in self.options if "." not in option.partition("=")[0]]
        if any("," in option for option in own):
            return ""
        return f"/{own[0].replace('=', '_')}" if own else f"/{self.name}"


@dataclass(frozen=True)
class Pool:
    """Splits that test each image once, told as one.

    blocks: file of scripts/prepare_folds.py, relative to the repository: which images are of one scene.
    """

    splits: tuple[str, ...]
    blocks: str


@dataclass(frozen=True)
class Scenes:
    """How the images of a split are told apart.

    blocks: file of scripts/prepare_folds.py, relative to the repository; else pieces: so many consecutive parts.
    """

    blocks: str = ""
    pieces: Annotated[int, AtLeast(2)] | None = None

    def __post_init__(self):
        if bool(self.blocks) == (self.pieces is not None):
            raise ValueError("scenes: takes either a file of blocks or a number of pieces")


@dataclass(frozen=True)
class Plan:
    """A comparison. Files but `output` are relative to the repository.

    What is compared need not be remedies of one config: a strength is a list of settings, or an Entry of a file of jobs
    (common/jobs/plan.py) with a config, a command, or a run of `steps` that comes before. In settings and commands
    {data} is the folder of data sets, {lists} that of `lists`, {split} the split's name, {runs} the folder of its runs,
    {seed} the seed.
    """

    command: str
    config: str
    output: str
    choices: str
    results: str
    page: str
    tune: tuple[str, ...]  # settings by which the tuning images are evaluated
    final: Mapping[str, tuple[str, ...]]  # split → settings
    remedies: Mapping[str, Mapping[str, Any]]  # name → strength → settings, or an Entry; the first is the baseline
    settings: tuple[str, ...] = ()  # of all runs
    seeds: tuple[Whole, ...] = (0, 1, 2, 3, 4)
    tuning_seed: Whole = 0
    branch: Count | None = None  # step of the trunk at which remedies begin
    trunk: str = ""  # run of `steps` that all remedies begin at, the baseline too, and strengths when they are chosen;
    # empty: the baseline's final runs, which the other final runs begin at
    threads: Count = 1
    score: str = ""  # command that scores {checkpoint} once more, with further scores, and leaves {scores}
    folder: str = "."  # where commands run, and where `output` lies
    convention: Convention | None = None  # of the page's scores (common/metrics.py), in place of the runs' own
    title: str = "Which remedies help"  # of the page
    note: str = ""  # what a reader of the page has to know
    steps: Mapping[str, Any] = field(default_factory=dict)  # name → settings, or an Entry: what others come `after`
    against: Mapping[str, str] = field(default_factory=dict)  # remedy → what it is compared with beside the baseline
    after: Mapping[str, After] = field(default_factory=dict)
    lists: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # name → list files that make one, in {data}
    pools: Mapping[str, Pool] = field(default_factory=dict)  # name → the folds of a cross-validation
    scenes: Mapping[str, Scenes] = field(default_factory=dict)  # split → its scenes, each of which the page tells

    def __post_init__(self):
        if not self.remedies:
            raise ValueError("remedies: names no baseline")
        for name, strengths in self.remedies.items():
            if not strengths:
                raise ValueError(f"remedies.{name}: names no strength")
        for name in self.steps:
            if name in self.remedies:
                raise ValueError(f"steps.{name}: is the name of a remedy; take another")
        if self.trunk and (self.trunk not in self.steps or self.branch is None):
            raise ValueError(f"trunk: {self.trunk!r} has to be one of `steps`, and `branch` to say at which step of it")
        for remedy, other in self.against.items():
            for name in (remedy, other):
                if name not in self.remedies:
                    raise ValueError(f"against.{remedy}: {name!r} is no remedy of the plan: {', '.join(self.remedies)}")
        for name, after in self.after.items():
            if name in self.remedies:
                raise ValueError(f"after.{name}: is the name of a remedy; take another")
            if after.of and after.of not in self.remedies:
                raise ValueError(f"after.{name}.of: {after.of!r} is no remedy of the plan: {', '.join(self.remedies)}")
            for other in self.after:
                if other.startswith(f"{name} "):  # results are named NAME STRENGTH
                    raise ValueError(f"after.{other}: begins with the name of another; take one that does not")
        for name, pool in self.pools.items():
            if name in self.final:
                raise ValueError(f"pools.{name}: is the name of a split; take another")
            for split in pool.splits:
                if split not in self.final:
                    raise ValueError(f"pools.{name}: {split!r} is no split of the plan: {', '.join(self.final)}")
            if len(set(pool.splits)) < max(2, len(pool.splits)):
                raise ValueError(f"pools.{name}: names fewer than two splits, or one twice")
        for name in self.scenes:
            if name not in self.final:
                raise ValueError(f"scenes: {name!r} is no split of the plan: {', '.join(self.final)}")
        if self.convention and self.tuned():
            raise ValueError("convention: strengths are chosen by that of the runs; set eval.convention in `settings`")
        if not self.seeds or not self.final:
            raise ValueError(f"{'final' if self.seeds else 'seeds'}: names none, so that nothing would be run")
        for name in self.final:
            if Path(name).name != name:
                raise ValueError(f"final.{name}: is the name of a folder; take one without a slash")
        self.check_seeds(self.seeds)

    def check_seeds(self, seeds: Sequence[int]) -> None:
        """ValueError where the seed that strengths are chosen with is one that they are compared with."""
        if self.tuning_seed in seeds:
            raise ValueError(f"seeds: {self.tuning_seed} is the seed that strengths are chosen with; take others")

    @property
    def place(self) -> Path:
        """The folder of all runs."""
        return (ROOT / self.folder / self.output).resolve()

    def from_root(self, config: str) -> str:
        """A config as seen from the repository; runs see it from `folder`."""
        return (Path(self.folder) / config).as_posix() if config else ""

    @property
    def baseline(self) -> str:
        return next(iter(self.remedies))

    def changed(self, name: str) -> str:
        """The remedy whose trained networks `after.NAME` changes."""
        return self.after[name].of or self.baseline

    def entry(self, name: str, strength: str) -> Entry:
        """What is run for a strength of a remedy."""
        return entry_of(self.remedies[name][strength], f"remedies.{name}.{strength}")

    def step(self, name: str) -> Entry:
        """What a run of `steps` is."""
        return entry_of(self.steps[name], f"steps.{name}")

    def before(self, name: str, strength: str) -> list[str]:
        """The steps that a strength of a remedy comes after, the nearest first."""
        found: list[str] = []
        step = self.trunk or self.entry(name, strength).after
        while step and step not in found:
            found.append(step)
            step = self.step(step).after if step in self.steps else ""

        return found

    def tuned(self) -> dict[str, Mapping[str, Any]]:
        """The remedies of which a strength has to be chosen."""
        return {name: tried for name, tried in self.remedies.items() if len(tried) > 1}

    def tuning(self) -> Jobs:
        """A run for each strength that has to be compared with another."""
        strengths = {
            f"{name}-{i}": self.entry(name, strength)
            for name, tried in self.tuned().items()
            for i, strength in enumerate(tried)
        }
        return self._jobs("tune", strengths, self.tune, (self.tuning_seed,))

    def finals(self, choices: Mapping[str, Any]) -> dict[str, Jobs]:
        """Split → a run for each remedy and seed, and for each step that comes before."""
        chosen = {name: self.entry(name, choices[name]["chosen"]) for name in self.remedies}
        return {split: self._jobs(split, chosen, own, self.seeds) for split, own in self.final.items()}

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
        script = os.path.relpath(ROOT / "scripts" / "rebalance.py", ROOT / self.folder)
        commands = {}
        for name, after in self.after.items():
            trained = f"{{output}}/{self.changed(name)}_{{seed}}"
            left = shlex.quote(f"{{output}}/{{label}}/{STRENGTHS}{after.folder()}")
            commands[name] = (
                f"python {script} {trained} {after.name} {shlex.join(after.options)} --output {left} {{device}}"
            )

        return self._commands(split, commands)

    def _commands(self, part: str, commands: Mapping[str, str]) -> Jobs:
        """Runs with a command of their own each, for every seed."""
        return Jobs(
            command="",
            output=f"{self.output}/{part}",
            runs={name: {"command": command} for name, command in commands.items()},
            seeds=self.seeds,
            threads=self.threads,
            folder=self.folder,
        )

    def _jobs(self, part: str, runs: Mapping[str, Entry], own: tuple[str, ...], seeds: tuple[int, ...]) -> Jobs:
        """own: the settings of the part."""
        runs = {name: self._branched(part, name, entry) for name, entry in runs.items()}
        steps = {name: self.step(name) for name in self.steps}
        return Jobs(
            command=self.command,
            config=self.config,
            output=f"{self.output}/{part}",
            runs={name: self._placed(part, name, entry, own) for name, entry in _in_order({**runs, **steps}).items()},
            settings=self.settings,
            seeds=seeds,
            threads=self.threads,
            folder=self.folder,
        )

    def _branched(self, part: str, name: str, entry: Entry) -> Entry:
        """A run of a remedy that begins at the trunk, where the plan has one for it."""
        trunk = self.trunk or self.baseline
        if self.branch is None or name == trunk or not (self.trunk or part in self.final):
            return entry
        if entry.after:
            raise ValueError(f"remedies.{name}: comes after {entry.after}, but by `branch` it begins at {trunk}")

        begin = f"train.branch={self.output}/{part}/{trunk}_{{seed}}/checkpoints/step_{self.branch:08d}"
        return replace(entry, settings=(*entry.settings, begin), after=trunk)

    def _placed(self, part: str, name: str, entry: Entry, own: tuple[str, ...]) -> dict[str, Any]:
        """A run as a file of jobs has it."""
        places = {
            "{data}": data_folder(),
            "{lists}": str(self.place / "lists"),
            "{runs}": str(self.place / part),
            "{split}": part,
        }
        settings = tuple(_escaped(_filled(text, places)) for text in (*own, *entry.settings))
        return asdict(replace(entry, settings=settings, command=_filled(entry.command, places)))


def _in_order(entries: Mapping[str, Entry]) -> dict[str, Entry]:
    """Each behind what it comes after; what comes after nothing that is there stays at the end, for an error."""
    waiting = dict(entries)
    placed: dict[str, Entry] = {}
    while ready := [name for name, entry in waiting.items() if not entry.after or entry.after in placed]:
        placed[ready[0]] = waiting.pop(ready[0])

    return placed | waiting


def _escaped(text: str) -> str:
    """Braces but those of {seed} are part of a value, not words to fill in."""
    return text.replace("{", "{{").replace("}", "}}").replace("{{seed}}", "{seed}")


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
