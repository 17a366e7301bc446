"""USRN's first command sets up the environment as the other scripts do."""

import os
import subprocess
from pathlib import Path

INIT = Path(__file__).resolve().parents[2] / "semi_sup" / "init.sh"

FAKE = """#!/bin/sh
echo "$*" >>"$LOG"
case "$*" in
*--version*) echo Python 3.13.0 ;;
*version_info*) ;;
*import*) [ -e "$LOG.installed" ] ;;
*pip*) : >"$LOG.installed" ;;
*venv*) mkdir -p .venv/bin && cp "$0" .venv/bin/python && echo "VIRTUAL_ENV=$PWD/.venv" >.venv/bin/activate ;;
esac
"""


def run(root, place, **variables):
    """init.sh of a copy of the tree, started in `place`, with programs that only write down their arguments."""
    programs = root / "programs"
    programs.mkdir(exist_ok=True)
    for name in ("python", "python3.13"):
        (programs / name).write_text(FAKE)
        (programs / name).chmod(0o755)
    for path in (INIT, INIT.parents[1] / "scripts" / "environment.sh"):
        copy = root / path.relative_to(INIT.parents[1])
        copy.parent.mkdir(exist_ok=True)
        copy.write_text(path.read_text())
    hidden = ("VIRTUAL_ENV", "CONDA_PREFIX")
    env = {key: value for key, value in os.environ.items() if key not in hidden}
    env |= {"PATH": f"{programs}:{env['PATH']}", "LOG": str(root / "log"), **variables}
    script = os.path.relpath(root / "semi_sup" / "init.sh", place)
    return subprocess.run(["sh", script], cwd=place, env=env, capture_output=True, text=True, timeout=600)


def test_the_active_environment_gets_the_project(tmp_path):
    done = run(tmp_path, tmp_path, VIRTUAL_ENV="/there")
    assert done.returncode == 0, done.stderr
    assert "--editable .[dev]" in (tmp_path / "log").read_text() and "venv" not in (tmp_path / "log").read_text()
    assert done.stdout.endswith("ready: Python 3.13.0 in /there\n")


def test_without_one_an_environment_is_made(tmp_path):
    (tmp_path / "semi_sup").mkdir()
    done = run(tmp_path, tmp_path / "semi_sup")
    assert done.returncode == 0, done.stderr
    assert "-m venv .venv" in (tmp_path / "log").read_text()
    assert f"activate it before the other commands: . {tmp_path}/.venv/bin/activate" in done.stdout
    again = run(tmp_path, tmp_path / "semi_sup")
    assert again.returncode == 0 and (tmp_path / "log").read_text().count("--editable") == 1
