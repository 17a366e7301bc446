"""What stands around CPSL's stages: the driver, errors about earlier steps, opening checkpoints, the test's numbers."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from common.config import Config, ConfigError, GroupConfig, ModelConfig, OptimConfig, load_config
from common.data import DATASETS
from common.data.streams import collate
from common.models import build_model
from common.models.pretrained.cpsl import has_extra_norm
from tests.contexts import context
from uda import test as uda_test
from uda import train as uda_train
from uda.base import groups_of
from uda.config import command
from uda.distill import Distill
from uda.pseudo_labels import open_network

UDA = Path(__file__).parents[2] / "uda"
CPU = torch.device("cpu")
SMALL = {"blocks": [1, 1, 1, 1], "width": 4, "head_channels": 8, "features": 8}


# Files of earlier steps -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "path, words",
    [
        ("runs/gta5/stage1/checkpoints/last", "train.py --stage stage1"),
        ("runs/gta5/stage1_blv/checkpoints/last", "train.py --stage stage1 --variant blv"),
        ("/data/stage3_trials/runs/warm_up/pseudo_soft", "train.py --stage warm_up"),
        ("stage1.pkl", "train.py"),
        ("/data/mystage1x/official.pkl", "train.py"),
    ],
)
def test_the_last_folder_named_after_a_stage_says_who_makes_a_file(path, words):
    assert command("train.py", path) == words


NEEDS = {  # config → what is missing, in the order in which it is made
    "warm_up": (),
    "stage1": (
        "train.py --stage warm_up makes it",
        "generate_pseudo_label.py --stage warm_up --soft makes them",
        "calc_prototype.py --stage warm_up makes them",
        "generate_class_distribution.py --stage warm_up makes it",
    ),
    "stage2_blv": (
        "train.py --stage stage1 --variant blv makes it",
        "generate_pseudo_label.py --stage stage1 --variant blv makes them",
    ),
    "stage3": ("train.py --stage stage2 makes it", "generate_pseudo_label.py --stage stage2 makes them"),
    "stage3_proda": (
        "train.py --stage stage2 --variant proda makes it",
        "generate_pseudo_label.py --stage stage2 --variant proda makes them",
    ),
}


@pytest.mark.parametrize("name", NEEDS)
def test_a_missing_file_names_its_command(name, tmp_path, monkeypatch):
    """One file after the other appears, until nothing is missing."""
    monkeypatch.chdir(tmp_path)
    cfg = load_config(UDA / f"configs/toy/{name}.yaml")
    for words in NEEDS[name]:
        with pytest.raises(ValueError, match=words) as error:
            uda_train.require_earlier_steps(cfg)
        path, _, rest = str(error.value).partition(":")
        assert "\n" not in rest
        make(Path(path), cfg.model.num_classes)
    uda_train.require_earlier_steps(cfg)


def make(path, classes):
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".pt":
        torch.save(torch.ones(classes, 4), path)
    elif path.suffix == ".npy":
        np.save(path, np.full(classes, 1 / classes))
    else:
        path.mkdir()


def test_weights_that_no_step_makes_are_looked_for_first(tmp_path, monkeypatch, fails, unchanged):
    monkeypatch.chdir(tmp_path)
    config, words = UDA / "configs/synthia_to_cityscapes", ("--stage", "stage2", "--check")
    line = fails(uda_train.main, config, *words)
    assert "pretrained_models/r101_1x_sk0.pth: not there, and stage2 starts from it" in line
    assert "put the weights there" in line and "model.pretrained=true" in line
    for stage, more in (("stage2", "model.pretrained=true"), ("warm_up", "seed=1")):
        monkeypatch.setattr(sys, "argv", ["train.py", str(config), "--stage", stage, "--check", more])
        assert uda_train.main() is None
    make(tmp_path / "pretrained_models/r101_1x_sk0.pth", 1)
    monkeypatch.setattr(sys, "argv", ["train.py", str(config), *words])
    assert uda_train.main() is None


def test_a_missing_checkpoint_names_stage_and_variant(tmp_path):
    cfg = load_config(UDA / "configs/toy/stage2_blv.yaml", [f"output={tmp_path}"])
    with pytest.raises(ValueError, match="train.py --stage stage2 --variant blv makes it, or give --checkpoint"):
        open_network(cfg, None, CPU)


def test_images_of_several_sizes_are_taken_one_by_one():
    def sample(name, *shape):
        return {"name": name, "weak": torch.zeros(3, 4, 4), "full": torch.zeros(3, *shape)}

    samples = [sample("a", 64, 128), sample("b", 64, 128), sample("c", 60, 90)]
    words = "a and c: `full`.*64×128 and 60×90; set train.devices to the stream's"
    with pytest.raises(ValueError, match=words) as error:
        collate(samples)
    assert "\n" not in str(error.value)
    assert collate(samples[:2])["full"].shape == (2, 3, 64, 128) and collate(samples[2:])["full"].shape == (
        1,
        3,
        60,
        90,
    )


def test_rules_of_the_optimiser_are_not_ignored():
    optim = OptimConfig(groups=(GroupConfig("norm", lr_mult=0.1),))
    with pytest.raises(ConfigError, match="optim.groups: 'norm': .* method.backbone_lr_mult and method.head_lr_mult"):
        groups_of(torch.nn.Linear(2, 2), optim, 3.0, 10.0)


# Opening checkpoints --------------------------------------------------------------------------------------------------


def config(tmp_path, extra_norm=False):
    options = {**SMALL, "extra_norm": extra_norm}
    model = ModelConfig("deeplabv2", 19, mean=(0, 0, 0), std=(255, 255, 255), align_corners=True, options=options)
    return Config(name="stage2", output=str(tmp_path), model=model)


def written(model, form, path):
    """A file of `model` as it predicts inside a method, alone, or as the release writes it."""
    state = model.state_dict()
    if form == "release":
        torch.save({"ResNet101": {"model_state": state, "prototypes_ema": torch.zeros(19, 8)}, "iter": 1}, path)
    elif form == "network":
        save_file(state, path)
    else:
        other = build_model(config(path, "bn_pretrain.weight" not in state).model).state_dict()
        both = {f"model.{n}": t for n, t in state.items()} | {f"teacher.{n}": t for n, t in other.items()}
        save_file(both, path, metadata={"predict_prefix": "model."})
    return path


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("form", ["method", "network", "release"])
def test_checkpoints_open_whatever_the_config_says_of_the_extra_norm(form, norm, tmp_path):
    """As a network for inference, and as a teacher; the student stays as configured."""
    theirs = build_model(config(tmp_path, norm).model).eval()
    path = written(theirs, form, tmp_path / "file")
    assert has_extra_norm(path) is norm
    image = torch.randint(0, 256, (1, 3, 32, 48), dtype=torch.uint8)
    for configured in (False, True):
        cfg = config(tmp_path, configured)
        method = Distill(replace(cfg, method={"teacher": str(path)}), context(cfg.model.num_classes))
        assert (method.model.bn_pretrain is not None) is configured
        for ours in (open_network(cfg, str(path), CPU), method.teacher.eval()):
            torch.testing.assert_close(ours(image)["logits"], theirs(image)["logits"])
    if form == "method":
        assert has_extra_norm(path, "teacher.") is not norm
        teacher = open_network(config(tmp_path), str(path), CPU, "teacher.")
        assert (teacher.bn_pretrain is None) is norm


@pytest.mark.parametrize("predicts", ["model.", "average.", "teacher.", ""])
def test_a_result_names_the_network_that_was_evaluated(predicts, tmp_path):
    """The one that predicts, unless another is asked for."""
    path = tmp_path / "model.safetensors"
    save_file({"x": torch.zeros(1)}, path, metadata={"predict_prefix": predicts})
    name = {"average.": "average", "teacher.": "teacher"}.get(predicts, "student")
    assert uda_test.chosen_network(path, None) == uda_test.chosen_network(path, name) == (name, None)
    for other, prefix in {"student": "model.", "average": "average.", "teacher": "teacher."}.items():
        if other != name:
            assert uda_test.chosen_network(path, other) == (other, prefix)


@pytest.mark.parametrize("form", ["network", "release", "method"])
def test_a_network_that_a_checkpoint_does_not_have(form, tmp_path):
    path = written(build_model(config(tmp_path).model), form, tmp_path / "file")
    with pytest.raises(ValueError, match="file: has no network 'average'"):
        open_network(config(tmp_path), str(path), CPU, "average.")


# The test's numbers ---------------------------------------------------------------------------------------------------


def test_means_over_subsets_leave_undefined_classes_out():
    names = DATASETS["cityscapes"].classes
    iou = dict(zip(names, torch.linspace(0.1, 0.9, 19).tolist(), strict=True)) | {"bus": None, "wall": None}
    means = uda_test.subset_means({"per_class": [{"name": n, "iou": v} for n, v in iou.items()]})
    three = {"wall", "fence", "pole"}
    sixteen = [n for n in names if n not in ("terrain", "truck", "train")]
    defined = {n: v for n, v in iou.items() if n in sixteen and v is not None}
    assert len(sixteen) == 16 and len(defined) == 14
    assert means["miou16"] == pytest.approx(sum(defined.values()) / 14)
    assert means["miou13"] == pytest.approx(sum(v for n, v in defined.items() if n not in three) / 12)
    assert uda_test.subset_means({"per_class": [{"name": "road", "iou": 0.5}]}) == {}
    assert uda_test.subset_means({"per_class": [{"name": n, "iou": None} for n in names]}) == {}


def test_history_prints_what_is_stored(tmp_path, monkeypatch, capsys, fails, unchanged):
    """Those of the variant, the plain one where the variant has none; nothing is evaluated."""
    words = [UDA / "configs/toy", "--variant", "proda", "--history", f"output={tmp_path}"]
    assert "no stage has been evaluated there" in fails(uda_test.main, *words)
    for run, miou in (("warm_up", 0.3), ("stage1", 0.9), ("stage1_proda", 0.4), ("stage2_proda", 0.456)):
        (tmp_path / run).mkdir()
        (tmp_path / run / "evaluation.json").write_text(json.dumps({"miou": miou}))
    monkeypatch.setattr(sys, "argv", ["test.py", *map(str, words)])
    uda_test.main()
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [(line[0], line[-1]) for line in lines] == [
        ("warm_up", "30.00"), ("stage1_proda", "40.00"), ("stage2_proda", "45.60"),
    ]  # fmt: skip
