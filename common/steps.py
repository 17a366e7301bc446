"""A step of a pipeline, which is skipped where it would read what it has read before.

    python -m common.steps MAKES COMMAND …    e.g. … pseudo_soft python generate_pseudo_label.py CONFIG --soft seed=1

COMMAND names a config file, and overrides of it. MAKES is what it leaves in that config's run: a file or folder;
`checkpoints` is the training. When COMMAND has ended well, a mark beside it (`done_MAKES`; `done` of the training) says
what was read: the config's values, a digest in place of each file and folder that they name (lists, weights, files of
earlier steps), and for what follows the training its checkpoints and the command's words.

A step that would read something else runs again. A training would be lost by that, so it ends with a line that says
what has changed: CHANGED=keep in the environment takes what is there as it is, CHANGED=anew sets the run's folder aside
and trains again.
"""

import hashlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from common import cli
from common.config import Config, load_config, shown, to_tree
from common.files import MANIFEST, follow, load_json, write_json

TRAINING = "checkpoints"
CONFIGS = (".yaml", ".yml", ".json")
DIGEST = "sha256:"
LATER = {"eval.windows": "shifted"}  # keys of later versions, with what earlier ones did
# keys that say where a result lies, how it is shown or how fast it comes, not what it is
HARMLESS = {
    "name", "output", "runs", "data.workers", "data.cache", "train.threads", "train.log_every", "train.save_every",
    "train.keep", "eval.workers", "eval.window_batch", "eval.panels", "log",
}  # fmt: skip


def main() -> int:
    if len(sys.argv) < 3 or sys.argv[1].startswith("-"):
        raise ValueError("usage: python -m common.steps MAKES COMMAND …, as in uda/main.sh")
    makes, *command = sys.argv[1:]
    return Step(makes, command).run(os.environ.get("CHANGED", ""))


class Step:
    """What `makes` is made from by `command`, now and when it was made."""

    def __init__(self, makes: str, command: Sequence[str]):
        self.makes = makes
        self.command = list(command)
        self.cfg = load_config(*named_config(command))
        self.folder = self.cfg.folder
        self.training = makes == TRAINING

        end = "" if self.training else f"_{makes}"
        self.done = self.folder / f"done{end}"
        self.begun = self.folder / f"begun{end}"
        self.before = _record(self.begun if self.begun.exists() else self.done)
        self.reads = what_is_read(self.cfg)
        if not self.training:
            self.reads |= self._of_the_run()

    def _of_the_run(self) -> dict[str, Any]:
        """What a step after the training reads besides the config."""
        checkpoints = {
            name: digest_of(self.folder / TRAINING / name) for name in ("last", "best")
        }
        words = [
            word
            for word in self.command
            if "=" not in word and Path(word).suffix not in CONFIGS
        ]
        return {**checkpoints, "command": words}

    def run(self, changed: str) -> int:
        """Exit code of the command, 0 where it need not run. `changed`: keep, anew or "" (say what has changed)."""
        if changed not in ("", "keep", "anew"):
            raise ValueError(f"CHANGED={changed}: give keep or anew")

        there = (self.folder / self.makes).exists()
        complete = (
            there and not self.begun.exists() and (self.done.exists() or not self.training)
        )
        differences = self.differences()

        if complete and not differences:
            return self._say("done already")

        if complete and changed == "keep":
            write_json(self.done, self.reads)
            return self._say("taken as it is")

        if there and self.training and differences and changed != "keep":
            if not changed:
                raise ValueError(self._trained_otherwise(differences))
            self._set_aside()
        elif self.before and differences:
            self._say(f"made again; changed: {brief(differences)}")

        self.folder.mkdir(parents=True, exist_ok=True)
        write_json(self.begun, self.reads)
        self.done.unlink(missing_ok=True)
        self._say(" ".join(self.command))
        code = call(self.command)
        if code:
            return code

        if not (self.folder / self.makes).exists():
            raise ValueError(
                f"{self.folder / self.makes}: not made by {' '.join(self.command)}"
            )

        os.replace(self.begun, self.done)

        return 0

    def differences(self) -> list[str]:
        """What is read now and was not then, in words; empty where all is the same."""
        if self.before is None:
            return ["what it read is not recorded"]
        return differences(self.before, self.reads)

    def _trained_otherwise(self, differences: list[str]) -> str:
        if self.before is None:
            known = "holds a training that did not record what it read (of an earlier version, or without main.sh)"
        else:
            known = f"trained from something else: {brief(differences)}"

        return (
            f"{self.folder}: {known}; run again with CHANGED=keep before the command to take it as it is, or with "
            "CHANGED=anew to set it aside and train again"
        )

    def _set_aside(self) -> None:
        """Give the run's folder another name; nothing is deleted."""
        n = 1
        while (aside := self.folder.with_name(f"{self.folder.name}.old-{n}")).exists():
            n += 1

        os.rename(self.folder, aside)
        self._say(f"the earlier run is now {aside}")

    def _say(self, what: str) -> int:
        print(f"[{self.cfg.name}] {self.makes}: {what}", flush=True)
        return 0


