"""Fixtures for the tests of whole programs: toy scenes, a small config, and calls that have to fail."""

import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import save_file

from common import cli
from common.config import load_config
from common.data import DATASETS, toy
from common.models import build_model


@pytest.fixture
def unchanged(monkeypatch):
    """What programs set for a whole process does not reach other tests."""
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)
    for name in {row.env for row in DATASETS.values()}:
        monkeypatch.setenv(name, "/nowhere")
    threads, exact = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    yield
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(exact)


@pytest.fixture
def one_thread():
    """Where maps are so small that more threads only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def scenes(tmp_path_factory) -> Path:
    return toy.make("cityscapes", tmp_path_factory.mktemp("scenes") / "cityscapes", train=3, val=2, size=(64, 128))


TREE = {
    "model": {
        "name": "upernet", "backbone": "resnet18", "num_classes": 19, "norm": "bn",
        "options": {"channels": 16, "auxiliary": False},
    },
    "data": {
        "dataset": "cityscapes", "workers": 0,
        "streams": {"labeled": {"batch_size": 2, "augment": {"recipe": "mmseg", "crop": [32, 64]}}},
    },
    "method": {"heads": {"decode": {}}},
}  # fmt: skip


@pytest.fixture
def config(scenes, tmp_path) -> Path:
    path = tmp_path / "small.yaml"
    path.write_text(yaml.safe_dump(TREE | {"output": str(tmp_path), "data": TREE["data"] | {"root": str(scenes)}}))
    return path


@pytest.fixture
def weights(config, tmp_path) -> Path:
    path = tmp_path / "small.safetensors"
    save_file(build_model(load_config(config).model).state_dict(), path)
    return path


@pytest.fixture
def call(monkeypatch, capsys) -> Callable[..., str]:
    """Run a program's main with these words; returns what it prints."""

    def run(main, *words) -> str:
        monkeypatch.setattr(sys, "argv", ["program.py", *map(str, words)])
        assert not main()
        return capsys.readouterr().out

    return run


@pytest.fixture
def fails(monkeypatch, capsys) -> Callable[..., str]:
    """Run a program that must end with exit code 2; returns its one line."""

    def run(main, *words) -> str:
        monkeypatch.setattr(sys, "argv", ["program.py", *map(str, words)])
        with pytest.raises(SystemExit) as end:
            cli.run(main)
        lines = capsys.readouterr().err.strip().splitlines()
        assert end.value.code == 2 and lines[-1].startswith("error: "), lines
        assert sum(line.startswith("error") for line in lines) == 1 and "Traceback" not in "".join(lines)
        return lines[-1]

    return run


@pytest.fixture
def root(tmp_path, monkeypatch):
    """An empty root of the LTSS data sets, for a preparation script called without arguments."""
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    monkeypatch.setattr(os, "cpu_count", lambda: 1)  # no processes but where a test wants them
    monkeypatch.setattr(sys, "argv", ["prepare"])
    return tmp_path
