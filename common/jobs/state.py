"""How far a run is: the mark `job.json` in its folder says what it read, and how its last call ended."""

import contextlib
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from common.config import load_config
from common.files import load_json, write_json
from common.jobs.plan import Run
from common.steps import CONFIGS, TRAINING, brief, differences, named_config, what_is_read

MARK = "job.json"
LOG = "job.log"
State = Literal["new", "running", "stopped", "failed", "done"]
LEFT: Mapping[str, str] = {  # what a state means for the next call
    "new": "not begun",
    "running": "was killed, or runs",
    "stopped": "goes on",
    "failed": "tried again",
    "done": "skipped",
}


def mark_of(run: Run) -> dict[str, Any]:
    """The mark of a run's last call; {} where there is none."""
    try:
        mark = load_json(run.folder / MARK)
    except (OSError, ValueError):
        return {}

    return mark if isinstance(mark, dict) else {}


def state_of(run: Run) -> State:
    return mark_of(run).get("state", "new")


def write_mark(
    run: Run, state: State, read: Mapping[str, Any], minutes: float, code: int | None = None
) -> None:
    """Leave a mark. read: `reads(run)` when the command began. minutes: of all calls together."""
    mark = {
        "state": state,
        "code": code,
        "minutes": round(minutes, 2),
        "command": shlex.join(run.command),
        "reads": read,
    }
    write_json(run.folder / MARK, mark)


def reads(run: Run) -> dict[str, Any]:
    """What a run's result depends on.

    Of a command that names one config: its values, digests of the files that they name, and the command's other words;
    of another command its words and its environment. Raises ConfigError where the config is wrong.
    """
    environment = {f"${key}": value for key, value in run.lasting_environment.items()}
    words = list(run.lasting[1:])  # the interpreter, or program, may lie elsewhere
    configs = [word for word in words if "=" not in word and Path(word).suffix in CONFIGS]
    if len(configs) != 1:
        return {"command": words, **environment}

    with contextlib.chdir(run.cwd):
        values = what_is_read(load_config(*named_config(words)))

    others = [word for word in words if "=" not in word and word not in configs]

    return {"command": others, **environment, **values}


def refuse_others(runs: Sequence[Run]) -> None:
    """Raise ValueError where a run that is finished, or begun, is not the one that would be run now."""
    for run in runs:
        now = reads(run)
        mark = mark_of(run)
        begun = (
            mark.get("state") in ("done", "stopped", "running")
            or (run.folder / TRAINING).exists()
        )
        changed = differences(mark["reads"], now) if begun and "reads" in mark else []
        if changed:
            was = "is finished" if mark["state"] == "done" else "was begun"
            raise ValueError(
                f"{run.folder}: {was} as another run: {brief(changed)}; change `output` or the run's name, or remove "
                "that folder"
            )


def table(runs: Sequence[Run]) -> str:
    """State, name, minutes and remark of every run, a line each."""
    rows = [("state", "run", "minutes", "")]
    for run in runs:
        mark = mark_of(run)
        state = state_of(run)
        minutes = f"{mark['minutes']:.1f}" if mark else ""
        remark = (
            f"exit code {mark['code']}: {last_line(run)}" if state == "failed" else LEFT[state]
        )
        rows.append((state, run.title, minutes, remark))

    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    lines = [
        f"{state:<{widths[0]}}  {name:<{widths[1]}}  {minutes:>{widths[2]}}  {remark}".rstrip()
        for state, name, minutes, remark in rows
    ]

    return "\n".join(lines)


def last_line(run: Run, most: int = 160) -> str:
    """The last line of a run's log that is not empty, where the error stands."""
    try:
        text = (run.folder / LOG).read_text(errors="replace")
    except OSError:
        return "no log"

    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:most] if lines else "the log is empty"
