"""From a file of jobs to runs: one command, common settings, named runs, seeds.

    command: python fully_sup/train.py {config} --resume {device} {settings}
    config: fully_sup/configs/small/upernet_r18_camvid_cpu.yaml
    output: runs/camvid_blv
    seeds: [0, 1]
    runs:
      ce: []                                          # settings of this run alone
      blv: [remedies.logits.name=blv]
      other: {config: other.yaml, after: ce}          # or any of the keys of Entry

Words in braces stand for what differs between runs: {name}, {seed}, {label}, {output}, {config}, {threads}, {device}
(`--device D`, or nothing) and {settings} (those of the file, those of the run, then seed, output, name and
train.threads). Paths are relative to `folder`, itself relative to the repository. A file may have a `base:`.
"""

import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from common.config import ConfigError, nearest, read_tree, shown, typed
from common.config.bounds import Count, Whole

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Entry:
    """What one named run has of its own; empty fields are those of the file."""

    settings: tuple[str, ...] = ()
    config: str = ""
    command: str = ""
    environment: Mapping[str, str] = field(default_factory=dict)
    after: str = ""  # the run of the same seed that has to be finished first


@dataclass(frozen=True)
class Jobs:
    """A file of jobs."""

    command: str
    output: str
    runs: Mapping[str, Any]  # name → settings, or an Entry
    config: str = ""
    settings: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    seeds: tuple[Whole, ...] = (0,)
    label: str = "{name}_{seed}"  # the name of a run's folder in `output`
    threads: Count = 1
    folder: str = "."  # where commands run
    prepare: tuple[
        str, ...
    ] = ()  # commands that come first, and leave what is there already as it is


@dataclass(frozen=True)
class Run:
    """One command to run."""

    name: str
    seed: int
    label: str
    command: tuple[str, ...]
    lasting: tuple[
        str, ...
    ]  # the command without what is to change no result: device and threads
    environment: Mapping[str, str]
    lasting_environment: Mapping[str, str]
    cwd: Path
    output: Path  # of all runs, below `cwd`
    after: str = ""  # label of the run that has to be finished first
    prepare: tuple[tuple[str, ...], ...] = ()

    @property
    def title(self) -> str:
        """What the run is called in tables and messages."""
        return str(self.output / self.label)

    @property
    def folder(self) -> Path:
        """Where the mark and the log lie: for a training command the run's own folder."""
        return self.cwd / self.output / self.label


def plan(
    path: str | Path, seeds: Sequence[int] | None = None, device: str | None = None,
    threads: int | None = None, only: Sequence[str] = (),
) -> list[Run]:  # fmt: skip
    """The runs of a file of jobs, all of one seed before the next. ConfigError (one line) for what is wrong with it.

    seeds, threads: in place of the file's. only: names of the runs that are wanted; default: all.
    """
    path = Path(path)
    jobs = typed(Jobs, read_tree(path), str(path))
    return plan_of(jobs, str(path), seeds, device, threads, only)


def plan_of(
    jobs: Jobs, where: str, seeds: Sequence[int] | None = None, device: str | None = None,
    threads: int | None = None, only: Sequence[str] = (),
) -> list[Run]:  # fmt: skip
    """`plan` of jobs that were not read from a file; `where` begins the errors."""
    entries = {
        name: entry_of(value, f"{where}: runs.{name}") for name, value in jobs.runs.items()
    }
    _check_names(where, entries, only)

    chosen = [name for name in entries if not only or name in only]
    threads = threads or jobs.threads
    runs = [
        _run(where, jobs, name, entries[name], seed, device, threads)
        for seed in (jobs.seeds if seeds is None else seeds)
        for name in chosen
    ]
    titles = [run.title for run in runs]
    twice = next((title for title in titles if titles.count(title) > 1), None)
    if twice:
        raise ConfigError(
            f"{where}: two runs are {twice}; name them by {{name}} and {{seed}}, seeds once"
        )

    return runs


def entry_of(value: Any, where: str) -> Entry:
    """What a file says of one run: settings, or any of the keys of Entry. ConfigError, which begins with `where`."""
    if not isinstance(value, Mapping):
        value = {"settings": [] if value is None else value}
    return typed(Entry, value, where)


