"""The configs under official names: they load, build, train the right groups; twins differ in the loss alone."""

import functools
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from common.config import load_config, to_tree
from common.engine.optim import learning_rate
from common.models.heads.ocr import OCRHead
from common.models.pretrained import mmseg
from fully_sup.supervised import Supervised
from tests.contexts import context

FOLDER = Path(__file__).parents[2] / "fully_sup" / "configs"
GOLDEN = Path(__file__).parents[1] / "golden" / "data"
OFFICIAL = {  # parameters of the model, as the release counts them
    "ocrnet/ocrnet_hr18_512x1024_40k": 12_080_036,
    "upernet/upernet_r50_512x1024_40k": 66_415_238,
    "upernet/upernet_r101_512x1024_40k": 85_407_366,
    "pspnet/pspnet_r50-d8_512x1024_40k": 48_975_494,
    "segformer/segformer_mit-b0_8x1_1024x1024_160k": 3_720_051,
    "knet/knet_s3_upernet_swin-t_8x2_512x1024_adamw_80k": 73_052_896,
    "vit/upernet_vit-b16_mln_512x1024_80k": 144_072_742,
}
SEGFORMER, KNET, VIT = list(OFFICIAL)[4:]
SHIPPED = sorted(str(p.relative_to(FOLDER)) for p in FOLDER.rglob("*.yaml") if p.parent.name != "_base_")


def load(name: str, *overrides: str):
    return load_config(FOLDER / f"{name}_cityscapes.yaml", overrides)


@functools.cache
def build(path: str) -> Supervised:
    config = load_config(FOLDER / path)
    with torch.device("meta"):
        return Supervised(config, context(config.model.num_classes))


def build_official(name: str) -> Supervised:
    return build(f"{name}_cityscapes.yaml")


@pytest.mark.parametrize("path", SHIPPED)
def test_shipped_configs_build(path):
    config, method = load_config(FOLDER / path), build(path)
    groups = method.parameter_groups()
    assert sum(len(group["params"]) for group in groups) == len(list(method.parameters()))
    assert config.name == Path(path).stem
    auxiliary = method.model.auxiliary_head is not None or isinstance(method.model.decode_head, OCRHead)
    assert set(config.method["heads"]) == ({"decode", "aux"} if auxiliary else {"decode"})


@pytest.mark.parametrize("name", OFFICIAL)
def test_official_models(name):
    assert sum(p.numel() for p in build_official(name).parameters()) == OFFICIAL[name]


def differences(a, b, where=""):
    """Dotted keys whose values differ."""
    if isinstance(a, dict) and isinstance(b, dict):
        keys = a.keys() | b.keys()
        return {d for key in keys for d in differences(a.get(key), b.get(key), f"{where}.{key}" if where else key)}
    return set() if a == b else {where}


@pytest.mark.parametrize("name", OFFICIAL)
def test_twins_differ_in_the_loss_alone(name):
    baseline, twin = (load_config(FOLDER / f"{name}_cityscapes{end}.yaml") for end in ("", "_blv"))
    changed = {"remedies.logits", "name"}
    if "ocrnet" in name:
        changed |= {"method.heads.aux.weight", "remedies.heads"}
        assert twin.method["heads"]["aux"] == {"weight": 1.0} and twin.remedies["heads"] == ["aux"]
    assert differences(to_tree(baseline), to_tree(twin)) == changed
    assert twin.remedies["logits"] == {"name": "blv", "preset": "paper"}
    assert not baseline.remedies


def test_blv_on_the_head_that_predicts():
    cfg = load_config(FOLDER / "ocrnet/ocrnet_hr18_512x1024_40k_cityscapes_blv_ocr.yaml")
    assert cfg.method["heads"] == {"decode": {"weight": 1.0}, "aux": {"weight": 0.4}}
    assert cfg.remedies == {"logits": {"name": "blv", "preset": "paper"}}


