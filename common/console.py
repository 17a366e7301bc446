"""The console: progress bars, notices, one-line warnings, and output whose reader may leave.

`--quiet` (or LTS_QUIET=1) leaves results, warnings and errors.
"""

import contextlib
import logging
import os
import sys
import warnings
from collections.abc import Iterable, Iterator
from typing import Any, TextIO

from tqdm import tqdm

# an environment variable, so that the ranks that a program starts are quiet too
QUIET = "LTS_QUIET"
PROJECT = ("common", "fully_sup", "semi_sup", "uda", "ltss_benchmark")  # whose log is shown


def first_rank() -> bool:
    """Whether this process speaks for all ranks (torch is not imported to know that)."""
    return os.environ.get("RANK", "0") == "0"


def quiet() -> bool:
    return os.environ.get(QUIET, "0") not in ("", "0")


def silence() -> None:
    """From now on be quiet."""
    os.environ[QUIET] = "1"
    for name in PROJECT:
        logging.getLogger(name).setLevel(logging.WARNING)


def say(text: str) -> None:
    """Print a notice, one that `--quiet` leaves out."""
    if not quiet():
        print(text, flush=True)


def bar(
    items: Iterable[Any] | None = None,
    *,
    what: str,
    total: int | None = None,
    unit: str = "image",
) -> tqdm:
    """A progress bar over `items`, or one to `update`: on rank 0, on a terminal, and never in a log file."""
    hidden = True if quiet() or not first_rank() else None  # None: where stderr is no terminal
    return tqdm(
        items, desc=what, total=total, unit=unit, mininterval=0.5, leave=False, disable=hidden
    )


@contextlib.contextmanager
def shown() -> Iterator[None]:
    """Within, the project's log and warnings reach stderr as plain lines, and a closed pipe is no error."""
    before = sys.stdout, sys.stderr, warnings.showwarning
    sys.stdout, sys.stderr = _Output(sys.stdout), _Output(sys.stderr)
    warnings.showwarning = _one_line_warning

    try:
        with _shown_log():
            yield
    finally:
        sys.stdout.flush()
        sys.stdout, sys.stderr, warnings.showwarning = before


class _Output:
    """A stream that swallows what is written after its reader has left (`… | head`): the work continues to its end."""

    def __init__(self, stream: TextIO):
        self._stream = stream

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except BrokenPipeError:
            self._leave()
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except BrokenPipeError:
            self._leave()

    def _leave(self) -> None:
        """Lead what is still buffered, and all that follows, nowhere."""
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self._stream.fileno())
        os.close(nowhere)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextlib.contextmanager
def _shown_log() -> Iterator[None]:
    """Messages of the project's loggers, from INFO on, on rank 0; other libraries keep their own settings."""
    if not first_rank():
        yield
        return

    handler = logging.StreamHandler()
    loggers = [logging.getLogger(name) for name in PROJECT]
    before = [logger.level for logger in loggers]

    for logger in loggers:
        logger.addHandler(handler)
        logger.setLevel(logging.WARNING if quiet() else logging.INFO)

    try:
        yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.removeHandler(handler)
            logger.setLevel(level)


def _one_line_warning(message, category, filename, lineno, file=None, line=None) -> None:
    print(f"warning: {message}", file=sys.stderr)
