#!/bin/sh
# Installs the project and runs its tests; further words go to pytest (--slow adds the long ones).
set -eu
cd "$(dirname "$0")/.."
. scripts/environment.sh
exec python -m pytest -n auto --maxprocesses 8 --dist worksteal "$@"
