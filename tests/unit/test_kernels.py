"""The Triton kernels are compiled for an H200, from what starts them to machine code; no GPU is needed."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

# Of a multiprocessor of the architecture sm_90 (CUDA C++ Programming Guide, "Compute Capabilities").
REGISTERS = 65536
SHARED = 227 * 1024

ORDINARY = ["BLV", "all weights"]
QUERIES = ["queries", "queries, another size", "queries, many"]
FURTHER = ["stride 32", "stride 1", "gaussian", "uniform", "beta", "exponential"]
ATTENTION = ["attention", "attention, exact places", "attention, float32", "attention, float64"]


def missing() -> str | None:
    if find_spec("triton") is None:
        return "Triton is not installed"

    from triton.backends import backends

    return None if "nvidia" in backends else "this Triton does not compile for NVIDIA"


needs_compiler = pytest.mark.skipif(missing() is not None, reason=missing() or "")


def compile_all(names: list[str], cache: Path) -> list[dict]:
    """In a process of their own, as the driver of Triton is replaced, into an empty cache."""
    command = [sys.executable, "-m", "tests.unit.compiled_kernels", *names]
    environment = {**os.environ, "TRITON_CACHE_DIR": str(cache)}
    environment.pop("TRITON_INTERPRET", None)
    root = Path(__file__).parents[2]
    result = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-4000:]

    rows = [json.loads(line) for line in result.stdout.splitlines()]
    for row in rows:
        print(row)
    return rows


@needs_compiler
def test_kernels_compile_for_an_h200(tmp_path):
    """Nothing is kept outside registers, and two programs at least share a multiprocessor."""
    rows = compile_all(ORDINARY, tmp_path)
    kernels = [row["kernel"] for row in rows]
    assert kernels == ["_loss_kernel", "_gradient_kernel", "_label_kernel"] * len(ORDINARY)

    for row in rows:
        assert row["stack"] == 0, row
        assert 2 * row["threads"] * row["registers"] <= REGISTERS, row
        assert 2 * row["shared"] <= SHARED, row


@needs_compiler
def test_labels_of_queries_compile_for_an_h200(tmp_path):
    """Two programs share a multiprocessor, but where an image is resized twice, or masks outnumber a block."""
    rows = compile_all(QUERIES, tmp_path)
    assert [row["kernel"] for row in rows] == ["_label_kernel"] * len(QUERIES)
    assert all(row["stack"] == 0 and 2 * row["shared"] <= SHARED for row in rows)
    assert all(row["threads"] * row["registers"] <= REGISTERS for row in rows)
    assert 2 * rows[0]["threads"] * rows[0]["registers"] <= REGISTERS


@pytest.mark.slow
@needs_compiler
def test_further_kernels_compile_for_an_h200(tmp_path):
    """Other strides, precisions and noises; where few cells make many pixels, some numbers are kept in memory."""
    assert all(row["stack"] == 0 for row in compile_all([*FURTHER, *ATTENTION], tmp_path))
    assert all(row["stack"] <= 256 for row in compile_all(["stride 64"], tmp_path))
