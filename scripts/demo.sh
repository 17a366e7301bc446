#!/bin/sh
# From nothing to a report: installs the project, makes the toy set, trains a baseline and BLV, compares them.
set -eu
cd "$(dirname "$0")/.."
. scripts/environment.sh
exec python scripts/demo.py "$@"
