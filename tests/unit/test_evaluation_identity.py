"""What an evaluation says it was of, which ones compare, and the folder that each test of a checkpoint has."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from common.config import EvalConfig, SourceConfig, load_config
from common.data import SegmentationDataset
from common.evaluation.folder import folder_of_test, run_of, write_test
from common.evaluation.identity import differences, has_identity, identity

ROOT = Path(__file__).parents[2]
CONFIG = ROOT / "fully_sup" / "configs" / "toy" / "upernet_r18.yaml"
SLIDING = EvalConfig(mode="slide", crop=(64, 64), stride=(32, 32))


def make(root: Path, names=("a", "b", "c"), classes=(0, 1), ignore=(255,), noise=0) -> SegmentationDataset:
    """A data set of its own folder; its labels' bytes depend on `noise`."""
    rng = np.random.default_rng(noise)
    for name in names:
        for kind in ("images", "labels"):
            (root / kind).mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.zeros((20, 30, 3), np.uint8)).save(root / "images" / f"{name}.png")
        Image.fromarray(rng.integers(0, 2, (20, 30 + noise), dtype=np.uint8)).save(root / "labels" / f"{name}.png")
    folder = {
        "images": "images",
        "labels": "labels",
        "classes": ["ground", "thing"],
        "label_map": {value: k for k, value in enumerate(classes)},
        "ignore": list(ignore),
    }
    return SegmentationDataset(SourceConfig(dataset="folder", root=str(root), split="", folder=folder))


def result(dataset: SegmentationDataset, cfg: EvalConfig | None = None, indices=None) -> dict:
    cfg = cfg or EvalConfig()
    made = identity(dataset, range(len(dataset)) if indices is None else indices, cfg)
    return {"identity": json.loads(json.dumps(made)), "convention": cfg.convention}


def test_the_same_files_elsewhere_are_the_same(tmp_path):
    one, two = make(tmp_path / "here"), make(tmp_path / "there")
    assert result(one) == result(two)
    assert differences(result(one), result(two, indices=[2, 0, 1])) == [], "order does not matter"


def test_other_files_differ(tmp_path):
    base = result(make(tmp_path / "base"))
    others = {
        "fewer images": result(make(tmp_path / "base"), indices=[0, 1]),
        "another name": result(make(tmp_path / "names", names=("a", "b", "d"))),
        "another label file": result(make(tmp_path / "labels", noise=1)),
    }
    for what, other in others.items():
        parts = differences(other, base)
        assert len(parts) == 1 and parts[0].startswith("other images or label files"), what
    assert "2 images against" in differences(others["fewer images"], base)[0]


def test_other_meanings_of_the_same_files_differ(tmp_path):
    base = result(make(tmp_path))
    for other in (make(tmp_path, classes=(1, 0)), make(tmp_path, ignore=(254, 255))):
        assert differences(result(other), base)[0].startswith("other classes or label values")


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"flip": True}, ["flip True against False"]),
        ({"logit_adjustment": 0.5}, ["logit_adjustment 0.5 against 0.0"]),
        ({"scales": (0.5, 1.0)}, ["scales [0.5, 1.0] against [1.0]"]),
        ({"short_edge": 512, "max_edge": 2048}, ["short_edge 512 against none", "max_edge 2048 against none"]),
        ({"convention": "ltss"}, ["convention ltss against nan_mean"]),
        ({"mode": "slide", "crop": (8, 9)}, ["mode slide against whole", "crop [8, 9]", "stride [8, 9]"]),
        (
            {"mode": "slide", "crop": (8, 9), "window_softmax": True},
            ["mode slide against whole", "crop [8, 9]", "stride [8, 9]", "window_softmax True against False"],
        ),
        (
            {"mode": "slide", "crop": (8, 9), "windows": "cut"},
            ["cut_windows True against False", "mode slide against whole", "crop [8, 9]", "stride [8, 9]"],
        ),
        ({"crop": (8, 9)}, []),  # of no effect without sliding windows
        ({"batch_size": 4, "workers": 0, "window_batch": 1, "panels": 0, "best": "macc"}, []),
    ],
)
def test_settings_that_change_a_score_differ(tmp_path, change, expected):
    data = make(tmp_path)
    parts = differences(result(data, EvalConfig(**change)), result(data))
    assert len(parts) == len(expected) and all(p.startswith(e) for p, e in zip(parts, expected, strict=True))


