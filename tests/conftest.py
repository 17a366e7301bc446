"""Options and settings that all tests share."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

# Processes that tests start treat deprecations as the tests themselves do (`filterwarnings` in pyproject.toml).
DEPRECATIONS = ("DeprecationWarning", "PendingDeprecationWarning", "FutureWarning")
os.environ.setdefault("PYTHONWARNINGS", ",".join(f"error::{name}" for name in DEPRECATIONS))

if "PYTEST_XDIST_WORKER" in os.environ:  # workers share the cores; more threads than cores make both slower
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402

CAMVID = Path(os.environ.get("LTS_CAMVID", Path(os.environ.get("LTS_DATA", "datasets")) / "camvid"))


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="also run the tests marked slow")


def pytest_collection_modifyitems(config, items):
    if config.getoption("--slow"):
        return
    skip = pytest.mark.skip(reason="slow: run with --slow")
    for item in items:
        if item.get_closest_marker("slow"):  # keywords hold the names of folders, too
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="session")
def integers_that_fit() -> Iterator[None]:
    """`np.where` refuses a Python integer outside the array's type, as from NumPy 2.5 on; older ones wrap it around."""
    where = np.where

    def strict(condition, *choices):
        types = [choice.dtype for choice in choices if isinstance(choice, np.ndarray) and choice.dtype.kind in "iu"]
        for value in (choice for choice in choices if type(choice) is int):
            for kind in types:
                if not np.iinfo(kind).min <= value <= np.iinfo(kind).max:
                    raise OverflowError(f"Python integer {value} out of bounds for {kind}")
        return where(condition, *choices)

    np.where = strict
    yield
    np.where = where


@pytest.fixture(scope="module")
def module_path(tmp_path_factory, request) -> Iterator[Path]:
    """A folder for what the tests of a module share: gone after the last of them, as `tmp_path` is after its one."""
    folder = tmp_path_factory.mktemp(request.module.__name__.rpartition(".")[2])
    yield folder
    shutil.rmtree(folder)


@pytest.fixture
def camvid() -> Path:
    """The root of CamVid (11 classes); the test is skipped where it is absent."""
    if not (CAMVID / "images" / "train").is_dir():
        pytest.skip(f"CamVid is not at {CAMVID} (set LTS_DATA or LTS_CAMVID)")
    return CAMVID
