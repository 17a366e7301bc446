"""The configs under official names: they load, build what the release builds, and agree with each other."""

import functools
from pathlib import Path

import pytest
import torch

from common.config import load_config
from common.engine.optim import learning_rate
from common.losses.blv import BLV
from semi_sup.config import SUB_LABEL, build_method, single_branch
from semi_sup.main import parse, truth
from semi_sup.subclasses import PRESETS
from tests.contexts import context

FOLDER = Path(__file__).parents[2] / "semi_sup" / "configs"
SHIPPED = sorted(path.stem for path in FOLDER.glob("*.json"))
STEPS = {  # labelled images, steps of the baseline and of USRN
    "voc_1over64": (165, 102_400, 209_920),
    "voc_1over32": (331, 101_680, 203_360),
    "voc_1over16": (662, 98_400, 198_000),
    "city_1over32": (93, 342_240, 1_383_840),
    "city_1over16": (186, 331_200, 1_339_200),
    "city_1over8": (372, 312_480, 1_249_920),
}


def load(name: str):
    return load_config(FOLDER / f"{name}.json")


@functools.cache
def build(name: str):
    cfg = load(name)
    if "usrn" in name and not name.startswith(tuple(STEPS)):  # numbers by the labelled pixels, known after clustering
        classes = cfg.model.num_classes
        changes = [f"model.options.subclasses={2 * classes}", f"method.subclasses={[2] * classes}"]
        cfg = load_config(FOLDER / f"{name}.json", changes)
    with torch.device("meta"):
        return build_method(cfg, context(cfg.model.num_classes))


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_configs_build(name):
    cfg, method = load(name), build(name)
    assert cfg.name == name and cfg.output == "saved"
    trained = [p for p in method.parameters() if p.requires_grad]
    assert sum(len(group["params"]) for group in method.parameter_groups()) == len(trained)
    assert ("blv" in name) == (isinstance(method.loss.logits, BLV))
    streams = cfg.data.streams
    assert ("unlabeled" in streams) == ("baseline" not in name)
    if "unlabeled" in streams:
        assert not streams["unlabeled"].labels and streams["unlabeled"].augment["views"]
        assert streams["unlabeled"].augment["crop"] == streams["labeled"].augment["crop"]
    if "usrn" in name:
        split = name.partition("_usrn")[0]
        assert streams["labeled"].maps[SUB_LABEL] == f"saved/{split}_baseline/label_subcls_balanced_kmeans"
        assert streams["labeled"].list == load(f"{split}_baseline").data.streams["labeled"].list


@pytest.mark.parametrize("split", STEPS)
def test_official_settings(split):
    """Those of the release, its wrong paths and counts corrected."""
    labelled, *steps = STEPS[split]
    voc = split.startswith("voc")
    for name, count in zip(("baseline", "usrn"), steps, strict=True):
        cfg = load(f"{split}_{name}")
        assert (cfg.train.steps, cfg.train.devices, cfg.seed) == (count, 1, 42)
        folder = "voc" if voc else "city"
        assert cfg.data.streams["labeled"].list == f"splits/{folder}/{labelled}_train_supervised.txt"
        assert cfg.optim.lr == (0.01 if voc else 0.02)
        assert (cfg.optim.momentum, cfg.optim.weight_decay, cfg.optim.clip) == (0.9, 1e-4, None)
        assert learning_rate(1.0, count - 1, cfg.optim, count) == pytest.approx(count**-0.9)
        assert cfg.eval.mode == "whole" and cfg.eval.convention == "absent_zero" and cfg.eval.batch_size == 1
        assert cfg.model.num_classes == (21 if voc else 19) and cfg.model.pretrained is True
        for stream, ratio in (("labeled", [0.5, 2.0]), ("unlabeled", [0.8, 2.0])):
            if stream in cfg.data.streams:
                s = cfg.data.streams[stream]
                assert s.batch_size == (8 if voc else 4)
                assert s.augment["crop"] == ([320, 320] if voc else [720, 720])
                assert s.augment["base"] == (400 if voc else 2048)
                assert s.augment.get("ratio", [0.5, 2.0]) == ratio
                assert s.augment.get("jitter", False) == (not voc and stream == "labeled")
    assert cfg.model.options["subclasses"] == sum(PRESETS[split]) and cfg.method["subclasses"] == split
    assert load(f"{split}_baseline").method["subclasses"] == split


@pytest.mark.parametrize("split", STEPS)
def test_groups_of_the_optimiser(split):
    """Everything but the backbone at the full rate, the backbone (both trunks) at a tenth; decay on all."""
    groups = {group["name"]: group for group in build(f"{split}_usrn").parameter_groups()}
    backbone, rest = groups["encoder\\.backbone\\."], groups["rest"]
    assert (len(backbone["params"]), len(rest["params"])) == (285, 58)
    assert backbone["lr"] == pytest.approx(rest["lr"] / 10)
    assert {group["weight_decay"] for group in groups.values()} == {1e-4}


def test_network_that_predicts():
    model = single_branch(load("voc_1over32_usrn")).model
    assert model == load("voc_1over32_baseline").model


@pytest.mark.parametrize(
    "words, test", [([], False), (["--test"], True), (["--test", "True"], True), (["-t", "1"], True),
                    (["--test", "False"], False), (["--test", "0"], False)]
)  # fmt: skip
def test_switches_mean_what_they_say(words, test, capsys):
    assert parse(["-c", "x.json", *words]).test is test
    with pytest.raises(SystemExit):
        parse(["--test", "perhaps"])
    assert "'perhaps' is neither True nor False" in capsys.readouterr().err
    assert truth("no") is False
