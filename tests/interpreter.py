"""Triton's interpreter, which runs kernels on the CPU."""

import os
import subprocess
import sys
from pathlib import Path


def run_interpreted(module: str, check: str) -> None:
    """Call `check('cpu')` of a module in a process of its own: Triton chooses its interpreter when it is imported."""
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-c", f"from {module} import {check}; {check}('cpu')"]
    root = Path(__file__).parents[1]
    result = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]
