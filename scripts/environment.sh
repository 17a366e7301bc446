# Sourced by the other scripts: an environment with the project installed in it (the active one, else .venv).
if [ -z "${VIRTUAL_ENV:-}${CONDA_PREFIX:-}" ]; then
    if [ ! -x .venv/bin/python ]; then
        for python in python3.13 python3.12 python3.11 python3; do
            "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && break
            python=
        done
        if [ -z "$python" ]; then
            echo "error: no Python 3.11 or newer found; install one, or activate an environment that has it" >&2
            exit 2
        fi
        echo "making an environment in .venv with $("$python" --version)"
        "$python" -m venv .venv
    fi
    . .venv/bin/activate
fi
if ! python -c 'import fully_sup, pytest, timm, torch' 2>/dev/null; then
    echo "installing the project (PyTorch is a large download)"
    python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
fi