def _check_names(where: str, entries: Mapping[str, Entry], only: Sequence[str]) -> None:
    if not entries:
        raise ConfigError(f"{where}: runs: names no run")
    for name in only:
        if name not in entries:
            raise ConfigError(f"{where}: has no run {shown(name)}; {nearest(name, entries)}")

    for name, entry in entries.items():
        if entry.after and entry.after not in list(entries)[: list(entries).index(name)]:
            raise ConfigError(
                f"{where}: runs.{name}.after: {shown(entry.after)} is no run above this one"
            )


def _run(
    file: str, jobs: Jobs, name: str, entry: Entry, seed: int, device: str | None, threads: int
) -> Run:
    """One named run of one seed."""
    where = f"{file}: runs.{name}"
    _check_device(jobs, entry, device, where)
    facts = _facts(jobs, name, entry, seed, where)
    after = _filled(jobs.label, {**facts, "name": entry.after}, where) if entry.after else ""

    return Run(
        name=name,
        seed=seed,
        label=facts["label"],
        command=_command(jobs, entry, facts, device, threads, where),
        lasting=_command(jobs, entry, facts, None, 1, where),
        environment={
            **_environment(jobs, entry, facts, device, threads, where),
            "OMP_NUM_THREADS": str(threads),
        },
        lasting_environment=_environment(jobs, entry, facts, None, 1, where),
        cwd=(ROOT / jobs.folder).resolve(),
        output=Path(facts["output"]),
        after=after,
        prepare=tuple(_words(text, {}, facts, f"{file}: prepare") for text in jobs.prepare),
    )


def _check_device(jobs: Jobs, entry: Entry, device: str | None, where: str) -> None:
    texts = [
        entry.command or jobs.command,
        *jobs.environment.values(),
        *entry.environment.values(),
    ]
    if device and not any("{device}" in text for text in texts):
        raise ConfigError(
            f"{where}: --device {device} has no place in its command; put {{device}} into `command`"
        )


def _facts(jobs: Jobs, name: str, entry: Entry, seed: int, where: str) -> dict[str, Any]:
    """What the words in braces stand for; {threads} apart."""
    facts: dict[str, Any] = {"name": name, "seed": seed}
    facts["output"] = _filled(jobs.output, facts, f"{where}: output")
    facts["label"] = _filled(jobs.label, facts, f"{where}: label")
    facts["config"] = _filled(entry.config or jobs.config, facts, f"{where}: config")

    return facts


def _command(
    jobs: Jobs,
    entry: Entry,
    facts: Mapping[str, Any],
    device: str | None,
    threads: int,
    where: str,
) -> tuple[str, ...]:
    own = [
        _filled(text, facts, f"{where}: settings") for text in (*jobs.settings, *entry.settings)
    ]
    place = [f"seed={facts['seed']}", f"output={facts['output']}", f"name={facts['label']}"]
    lists = {
        "{settings}": [*own, *place, f"train.threads={threads}"],
        "{device}": ["--device", device] if device else [],
    }
    return _words(
        entry.command or jobs.command, lists, {**facts, "threads": threads}, f"{where}: command"
    )


def _environment(
    jobs: Jobs,
    entry: Entry,
    facts: Mapping[str, Any],
    device: str | None,
    threads: int,
    where: str,
) -> dict[str, str]:
    texts = {**jobs.environment, **entry.environment}
    known = {**facts, "threads": threads, "device": f"--device {device}" if device else ""}
    return {
        key: _filled(text, known, f"{where}: environment.{key}") for key, text in texts.items()
    }


def _words(
    text: str, lists: Mapping[str, Sequence[str]], facts: Mapping[str, Any], where: str
) -> tuple[str, ...]:
    """The words of a command; a word of `lists` becomes several, and `python` is the one that runs."""
    try:
        parts = shlex.split(text)
    except ValueError as error:
        raise ConfigError(f"{where}: {shown(text)}: {error}") from error

    if not parts:
        raise ConfigError(f"{where}: is empty")

    found: list[str] = []

    for part in parts:
        found += lists[part] if part in lists else [_filled(part, facts, where)]

    if found[0] == "python":
        found[0] = sys.executable

    return tuple(found)


def _filled(text: str, facts: Mapping[str, Any], where: str) -> str:
    """`text` with values in place of words in braces."""
    try:
        return text.format_map(facts)
    except (KeyError, ValueError, IndexError, AttributeError) as error:
        known = ", ".join(f"{{{key}}}" for key in facts)
        raise ConfigError(
            f"{where}: {shown(text)}: unknown words in braces ({error}); known here: {known}"
        ) from error
