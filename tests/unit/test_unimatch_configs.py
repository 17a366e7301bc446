"""UniMatch's configs under their official names: they load, and build what the release builds."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from common.config import load_config
from common.data import build_transform
from semi_sup.config import build_method, say_mined, single_branch
from tests.contexts import context

FOLDER = Path(__file__).parents[2] / "semi_sup" / "configs"
SHIPPED = sorted(str(p.relative_to(FOLDER)) for name in ("unimatch", "unimatch_v2") for p in FOLDER.glob(f"{name}/*"))
UNLABELLED = {  # images of the official lists
    "pascal/92": 10490, "pascal/183": 10399, "pascal/366": 10216, "pascal/732": 9850, "pascal/1464": 9118,
    "pascal/1_16": 9920, "pascal/1_8": 9259, "pascal/1_4": 7936, "pascal/u2pl_1_16": 9920, "pascal/u2pl_1_8": 9259,
    "pascal/u2pl_1_4": 7936, "cityscapes/1_16": 2789, "cityscapes/1_8": 2603, "cityscapes/1_4": 2231,
    "cityscapes/1_2": 1487, "cityscapes/1_30": 2875, "ade20k/1_64": 19894, "ade20k/1_32": 19579, "ade20k/1_16": 18947,
    "ade20k/1_8": 17684, "ade20k/1_4": 15158, "ade20k/1_2": 10105, "coco/1_512": 118055, "coco/1_256": 117824,
    "coco/1_128": 117362, "coco/1_64": 116438, "coco/1_32": 114590,
}  # fmt: skip
EPOCHS = {  # by method and data set
    ("unimatch", "voc"): 80, ("unimatch", "cityscapes"): 240, ("unimatch", "coco"): 30,
    ("unimatch_v2", "voc"): 60, ("unimatch_v2", "cityscapes"): 180, ("unimatch_v2", "ade20k"): 60,
    ("unimatch_v2", "coco"): 20,
}  # fmt: skip


def load(name: str):
    return load_config(FOLDER / name)


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_configs_load(name):
    cfg = load(name)
    labeled, unlabeled = (cfg.data.streams[key] for key in ("labeled", "unlabeled"))
    assert labeled.batch_size == unlabeled.batch_size and not unlabeled.labels
    assert labeled.augment["crop"] == unlabeled.augment["crop"] and unlabeled.augment["views"] == 2
    assert unlabeled.augment.get("partner", False) == (cfg.method["name"] == "unimatch")
    for key, stream in (("labeled", labeled), ("unlabeled", unlabeled)):
        build_transform(stream.augment, key)
    assert single_branch(cfg) is cfg
    if "toy" in name:
        return

    split = Path(labeled.list).parent
    assert unlabeled.list == str(split / "unlabeled.txt") and labeled.list == str(split / "labeled.txt")
    on_each = -(-UNLABELLED[str(split.relative_to("splits"))] // 4)  # of four processes
    steps = on_each // (labeled.batch_size // 4)
    assert cfg.train.steps == steps * EPOCHS[cfg.method["name"], cfg.data.dataset]
    assert cfg.eval.every == steps


RATED = (
    "unimatch/pascal_92_r50.yaml",
    "unimatch/cityscapes_1_16_r101.yaml",
    "unimatch/coco_1_512_xception65.yaml",
    "unimatch_v2/pascal_92_dinov2_small.yaml",
    "unimatch_v2/ade20k_1_64_dinov2_large.yaml",
)


@pytest.mark.parametrize("name", RATED)
def test_learning_rates_are_the_releases(name):
    cfg = load(name)
    with torch.device("meta"):
        method = build_method(cfg, context(cfg.model.num_classes))
    names = {id(p): key for key, p in method.named_parameters()}
    rates = {}
    for group in method.parameter_groups():
        rates |= {names[id(p)]: group["lr"] for p in group["params"]}
    backbone = {rate for key, rate in rates.items() if key.startswith("model.backbone.")}
    rest = {rate for key, rate in rates.items() if not key.startswith("model.backbone.")}
    v1 = {"voc": (1e-3, 1e-2), "cityscapes": (5e-3, 5e-3), "coco": (4e-3, 4e-2)}
    expected = v1[cfg.data.dataset] if name.startswith("unimatch/") else (5e-6, 2e-4)
    assert [*backbone, *rest] == pytest.approx(list(expected))


PROCESSES = {"unimatch": 4, "unimatch_v2": 4, "u2pl_base": 8}  # of the releases on Cityscapes
MINING = [path for name in PROCESSES for path in sorted(FOLDER.glob(f"{name}/cityscapes_*.yaml"))]


@pytest.mark.parametrize("path", MINING, ids=lambda path: path.stem)
def test_hard_pixels_are_the_releases_share_of_a_process(path):
    """V2, which has no batch norm, has it on fewer processes, too; the others by the number that the README gives."""
    cfg, method = load_config(path), path.parent.name
    labeled = cfg.data.streams["labeled"]
    pixels = np.prod(labeled.augment["crop"]) * labeled.batch_size / PROCESSES[method]
    share = {"unimatch": 0.156, "unimatch_v2": 0.157, "u2pl_base": 0.085}[method]
    assert cfg.remedies["focus"]["min_kept"] / pixels == pytest.approx(share, abs=5e-4)
    assert PROCESSES[method] * cfg.remedies["focus"]["min_kept"] == 800_000
    assert cfg.train.devices == (4 if method == "unimatch_v2" else 1)
    assert (cfg.model.name == "dpt") == (method == "unimatch_v2")


@pytest.mark.parametrize("processes, share", [(1, "3.9"), (4, "15.6")])
def test_the_share_that_is_mined_is_said(processes, share, caplog):
    cfg = load("unimatch/cityscapes_1_16_r50.yaml")
    with caplog.at_level("INFO"):
        say_mined(replace(cfg, train=replace(cfg.train, devices=processes)))
        say_mined(load("unimatch/pascal_366_r101.yaml"))
    assert len(caplog.messages) == 1
    pixels = 8 * 801 * 801 // processes
    assert caplog.messages[0].endswith(f"at least 200000 of the {pixels} pixels of a batch are kept, {share} %")


def test_every_run_has_a_folder_of_its_own():
    names = [load(name).name for name in SHIPPED]
    assert len(set(names)) == len(names)
