"""The house rules that a machine can check: imports point one way, files and functions stay short."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from common.lazy import constant_result

ROOT = Path(__file__).resolve().parents[2]
SYSTEMS = ("fully_sup", "semi_sup", "uda", "ltss_benchmark")
# A module may import those before it in this list, and its own package.
ORDER = (
    "files", "lazy", "config", "pickles", "distributed", "console", "data", "ops", "models", "losses", "engine",
    "inference", "metrics", "comparison", "evaluation", "rebalance", "visualize", "report", "experiment", "api", "cli",
    "steps", "jobs",
)  # fmt: skip
FILES = sorted(p for top in ("common", *SYSTEMS, "scripts") for p in (ROOT / top).rglob("*.py"))


def imported(path: Path) -> list[str]:
    names = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.append(node.module)
            if node.module == "common":
                names += [f"common.{alias.name}" for alias in node.names]
    return names


def level(module: str) -> int:
    """The place in ORDER of `common.x…`."""
    return ORDER.index(module.split(".")[1])


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_one_way(path):
    top, *rest = path.relative_to(ROOT).with_suffix("").parts
    for name in imported(path):
        package = name.split(".")[0]
        if top == "common":
            assert package not in SYSTEMS, f"common imports {name}"
            if package == "common" and "." in name and rest != ["__init__"]:
                assert level(name) <= level(f"common.{rest[0]}"), f"{path.name} imports {name}"
        elif top in SYSTEMS:
            assert package not in SYSTEMS or package == top, f"{top} imports {name}"


def test_files_and_functions_stay_short():
    long = []
    for path in FILES:
        text = path.read_text()
        if text.count("\n") > 400:
            long.append(f"{path.relative_to(ROOT)}: {text.count(chr(10))} lines")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef) and node.end_lineno - node.lineno >= 60:
                long.append(f"{path.relative_to(ROOT)}: {node.name} has {node.end_lineno - node.lineno + 1} lines")
    assert not long


def test_options_are_named_by_one_rule():
    """`…Options` are those of a network's `model.options`, `…Config` those of any other section of a config."""
    wrong = []
    for path in FILES:
        text = path.read_text()
        networks = re.findall(r"typed\((\w+), config\.options", text)
        methods = re.findall(r"^    Options = (\w+)$", text, re.MULTILINE)
        wrong += [name for name in networks if not name.endswith("Options")]
        wrong += [name for name in methods if not name.endswith("Config")]
    assert not wrong


def test_programs_give_a_trained_network_the_digits_of_its_training():
    """`train.tf32` holds wherever a network is opened and brought to a device."""
    opened, silent = [], []
    for path in FILES:
        top, *_ = path.relative_to(ROOT).parts
        text = path.read_text()
        if top != "common" and re.search(r"\b(load_model|network_of)\(", text) and ".to(" in text:
            opened.append(path)
            silent += [] if re.search(r"\b(use_tf32|runtime\.configure)\(", text) else [str(path.relative_to(ROOT))]
    assert len(opened) > 6 and not silent


def test_asserts_do_nothing_that_is_needed():
    """`python -O` drops them, so they only compare what is there: no call, whose effect might be wanted."""
    calls = []
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Assert) and any(isinstance(part, ast.Call) for part in ast.walk(node)):
                calls.append(f"{path.relative_to(ROOT)}:{node.lineno}")
    assert not calls


def test_importing_the_core_is_quick_and_needs_no_gpu():
    code = "import time; import common; assert time.process_time() < 3; print('ok')"
    hidden = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=hidden)
    assert done.stdout.strip() == "ok", done.stderr


def test_programs_start_without_what_they_may_not_need():
    """Seconds of a start: the compiler, timm, torchvision, and SciPy's statistics come with their first use."""
    code = "import sys; import scripts.systems, common.api; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    slow = {"torch._dynamo", "sympy", "timm", "torchvision", "scipy.stats", "scipy.optimize", "sklearn", "matplotlib"}
    assert slow & set(done.stdout.split()) == set()


def test_a_constant_result_is_marked_as_torch_marks_it():
    def ours():
        return 1

    def theirs():
        return 1

    constant_result(ours)
    torch.compiler.assume_constant_result(theirs)
    assert vars(ours) == vars(theirs) != {}
