"""Running many commands side by side, and stopping them so that they can go on another time."""

import contextlib
import fcntl
import os
import shlex
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from common import console
from common.engine.runtime import stop_signals
from common.jobs.plan import ROOT, Run
from common.jobs.state import LOG, State, mark_of, reads, refuse_others, state_of, write_mark

PATIENCE = 300  # seconds that a command gets to save and end when it is asked to
PAUSE = 0.05  # seconds between two looks at what runs
NO_PROGRAM = 127  # the exit code by which shells say that there is no such program


@dataclass
class Ended:
    """How `run_all` ended: the runs by state, and the signal that stopped it (0: none)."""

    done: list[Run] = field(default_factory=list)
    failed: list[Run] = field(default_factory=list)
    unfinished: list[Run] = field(default_factory=list)
    signal: int = 0


def run_all(
    runs: Sequence[Run], at_once: int = 1, minutes: float | None = None, show: bool = False
) -> Ended:
    """Run what is not finished, `at_once` at a time, in order; a failed run stops no other, but those `after` it.

    minutes: then, or at SIGTERM or Ctrl-C, every command gets SIGTERM, and PATIENCE to save and end. show: commands
    write to the console in place of files. Raises ValueError, before anything is run, where a finished run is another.
    """
    refuse_others(runs)
    ended = Ended(done=[run for run in runs if state_of(run) == "done"])
    waiting = [run for run in runs if run not in ended.done]
    if not waiting:
        return ended

    _prepare(waiting)
    deadline = float("inf") if minutes is None else time.monotonic() + 60 * minutes

    with stop_signals() as received:
        active: list[_Active] = []
        try:
            while not received and time.monotonic() < deadline:
                _collect(active, ended, len(runs))
                _start_next(waiting, active, ended, runs, at_once, show)
                if not active:
                    break  # all is done, or waits for runs that failed

                time.sleep(PAUSE)
        finally:
            _stop(active, ended, len(runs))

    ended.unfinished += waiting
    ended.signal = received[0] if received else 0

    return ended


def _prepare(runs: Sequence[Run]) -> None:
    """Run each command of `prepare` once. ValueError where one fails."""
    wanted = {(run.cwd, words): None for run in runs for words in run.prepare}
    for cwd, words in wanted:
        environment = {**os.environ, "PYTHONPATH": _python_path()}
        code = subprocess.run(words, cwd=cwd, env=environment).returncode
        if code:
            raise ValueError(f"{shlex.join(words)}: ended with exit code {code}")


def _python_path() -> str:
    """The repository comes first, whatever is installed, so that commands run the code that lies beside them."""
    rest = os.environ.get("PYTHONPATH")
    return f"{ROOT}{os.pathsep}{rest}" if rest else str(ROOT)


def _start_next(
    waiting: list[Run],
    active: list["_Active"],
    ended: Ended,
    runs: Sequence[Run],
    at_once: int,
    show: bool,
) -> None:
    """Start runs out of `waiting` until `at_once` are active."""
    while len(active) < at_once and (run := _next(waiting, ended, runs)):
        try:
            item = _start(run, show)
        except (
            OSError,
            ValueError,
        ) as error:  # its config or files have changed meanwhile, or no such program
            console.say(f"{run.title}: cannot be run: {error}")
            ended.failed.append(run)
            continue

        if item is None:
            console.say(f"{run.title}: another process runs it; left alone")
            ended.unfinished.append(run)
            continue

        console.say(f"{run.title}: started" + ("" if show else f", log: {run.folder / LOG}"))
        active.append(item)


def _next(waiting: list[Run], ended: Ended, runs: Sequence[Run]) -> Run | None:
    """Take the first run out of `waiting` that need not wait for another."""
    done = {run.folder for run in ended.done}
    planned = {run.folder for run in runs}

    for run in waiting:
        first = run.cwd / run.output / run.after  # `after` is a label, as the run's own
        if not run.after or first in done or first not in planned:
            waiting.remove(run)
            return run

    return None


# One command --------------------------------------------------------------------------------------------------------


@dataclass
class _Active:
    """A command that runs; its log stays locked while it does, even if this process dies."""

    run: Run
    process: subprocess.Popen
    read: Mapping[str, Any]  # what the run read when it began
    started: float
    before: float  # minutes of earlier calls

    @property
    def minutes(self) -> float:
        return self.before + (time.monotonic() - self.started) / 60


def _start(run: Run, show: bool) -> _Active | None:
    """Start a run's command; None where another process runs it. Raises OSError or ValueError where it cannot be."""
    before = mark_of(run).get("minutes", 0.0)
    run.folder.mkdir(parents=True, exist_ok=True)

    with (run.folder / LOG).open("ab") as log:
        if not _lock(log.fileno()):
            return None

        read = reads(run)
        write_mark(run, "running", read, before)
        output = None if show else log

        try:
            process = subprocess.Popen(
                run.command, cwd=run.cwd, stdin=subprocess.DEVNULL, stdout=output, stderr=output,
                env=_environment(run), start_new_session=True, pass_fds=(log.fileno(),),
            )  # fmt: skip
        except OSError as error:
            log.write(f"{run.command[0]}: {error.strerror}\n".encode())
            write_mark(run, "failed", read, before, NO_PROGRAM)
            raise

    return _Active(run, process, read, time.monotonic(), before)


def _environment(run: Run) -> dict[str, str]:
    return {**os.environ, **run.environment, "PYTHONPATH": _python_path()}


def _lock(file: int) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False

    return True


def _collect(active: list[_Active], ended: Ended, total: int, stopping: bool = False) -> None:
    """Take commands that have ended out of `active`, and leave their marks."""
    for item in [item for item in active if item.process.poll() is not None]:
        active.remove(item)
        code = item.process.returncode
        state = _state(code, stopping)
        write_mark(item.run, state, item.read, item.minutes, code)

        lists = {"done": ended.done, "failed": ended.failed, "stopped": ended.unfinished}
        lists[state].append(item.run)
        console.say(
            f"[{len(ended.done)}/{total}] {item.run.title}: {state} after {item.minutes:.1f} minutes"
        )


def _state(code: int, stopping: bool) -> State:
    """What an exit code means; `stopping`: the command had been asked to end."""
    if not code:
        return "done"
    return (
        "stopped" if stopping or code in (128 + signal.SIGTERM, -signal.SIGTERM) else "failed"
    )


def _stop(active: list[_Active], ended: Ended, total: int) -> None:
    """Ask what still runs to save and end, and wait for it; who does not listen is killed."""
    for item in active:
        _signal(item, signal.SIGTERM)

    until = time.monotonic() + PATIENCE

    while active:
        _collect(active, ended, total, stopping=True)
        if time.monotonic() > until:
            for item in active:
                _signal(item, signal.SIGKILL)

        time.sleep(PAUSE)


def _signal(item: _Active, kind: signal.Signals) -> None:
    """To the command and all that it has started; a shell would not pass it on."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(item.process.pid, kind)
