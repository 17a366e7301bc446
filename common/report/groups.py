"""Runs that differ by their seed alone, as one thing: found in folders, told apart by their configs."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.evaluation.identity import differences, other_means
from common.report.panels import flatten
from common.report.runs import RunFolder

EVALUATION = "evaluation.json"
CHANGE = "rebalance"  # in it, what scripts/rebalance.py has made of a trained network
# settings that change no result, or name the run
VOLATILE = (
    "seed",
    "name",
    "output",
    "data.cache",
    "data.workers",
    "eval.workers",
    "eval.panels",
    "eval.per_image",
    "train.threads",
    "train.log_every",
    "train.save_every",
    "train.keep",
)


@dataclass(frozen=True)
class Group:
    """The runs of one config by seed."""

    name: str
    runs: Mapping[int, RunFolder]

    @property
    def first(self) -> RunFolder:
        return next(iter(self.runs.values()))

    def holds(self, run: RunFolder) -> bool:
        return any(member is run for member in self.runs.values())


def find_runs(words: Sequence[str | Path]) -> tuple[list[RunFolder], list[str]]:
    """The runs that words name: folders of runs, and folders that hold such; and what was left out, to be said.

    A run in a folder that is not evaluated at its end is left out; one that is named itself is refused. ValueError
    (one line) where a folder is none or holds no run.
    """
    runs: dict[Path, RunFolder] = {}
    left: list[str] = []

    for word in map(Path, words):
        if (word / EVALUATION).is_file() or (word / "config.yaml").is_file():
            found = [word]
        else:
            found = _inside(word)

        for folder in found:
            run = RunFolder.load(folder)
            reason = _unfinished(run)
            if reason and folder == word:
                raise ValueError(f"{folder}: {reason}; let it end, with --resume")
            if reason:
                left.append(f"{folder} is left out: {reason}")
            else:
                runs.setdefault(folder.resolve(), run)

    if not runs:
        raise ValueError(f"no run to compare: {'; '.join(left)}")
    return list(runs.values()), left


def _inside(folder: Path) -> list[Path]:
    """The runs below a folder, tests of checkpoints apart."""
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such run folder")

    found = {path.parent for name in (EVALUATION, "run.json") for path in folder.rglob(name)}
    runs = sorted(path for path in found if "test" not in path.relative_to(folder).parts)
    if not runs:
        raise ValueError(
            f"{folder}: neither a run nor a folder of runs, no {EVALUATION} is below"
        )

    return runs


def _unfinished(run: RunFolder) -> str | None:
    """Why a run is not at its end; None where it is."""
    if run.evaluation is None:
        return "it has not been evaluated"

    step = run.evaluation.get("step")
    steps = run.tree.get("train", {}).get("steps")
    if step is not None and steps is not None and step < steps:
        return f"it was evaluated at step {step} of {steps}"

    return None


def grouped(runs: Iterable[RunFolder]) -> list[Group]:
    """Runs of equal configs, seeds apart, in the order of the runs. ValueError for two runs of one config and seed."""
    members = [_by_seed(group) for group in by_settings(runs)]
    return [Group(name, seeds) for name, seeds in zip(_names(members), members, strict=True)]


def by_settings(runs: Iterable[RunFolder]) -> list[list[RunFolder]]:
    """Runs of equal configs, whatever their seeds, in the order of the runs."""
    found: dict[Any, list[RunFolder]] = {}
    for run in runs:
        found.setdefault(_settings(run), []).append(run)

    return list(found.values())


def _by_seed(runs: Iterable[RunFolder]) -> dict[int, RunFolder]:
    found: dict[int, RunFolder] = {}

    for run in runs:
        seed = seed_of(run)
        if seed in found:
            raise ValueError(
                f"{run.path} and {found[seed].path} are of one config and seed {seed}; name one of them"
            )
        found[seed] = run

    return dict(sorted(found.items()))


def seed_of(run: RunFolder) -> int:
    return int(run.record.get("seed", run.tree.get("seed", 0)))


def _settings(run: RunFolder) -> tuple[tuple[str, str], ...] | str:
    """What the runs of a group have in common; a file of another run of the same seed is taken for the same.

    That is their config, and what no config says: whether it is a test, of which network, and what was changed in it
    after training. Without a config it is the name, if a seed is known, else the folder itself.
    """
    if not run.tree:
        return without_seed(run) if "seed" in run.record else str(run.path.resolve())

    own = re.compile(rf"_{seed_of(run)}(?!\d)")
    flat = {key: text for key, text in flatten(run.tree).items() if key not in VOLATILE}
    flat |= flatten(_made(run), "made")
    return tuple(sorted((key, own.sub("_SEED", text)) for key, text in flat.items()))


def _made(run: RunFolder) -> dict[str, Any]:
    """How a result came about, as far as it is not in the config."""
    result = run.evaluation or {}
    change = result.get(CHANGE, {})
    return {
        "kind": run.record.get("kind"),
        "network": result.get("network"),
        "change": change.get("name"),
        "options": change.get("options", {}),
    }


def without_seed(run: RunFolder) -> str:
    """A run's name without its seed and, of a test, without the hash of its weights."""
    name, *rest = run.name.split(" ")
    change = (run.evaluation or {}).get(CHANGE, {})
    trained = Path(change.get("checkpoint", "")).parent.parent.parent.name
    if trained and name.startswith(trained):  # A_0_tau_norm, which was made of A_0
        name = _seedless(trained, run) + name.removeprefix(trained)
    else:
        name = _seedless(name, run)

    return " ".join([name, *(re.sub(r"-[0-9a-f]{8}$", "", word) for word in rest)])


def _seedless(name: str, run: RunFolder) -> str:
    return re.sub(rf"[_-](s|seed_?)?{seed_of(run)}$", "", name) or name


def _names(groups: Sequence[Mapping[int, RunFolder]]) -> list[str]:
    """A name for each group: that of its runs; with their folder or a number, where two would have the same."""
    firsts = [next(iter(group.values())) for group in groups]
    names = [without_seed(run) for run in firsts]
    if len(set(names)) < len(names):
        parents = [run.path.resolve().parent.name for run in firsts]
        names = [f"{parent}/{name}" for parent, name in zip(parents, names, strict=True)]

    return [
        name if names.count(name) == 1 else f"{name} ({names[:i].count(name) + 1})"
        for i, name in enumerate(names)
    ]


def choose(groups: Sequence[Group], wanted: str | None) -> Group:
    """The group that `wanted` names, or that holds the run of this folder; the first where it is None."""
    if wanted is None:
        return groups[0]

    path = Path(wanted).resolve()
    for group in groups:
        if group.name == wanted or any(
            run.path.resolve() == path for run in group.runs.values()
        ):
            return group

    known = ", ".join(group.name for group in groups)
    raise ValueError(f"--baseline {wanted}: neither a run that is compared nor one of {known}")


def check_alike(groups: Sequence[Group], baseline: Group) -> None:
    """ValueError, one line, for the first run whose scores do not compare with the baseline's."""
    for group in groups:
        for run in group.runs.values():
            parts = differences(run.evaluation, baseline.first.evaluation)
            if not parts and "tail" in _other_classes(run, baseline.first):
                parts = ["other classes make the tail"]
            if parts:
                raise ValueError(
                    f"{run.path} does not compare with {baseline.first.path}: {'; '.join(parts)}"
                )


def _other_classes(run: RunFolder, other: RunFolder) -> set[str]:
    return other_means(run.evaluation["per_class"], other.evaluation["per_class"])
