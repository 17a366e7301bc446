"""What docs/extending.md says, done: its blocks are taken from the page, put where it says, and used."""

import importlib
import re
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml

from common.config import Config, ModelConfig, SourceConfig, TrainConfig, load_config
from common.data import SegmentationDataset, make_streams
from common.data.recipes.build import build_transform
from common.engine import rehearse
from common.files import load_json
from common.losses.build import LossContext, build_loss
from common.losses.counts import Counts
from common.models import build_model
from common.steps import Step
from semi_sup.config import build_method
from tests.contexts import context
from tests.unit.data_files import classes, make_folder, picture, save

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
TABLES = {
    "common/data/catalogue/registry.py": "DATASETS",
    "common/models/backbones/__init__.py": "BACKBONES",
    "common/losses/build.py": "LOSSES",
    "common/data/recipes/build.py": "RECIPES",
    "semi_sup/config.py": "METHODS",
}


def blocks() -> dict[str, str]:
    """First line of each block, without its `# `, to the block."""
    found = re.findall(r"^```\w+\n(# ([^\n]+)\n.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    return {title: text for text, title in found}


BLOCKS = blocks()


@pytest.fixture
def module(monkeypatch):
    """Makes the module of a file that the page shows, under its own name."""

    def make(path: str) -> ModuleType:
        name = path.removesuffix(".py").replace("/", ".")
        made = ModuleType(name)
        monkeypatch.setitem(sys.modules, name, made)
        exec(compile(BLOCKS[path], path, "exec"), made.__dict__)
        return made

    return make


@pytest.fixture
def row(monkeypatch):
    """Adds a row that the page shows to its table, as if it stood there with its import."""

    def add(path: str, made: ModuleType) -> None:
        table = importlib.import_module(path.removesuffix("/__init__.py").removesuffix(".py").replace("/", "."))
        text = BLOCKS[f"row of {TABLES[path]} in {path}"]
        for key, value in eval(f"{{{text}}}", {**vars(table), **vars(made)}).items():
            monkeypatch.setitem(getattr(table, TABLES[path]), key, value)

    return add


def test_every_block_is_a_known_one():
    """No block of code on the page is left out of these tests."""
    assert len(BLOCKS) == PAGE.count("```") // 2
    rows = {title for title in BLOCKS if title.startswith("row of ")}
    assert rows == {f"row of {table} in {path}" for path, table in TABLES.items()}


@pytest.mark.parametrize("title, path, touched", [
    ("backbone", "common/models/backbones/plain.py", 2),  # a row and its import
    ("loss", "common/losses/poly.py", 2),
    ("augmentation", "common/data/recipes/crop.py", 2),
    ("method", "semi_sup/entropy.py", 2),
    ("step of a pipeline", "uda/brightness.py", 1),
])  # fmt: skip
def test_the_table_counts_lines_as_they_are(title, path, touched):
    _, text = BLOCKS[path].split("\n", 1)  # the name of the file is no part of it
    lines = sum(bool(line.strip()) for line in text.splitlines())
    assert f"{lines} + {touched} |" in next(line for line in PAGE.splitlines() if line.startswith(f"| [{title}]"))


def test_a_new_file_is_not_there_already():
    for title in BLOCKS:
        assert "/" not in title or " in " in title or title.startswith("line of ") or not (ROOT / title).exists()


# One by one ----------------------------------------------------------------------------------------------------------


def test_a_data_set_in_yaml(tmp_path):
    make_folder(tmp_path / "data", images=2, size=(40, 48), count=2)
    tree = yaml.safe_load(BLOCKS["factory.yaml"])
    tree["data"]["root"] = str(tmp_path / "data")
    (tmp_path / "factory.yaml").write_text(yaml.safe_dump(tree))

    cfg = load_config(tmp_path / "factory.yaml")
    sample = make_streams(cfg.data, seed=0)["labeled"].sample(0)
    assert sample["image"].shape == (3, 32, 32) and set(sample["label"].unique().tolist()) <= {-1, 0, 1}


def test_a_data_set_by_a_row(tmp_path, monkeypatch):
    import common.data.catalogue.registry as registry

    new = eval(BLOCKS["row of DATASETS in common/data/catalogue/registry.py"], vars(registry))
    monkeypatch.setitem(registry.DATASETS, new.name, new)
    monkeypatch.setenv("LTS_DATA", str(tmp_path))
    label = classes(20, 24, 2)
    save(picture(20, 24), tmp_path / "factory" / "images" / "train" / "a.png")
    save(label, tmp_path / "factory" / "labels" / "train" / "a.png")

    dataset = SegmentationDataset(SourceConfig(dataset="factory", split="train"))
    assert np.array_equal(dataset.open(0)["label"], label) and dataset.row.tail == (1,)


def test_a_backbone(module, row):
    row("common/models/backbones/__init__.py", module("common/models/backbones/plain.py"))
    options = {"channels": 8, "auxiliary": False, "backbone": {"width": 4}}
    model = build_model(ModelConfig("upernet", 3, "plain", options=options, norm="bn")).eval()
    assert model.segment(torch.zeros(1, 3, 64, 64))["logits"].shape == (1, 3, 16, 16)
    assert model.backbone.channels == (4, 8, 16, 32)


def test_a_loss(module, row):
    row("common/losses/build.py", module("common/losses/poly.py"))
    counts = Counts(torch.tensor([9.0, 1.0]), torch.tensor([1.0, 1.0]), 1.0)
    loss = build_loss({"focus": {"name": "poly", "epsilon": 2.0}}, LossContext(counts))
    logits, label = torch.randn(2, 2, 3, 4), torch.randint(-1, 2, (2, 3, 4))

    each = F.cross_entropy(logits, label, ignore_index=-1, reduction="none")
    p = logits.softmax(1).gather(1, label.clamp(min=0)[:, None])[:, 0]
    expected = (each + 2 * (1 - p))[label >= 0].mean()
    torch.testing.assert_close(loss(logits, label), expected)


def test_an_augmentation(module, row, tmp_path):
    row("common/data/recipes/build.py", module("common/data/recipes/crop.py"))
    source = make_folder(tmp_path, images=1, size=(40, 48))
    dataset = SegmentationDataset(source, build_transform({"recipe": "crop", "crop": [16, 24], "flip": 1.0}))
    sample = dataset.sample(0, np.random.default_rng(0))

    y, x = sample["geometry"][4:6].tolist()
    whole = dataset.open(0)
    image = whole["image"].pixels()[y : y + 16, x : x + 24][:, ::-1]
    assert np.array_equal(sample["image"].numpy(), image.transpose(2, 0, 1))
    assert np.array_equal(sample["label"].numpy(), whole["label"][y : y + 16, x : x + 24][:, ::-1])


def test_a_method(module, row):
    row("semi_sup/config.py", module("semi_sup/entropy.py"))
    network = ModelConfig("upernet", 3, "resnet18", options={"channels": 8, "auxiliary": False}, norm="bn")
    cfg = Config(network, method={"name": "entropy", "weight": 0.5}, train=TrainConfig(steps=4), name="test")
    rehearse(cfg, build_method)

    method = build_method(cfg, context(3)).train()
    images = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    label = torch.randint(-1, 3, (2, 64, 64))
    out = method({"labeled": {"image": images, "label": label}, "unlabeled": {"image": images}}, 0)
    torch.testing.assert_close(out["loss"], out["supervised"] + 0.5 * out["entropy"])
    out["loss"].backward()
    assert all(p.grad is not None for p in method.parameters())


def test_a_step_of_a_pipeline(tmp_path, monkeypatch, capsys):
    """The words of the line in main.sh, run by `common.steps` as `tool` does; done once, then skipped."""
    makes, stage, program = BLOCKS["line of uda/main.sh"].splitlines()[1].split()[1:]
    assert stage == "warm_up"
    (tmp_path / program).write_text(BLOCKS["uda/brightness.py"])
    source = make_folder(tmp_path / "data", images=2, size=(8, 8))
    data = {"dataset": "folder", "root": source.root, "folder": source.folder, "streams": {"target": {"labels": False}}}
    tree = {"model": {"name": "deeplabv2", "num_classes": 5}, "data": data, "output": str(tmp_path / "runs")}
    config = tmp_path / "warm_up.yaml"
    config.write_text(yaml.safe_dump(tree))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))

    command = [sys.executable, str(tmp_path / program), str(config)]
    assert Step(makes, command).run("") == 0
    images = [SegmentationDataset(load_config(config).data.streams["target"]).open(i)["image"] for i in range(2)]
    expected = np.mean([image.pixels() for image in images], (0, 1, 2))
    assert load_json(tmp_path / "runs" / "warm_up" / makes)["rgb"] == pytest.approx(expected.tolist())

    assert Step(makes, command).run("") == 0
    assert "done already" in capsys.readouterr().out