def named_config(command: Sequence[str]) -> tuple[str, list[str]]:
    """The config file and the overrides among a command's words."""
    files = [word for word in command if "=" not in word and Path(word).suffix in CONFIGS]
    if len(files) != 1:
        raise ValueError(f"{' '.join(command)}: names {len(files)} config files, not one")
    return files[0], [word for word in command if "=" in word and not word.startswith("-")]


# What is read -------------------------------------------------------------------------------------------------------


def what_is_read(cfg: Config) -> dict[str, Any]:
    """The values of a config by their dotted keys; digests in place of files and folders."""
    values = _leaves(to_tree(cfg))
    return {key: _or_digest(value) for key, value in values if not _is_harmless(key)}


def _leaves(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of everything in nested mappings that is no mapping."""
    if not isinstance(value, Mapping):
        yield key, value
        return
    for name, item in value.items():
        yield from _leaves(item, f"{key}.{name}" if key else str(name))


def _is_harmless(key: str) -> bool:
    return any(key == known or key.startswith(f"{known}.") for known in HARMLESS)


def _or_digest(value: Any) -> Any:
    """The digest of what a value names, the value itself where it names no file."""
    if not isinstance(value, str) or not ("/" in value or Path(value).suffix):
        return value
    # of a template of files' names; of another value all of it
    folder = value.partition("{")[0]
    return (digest_of(folder) if folder else None) or value


def digest_of(path: str | Path) -> str | None:
    """A digest of what lies at `path`; None where that is nothing, or a folder that does not say what it holds.

    Of a file its bytes; of a checkpoint its manifest; of a run's folder that of its newest checkpoint; of another
    folder the JSON files in it, which say what the others were made from.
    """
    path = Path(path)
    if (path / TRAINING).is_dir():
        path = path / TRAINING / "last"

    path = follow(path)
    if path.is_file():
        with path.open("rb") as file:
            return DIGEST + hashlib.file_digest(file, "sha256").hexdigest()[:16]

    manifest = path / MANIFEST
    records = [manifest] if manifest.is_file() else sorted(path.glob("*.json"))
    if not records:
        return None

    whole = hashlib.sha256()

    for record in records:
        whole.update(record.name.encode() + b"\0" + record.read_bytes())

    return DIGEST + whole.hexdigest()[:16]


# What was read ------------------------------------------------------------------------------------------------------


def _record(path: Path) -> dict[str, Any] | None:
    """What a mark says; None where there is none, or an empty one as earlier versions left."""
    if not path.is_file():
        return None
    try:
        record = load_json(path)
    except ValueError:
        return None

    return record if isinstance(record, dict) else None


def differences(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """In what two records of what was read differ, in words; [] where they are the same."""
    then = {**{key: value for key, value in LATER.items() if key in now}, **then}
    keys = [key for key in {**then, **now} if then.get(key) != now.get(key)]
    return [_difference(key, then.get(key), now.get(key)) for key in keys]


def _difference(key: str, then: Any, now: Any) -> str:
    if any(isinstance(value, str) and value.startswith(DIGEST) for value in (then, now)):
        return f"the file of {key}"
    return f"{key} (was {shown(then)}, is {shown(now)})"


def brief(differences: list[str], most: int = 3) -> str:
    """The first of them, and how many more there are."""
    more = len(differences) - most
    return ", ".join(differences[:most]) + (f" and {more} more" if more > 0 else "")


# Running ------------------------------------------------------------------------------------------------------------


def call(command: Sequence[str]) -> int:
    """Run a command to its end, whatever signal arrives: the command decides what an interrupt means."""
    try:
        child = subprocess.Popen(command)
    except OSError as error:
        raise ValueError(f"{command[0]}: cannot be run ({error.strerror})") from error

    # from the keyboard it reaches the command itself
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    terminated = signal.signal(signal.SIGTERM, lambda number, frame: child.terminate())

    try:
        code = child.wait()
    finally:
        signal.signal(signal.SIGINT, before)
        signal.signal(signal.SIGTERM, terminated)

    return code if code >= 0 else 128 - code


if __name__ == "__main__":
    cli.run(main)
