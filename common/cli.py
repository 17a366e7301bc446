"""What the command lines of the four systems share: arguments, one-line errors, exit codes."""

import argparse
import os
import sys
import warnings
from collections.abc import Callable, Sequence


def run(main: Callable[[], int | None]) -> None:
    """Call `main` and exit with its code; bad input ends in one line and exit code 2.

    LTS_TRACEBACK=1 shows where an error came from.
    """
    warnings.showwarning = _one_line_warning
    try:
        code = main()
    except (ValueError, OSError) as error:
        if os.environ.get("LTS_TRACEBACK"):
            raise
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
        code = 2
    sys.exit(code or 0)


def _one_line_warning(message, category, filename, lineno, file=None, line=None) -> None:
    print(f"warning: {message}", file=sys.stderr)


def train_parser(description: str) -> argparse.ArgumentParser:
    """CONFIG [--resume] [key=value …]"""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("config", help="YAML or JSON config")
    parser.add_argument("overrides", nargs="*", help="values to change, as section.key=value")
    parser.add_argument("--resume", action="store_true", help="go on from the run's newest checkpoint")
    parser.add_argument("--device", help="cpu, cuda or cuda:N; default: a GPU where there is one")
    return parser


def split_overrides(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Separate key=value words from the others."""
    return [w for w in words if "=" not in w], [w for w in words if "=" in w]