def official_group(name: str, key: str) -> int:
    """Which group the release puts the official parameter `key` in: 0 without decay, 1 the rest, 2 at ten times lr."""
    if name == SEGFORMER:
        return 2 if "head" in key else 0 if "norm" in key else 1
    rules = ("absolute_pos_embed", "relative_position_bias_table", "norm")
    return 0 if any(rule in key for rule in (rules if name == KNET else ("pos_embed", "cls_token", "norm"))) else 1


@pytest.mark.parametrize(
    "name, file, sizes",
    [
        (SEGFORMER, "segformer_mit_b0", (52, 108, 17)),
        (KNET, "knet_swin_t", (118, 219, 0)),
        (VIT, "upernet_vit_b16", (2, 204, 0)),  # and the bias of the patch embedding, which this file lacks
    ],
)
def test_parameter_groups(name, file, sizes):
    """The release's substring rules on its own names, sent through the conversion of names."""
    with np.load(GOLDEN / f"{file}.npz") as archive:
        manifest = json.loads(str(archive["manifest"]))
    buffers = ("running_mean", "running_var", "num_batches_tracked")
    shapes = {k: shape for k, (shape, kind) in manifest.items() if kind != "buffer" and not k.endswith(buffers)}
    groups = {key: official_group(name, key) for key in shapes}
    assert tuple(list(groups.values()).count(i) for i in range(3)) == sizes
    method, config = build_official(name), load(name)
    marks = {key: torch.tensor(float(group)).expand(shapes[key]) for key, group in groups.items()}
    converted = mmseg.convert({"state_dict": marks}, method.model)
    rate, decay = config.optim.lr, config.optim.weight_decay
    expected = ((rate, 0.0), (rate, decay), (10 * rate, decay))
    ours = {id(p): (g["lr"], g["weight_decay"]) for g in method.parameter_groups() for p in g["params"]}
    for key, p in method.model.named_parameters():
        group = 1 if key == "backbone.patch_embed.bias" else int(converted[key].flatten()[0])
        assert ours[id(p)] == pytest.approx(expected[group]), key


@pytest.mark.parametrize("name", list(OFFICIAL)[:4])
def test_one_group_for_sgd(name):
    groups = build_official(name).parameter_groups()
    assert [(group["lr"], group["weight_decay"]) for group in groups] == [(0.01, 5e-4)]


def test_schedules():
    """Learning rates at the first step, in warm-up, in the middle and near the end, in closed form."""
    sgd, knet, vit = (load(name).optim for name in ("pspnet/pspnet_r50-d8_512x1024_40k", KNET, VIT))
    assert learning_rate(0.01, 0, sgd, 40_000) == pytest.approx(0.01)
    assert learning_rate(0.01, 20_000, sgd, 40_000) == pytest.approx(0.0099 * 0.5**0.9 + 1e-4)
    assert learning_rate(6e-5, 0, knet, 80_000) == pytest.approx(6e-8)
    assert learning_rate(6e-5, 500, knet, 80_000) == pytest.approx(6e-5 * (1 - 0.5 * 0.999))
    assert [learning_rate(6e-5, t, knet, 80_000) for t in (59_999, 60_000, 72_000)] == pytest.approx([6e-5, 6e-6, 6e-7])
    assert learning_rate(6e-5, 750, vit, 80_000) == pytest.approx(6e-5 * (1 - 750 / 80_000) * (1 - 0.5 * (1 - 1e-6)))
    assert learning_rate(6e-5, 40_000, vit, 80_000) == pytest.approx(3e-5)


@pytest.mark.parametrize("name", OFFICIAL)
def test_data_and_length(name):
    config = load(name)
    stream, segformer = config.data.streams["labeled"], name == SEGFORMER
    length = {"40k": 40_000, "80k": 80_000, "160k": 160_000}[name.rsplit("_", 1)[1]]
    assert config.train.steps == length
    assert config.train.save_every == config.eval.every == length // 10
    assert (stream.batch_size, config.train.devices) == (8 if segformer else 16, 8)
    assert stream.augment["crop"] == ([1024, 1024] if segformer else [512, 1024])
    assert config.eval.mode == ("slide" if segformer else "whole")
    assert config.method["average"] == "all" and config.model.norm == "sync_bn"
    assert config.optim.clip == (1.0 if name == KNET else None)
