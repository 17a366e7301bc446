"""A toy data set, small configs and a way to call the command lines, for the tests of whole runs."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from common.data.toy.write import make

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def toy(tmp_path_factory) -> Path:
    """Twelve training and five validation scenes of 64 × 128 in Cityscapes' layout."""
    root = tmp_path_factory.mktemp("toy")
    make("cityscapes", root, train=12, val=5, size=(64, 128), seed=0, domain="day")
    return root


@pytest.fixture
def config(toy, tmp_path) -> Path:
    """A UPerNet with BLV that trains 20 steps in seconds."""
    tree = {
        "name": "run",
        "output": str(tmp_path),
        "model": {
            "name": "upernet",
            "backbone": "resnet18",
            "num_classes": 19,
            "norm": "bn",
            "options": {"channels": 16, "auxiliary_channels": 8},
        },
        "data": {
            "dataset": "cityscapes",
            "root": str(toy),
            "cache": str(toy / "cache"),
            "workers": 0,
            "streams": {"labeled": {"batch_size": 4, "augment": {"recipe": "mmseg", "crop": [32, 64]}}},
        },
        "method": {"heads": {"decode": {}, "aux": {"weight": 0.4}}},
        "remedies": {"logits": {"name": "blv"}},
        "optim": {"lr": 0.01},
        "train": {"steps": 20, "log_every": 1, "save_every": 3, "threads": 1},
        "eval": {"every": 100, "workers": 0, "panels": 1},
    }
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def command(*words: str, **environment: str) -> subprocess.Popen:
    """Start `python WORDS…` in the repository, its output in pipes."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, *map(str, words)], cwd=ROOT, env=env, **pipes)


def call(*words: str, expect: int = 0, **environment: str) -> str:
    """Run `python WORDS…` to its end; returns its output, after checking the exit code."""
    process = command(*words, **environment)
    out, err = process.communicate(timeout=600)
    assert process.returncode == expect, out + err
    return out + err


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """The newest weights of the run in `folder`."""
    return load_file(folder / "checkpoints" / "last" / "model.safetensors")


def assert_equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    """Bit for bit."""
    assert a.keys() == b.keys()
    different = [name for name in a if not a[name].equal(b[name])]
    assert not different, different[:5]
