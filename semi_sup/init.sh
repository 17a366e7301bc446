#!/bin/sh
# Sets up the environment as scripts/test.sh does: the active one, else .venv, with the project installed in it.
# Nothing is compiled: clustering.py does what the release builds a program for.
set -eu
cd "$(dirname "$0")/.."
was_active=${VIRTUAL_ENV:-${CONDA_PREFIX:-}}
. scripts/environment.sh
echo "ready: $(python --version) in ${VIRTUAL_ENV:-${CONDA_PREFIX:-}}"
[ -n "$was_active" ] || echo "activate it before the other commands: . $PWD/.venv/bin/activate"
