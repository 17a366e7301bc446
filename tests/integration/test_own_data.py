"""docs/own_data.md as it stands: its files are written, its commands run, on a folder of generated images and masks."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from common.config import load_config
from common.data.catalogue.folder import folder_row
from tests.integration.conftest import ROOT
from uda.config import STAGES

PAGE = ROOT / "docs" / "own_data.md"
BLOCK = re.compile(r"^```(yaml|sh)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
SPLITS = {"train": 16, "val": 4, "rendered": 8}
SIZE = (64, 96)


def blocks(kind: str) -> list[str]:
    return [text for name, text in BLOCK.findall(PAGE.read_text(encoding="utf-8")) if name == kind]


def regions(seed: int, count: int) -> np.ndarray:
    """Class ids in squares of 16, class 0 in two of three."""
    rng = np.random.default_rng(seed)
    small = rng.integers(0, count, (SIZE[0] // 16, SIZE[1] // 16))
    small[rng.random(small.shape) < 0.6] = 0
    return np.kron(small, np.ones((16, 16), int))


def write_set(root: Path, values: np.ndarray, ending: str = "") -> None:
    """Images and masks of every split; `values` are what masks hold for each class, numbers or colours."""
    for split, number in SPLITS.items():
        for k in range(number):
            ids = regions(k, len(values))
            noise = np.random.default_rng(k).integers(0, 40, (*SIZE, 3))
            image = noise + 200 * ids[..., None] // len(values)
            for folder, name, array in (("images", f"b{k}.jpg", image), ("masks", f"b{k}{ending}.png", values[ids])):
                path = root / folder / split / name
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(array.astype(np.uint8)).save(path)


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A working directory like the project's, with the page's files and the data that they describe."""
    here = tmp_path_factory.mktemp("own data")
    for name in ("fully_sup", "semi_sup", "uda", "ltss_benchmark", "scripts"):
        (here / name).symlink_to(ROOT / name)
    for text in blocks("yaml"):
        path = here / re.match(r"# (\S+)\n", text)[1]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)

    write_set(here / "factory", np.array([0, 1, 7, 8]), "_mask")
    write_set(here / "factory/two", np.array([0, 255]))
    write_set(here / "factory/coloured", np.array([[0, 0, 0], [60, 120, 200], [240, 200, 60]]))
    write_set(here / "factory/sixty", np.arange(60))
    return here


def test_every_file_is_a_config_on_the_same_description(place, monkeypatch):
    monkeypatch.chdir(place)
    described = {"name": "factory", "classes": ["belt", "part", "scratch", "dent"], "ignore": [99]}
    files = [path for path in (place / "factory").rglob("*.yaml") if "output" not in path.read_text()]
    assert len(files) > 12

    for path in files:
        if path.stem in ("data", "quick", "small"):
            continue
        cfg = load_config(path)
        sources = [*cfg.data.streams.values(), cfg.data.val]
        row = folder_row(cfg.data.folder)
        assert all(source.folder == cfg.data.folder for source in sources)
        assert row.num_classes == cfg.model.num_classes
        if path.stem not in ("two", "coloured", "sixty"):
            assert {key: cfg.data.folder[key] for key in described} == described


def test_the_page_names_each_step_of_a_pipeline(place):
    assert {path.stem for path in (place / "factory/adapt").glob("*.yaml")} == {"task", *STAGES}


def sections() -> dict[str, list[str]]:
    """The shell blocks below each heading that has some; no section needs what another has trained."""
    parts = PAGE.read_text(encoding="utf-8").split("\n## ")[1:]
    found = {part.partition("\n")[0]: [text for name, text in BLOCK.findall(part) if name == "sh"] for part in parts}
    return {heading: texts for heading, texts in found.items() if texts}


TRAINED = {  # by section, the runs that have to be evaluated in the end
    "Supervised": {"plain", "blv"},
    "Semi-supervised": {"baseline", "usrn"},
    "Adaptation": set(STAGES),
    "LTSS": {"deeplab", "rfs"},
    "Other labels": {"two", "coloured", "sixty"},
}


def test_every_command_is_in_a_section():
    assert sections().keys() == TRAINED.keys()
    assert [text for texts in sections().values() for text in texts] == blocks("sh")


@pytest.mark.slow
@pytest.mark.parametrize("section", TRAINED)
def test_the_page_runs(section, place):
    """Every command, in its order, as a shell runs it; that is three minutes of one core for all of them."""
    quick = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    for block in sections()[section]:
        done = subprocess.run(
            ["sh", "-e", "-c", block],
            cwd=place,
            env={**os.environ, **quick, "PATH": path},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, f"{block}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"

    found = {path.parent.name: path for path in place.glob("*/**/evaluation.json") if path.parent.parent.name != "test"}
    results = {name: json.loads(found[name].read_text()) for name in TRAINED[section]}
    assert {result["dataset"] for result in results.values()} <= {"factory", "two", "coloured", "sixty"}
    reports = re.findall(r"--out (\S+\.html)", "".join(sections()[section]))
    assert all((place / report).is_file() for report in reports)
    if section == "Supervised":
        assert "factory" in (place / "runs/supervised.html").read_text()
        assert len(list((place / "runs/blv/masks").iterdir())) == SPLITS["val"]