def test_results_without_an_identity_compare_by_what_they_say(tmp_path):
    known = result(make(tmp_path)) | {"dataset": "folder", "images": 3}
    old = {"dataset": "folder", "images": 3, "convention": "nan_mean"}
    assert not has_identity(old) and has_identity(known)
    assert differences(old, known) == []
    assert differences({**old, "images": 500}, known) == ["images 500 against 3"]
    adjusted = result(make(tmp_path / "b"), EvalConfig(logit_adjustment=0.5))
    assert "logit_adjustment 0.5 against 0.0" in differences(adjusted, old)
    assert differences(known, {**old, "dataset": "cityscapes"}) == ["dataset folder against cityscapes"]


# The folder of a test ---------------------------------------------------------------------------------------------


@pytest.fixture
def cfg(tmp_path):
    return load_config(CONFIG, [f"output={tmp_path}", "name=run"])


def checkpoint(folder: Path, step: int, content: bytes) -> Path:
    path = folder / "checkpoints" / f"step_{step:08d}"
    path.mkdir(parents=True)
    (path / "model.safetensors").write_bytes(content)
    return path


def test_every_checkpoint_and_setting_has_a_folder_of_its_own(cfg, tmp_path):
    data, sliding = make(tmp_path / "data"), dataclasses.replace(cfg, eval=SLIDING)
    augmented = dataclasses.replace(cfg, eval=dataclasses.replace(cfg.eval, flip=True))
    first, second = checkpoint(tmp_path / "run", 4, b"first"), checkpoint(tmp_path / "run", 8, b"second")
    elsewhere = checkpoint(tmp_path / "other", 4, b"third")
    official = tmp_path / "official.pth"
    official.write_bytes(b"fourth")

    folders = [
        *(folder_of_test(cfg, data, path) for path in (first, second, elsewhere, official)),
        folder_of_test(cfg, data, first, "teacher"),
        folder_of_test(augmented, data, first),
        folder_of_test(sliding, data, first),
        folder_of_test(cfg, make(tmp_path / "data", names=("a",)), first, "teacher"),
    ]
    names = [folder.name.rpartition("-")[0] for folder in folders]
    assert names[:4] == ["step_00000004", "step_00000008", "step_00000004", "official"]
    assert names[4:6] == ["step_00000004_teacher", "step_00000004_tta"]
    assert len(set(folders[:7])) == 7
    assert {folder.parent for folder in folders} == {tmp_path / "run" / "test"}


def test_links_and_files_name_the_checkpoint_that_they_lead_to(cfg, tmp_path):
    data, path = make(tmp_path / "data"), checkpoint(tmp_path / "run", 4, b"first")
    (path.parent / "best").symlink_to(path.name)
    (path.parent / "last").write_text(f"link: {path.name}\n")  # where there are no symbolic links
    folders = (tmp_path / "run", path, path.parent / "last", path.parent / "best")
    files = (path / "model.safetensors", path.parent / "best" / "model.safetensors")
    assert len({folder_of_test(cfg, data, way) for way in (*folders, *files)}) == 1


def test_a_test_leaves_what_reports_need(cfg, tmp_path, capsys):
    folder = folder_of_test(cfg, make(tmp_path / "data"), checkpoint(tmp_path / "run", 4, b"first"))
    write_test(folder, cfg, {"miou": 0.5})
    assert json.loads((folder / "evaluation.json").read_text()) == {"miou": 0.5}
    assert load_config(folder / "config.yaml") == cfg
    record = json.loads((folder / "run.json").read_text())
    assert run_of(folder, record) == tmp_path / "run" and run_of(folder, {"name": "a run below test/"}) is None
    assert capsys.readouterr().out == f"scores written to {folder / 'evaluation.json'}\n"
