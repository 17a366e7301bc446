"""The configs of domain adaptation: they load, hold the spec's values, and their methods take a step."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from common.config import load_config
from common.data import DATASETS, build_transform
from common.engine.optim import learning_rate
from common.losses.blv import BLV
from common.models import build_model
from tests.contexts import context
from uda.train import METHODS, build_method

FOLDER = Path(__file__).parents[2] / "uda" / "configs"
STAGED = sorted(p.parent for p in FOLDER.glob("*/warm_up.yaml"))  # tasks of several stages
SHIPPED = [f"{p.name}/{q.stem}" for p in STAGED for q in sorted(p.glob("*.yaml")) if q.stem != "task"]
CROP, FULL = (32, 48), (64, 96)
TASKS = {"gta5_to_cityscapes": (19, "gta5", "cityscapes"), "synthia_to_cityscapes": (16, "synthia", "cityscapes16")}
SMALL = ("blocks=[1,1,1,1]", "width=4", "head_channels=8", "features=8")


def load(name, *overrides):
    return load_config(FOLDER / f"{name}.yaml", overrides)


def small(name, folder, *overrides):
    """The method of a config with a tiny network, on made-up files of the steps before."""
    nets = [f"model.options.{word}" for word in SMALL]
    cfg = load(name, "model.pretrained=false", "model.checkpoint=null", *nets, *overrides)
    options, classes = dict(cfg.method), cfg.model.num_classes
    if "prototypes" in options:
        options["prototypes"] = str(folder / "prototypes.pt")
        torch.save(torch.randn(classes, 8), options["prototypes"])
    if "class_distribution" in options:
        options["class_distribution"] = str(folder / "distribution.npy")
        np.save(options["class_distribution"], np.full(classes, 1 / classes))
    if "teacher" in options:
        options["teacher"] = str(folder / "teacher.safetensors")
        save_file(build_model(cfg.model).state_dict(), options["teacher"])
    return build_method(type(cfg)(**{**cfg.__dict__, "method": options}), context(range(1, classes + 1)))


def batches(classes, size=2):
    g = torch.Generator().manual_seed(1)
    images = lambda *shape: torch.randint(0, 256, (size, 3, *shape), generator=g, dtype=torch.uint8)  # noqa: E731
    label = torch.randint(-1, classes, (size, *CROP), generator=g, dtype=torch.int16)
    target = {
        "weak": images(*CROP), "strong": images(*CROP), "full": images(*FULL), "image": images(*CROP),
        "soft": torch.randn(size, classes, 9, 13, generator=g).softmax(1).half(),
        "geometry": torch.tensor([[*FULL, 72, 108, 16, 24, 1]] * size, dtype=torch.int32),
        "warp": torch.eye(3).repeat(size, 1, 1), "cutout": torch.tensor([[0, 0, 8, 8]] * size, dtype=torch.int32),
        "pseudo": label.clamp(min=0), "confidence": torch.full((size, *CROP), 254, dtype=torch.int16),
    }  # fmt: skip
    return {"source": {"image": images(*CROP), "label": label}, "target": target}


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_configs_take_a_step(name, tmp_path):
    method = small(name, tmp_path)
    task, _, stem = name.partition("/")
    assert type(method) is METHODS[method_name(stem)]
    assert isinstance(method.loss.logits, BLV) == stem.endswith("_blv")
    trained = {id(p) for p in method.parameters() if p.requires_grad}
    groups = method.parameter_groups()
    assert {id(p) for group in groups for p in group["params"]} == trained
    parts = method(batches(method.model.num_classes), 0)
    parts = [parts] if isinstance(parts, dict) else list(parts)
    assert len(parts) == method.backwards and all(torch.isfinite(value) for part in parts for value in part.values())
    sum(part["loss"] for part in parts).backward()
    assert all(torch.isfinite(p.grad).all() for group in groups for p in group["params"])
    method.after_step(0)


def method_name(stem):
    """Which method a stage's file has, by its name."""
    if stem.startswith("stage1"):
        return "proda" if stem.endswith("_proda") else "cpsl"
    return "warm_up" if stem.startswith("warm_up") else "distill"


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_configs_name_files_of_the_step_before(name):
    """The warm-up's own or plain one, and the stage before of the same variant; the recipes' keys are known."""
    cfg, (task, _, stem) = load(name), name.partition("/")
    assert (cfg.name, cfg.output) == (stem, f"runs/{task}")
    stage, variant = (stem[:7], stem[7:]) if stem.startswith("warm_up") else (stem[:6], stem[6:])
    before = {"warm_up": None, "stage1": "warm_up", "stage2": "stage1", "stage3": "stage2"}[stage]
    before = before and before + ("" if (before, variant) == ("warm_up", "_proda") else variant)
    named = [*cfg.data.streams["target"].maps.values()]
    named += [cfg.method[key] for key in ("prototypes", "class_distribution", "teacher") if key in cfg.method]
    named += [cfg.model.checkpoint] if cfg.model.checkpoint else []
    assert all(path.startswith(f"runs/{task}/{before}/") for path in named) and bool(named) == (before is not None)
    for stream in cfg.data.streams.values():
        build_transform({**stream.augment, "colour_from": None}, "augment")
        assert DATASETS[stream.dataset].num_classes == cfg.model.num_classes


# What the specification says of the official tasks --------------------------------------------------------------------


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("stem", [f"{s}{v}" for s in ("warm_up", "stage1", "stage2", "stage3") for v in ("", "_blv")])
def test_what_all_stages_share(task, stem):
    cfg, (classes, source, target) = load(f"{task}/{stem}"), TASKS[task]
    o, t, m = cfg.optim, cfg.train, cfg.model
    assert (o.name, o.momentum, o.nesterov, o.weight_decay, o.clip) == ("sgd", 0.9, False, 2e-4, None)
    assert (o.schedule, o.power, o.floor, o.warmup, t.steps, t.devices) == ("poly", 0.9, 0, 0, 90_000, 4)
    assert (m.name, m.num_classes, m.norm, m.align_corners) == ("deeplabv2", classes, "sync_bn", True)
    assert (m.mean, m.std) == ((0, 0, 0), (255, 255, 255))  # RGB / 255
    assert (cfg.eval.every, cfg.eval.mode, cfg.eval.flip, cfg.eval.scales) == (1000, "whole", False, (1.0,))
    streams, val = cfg.data.streams, cfg.data.val
    assert (streams["source"].dataset, streams["target"].dataset, val.dataset) == (source, target, target)
    assert (val.split, streams["source"].labels, streams["target"].labels) == ("val", True, False)
    colours = streams["source"].augment["colour_from"]
    assert colours == ({"dataset": "cityscapes", "split": "train"} if source == "gta5" else None)
    for name, stream in streams.items():
        recipe = build_transform({**stream.augment, "colour_from": None})
        assert recipe.base == ((760, 1280) if (name, source) == ("source", "synthia") else (1024, 2048))
        assert (recipe.crop, recipe.width, recipe.ratio, recipe.flip) == ((512, 896), 2200, (0.5, 1.5), 0.5)
        assert stream.batch_size == 4
    views = build_transform(streams["target"].augment)
    assert views.strong == (stem[:7] != "warm_up") and views.full == stem.startswith("stage1")
    assert (views.blur, views.jitter) == (0.5, 0.5)


RATES = {  # step 0: backbone (three visits a step in the release), head, and what else there is
    "warm_up": {"backbone": 7.5e-4, "head": 2.5e-3, "discriminator": 1e-4},
    "stage1": {"backbone": 3e-4, "head": 5e-4, "prototypes": 5e-4},
    "stage2": {"backbone": 1.8e-3, "head": 6e-3},
    "stage3": {"backbone": 1.8e-3, "head": 6e-3},
    "stage1_proda": {"backbone": 1e-4, "head": 1e-4},
}
METHOD = {
    "warm_up": {"adversarial": 0.01, "gan": "LS", "discriminator_width": 64},
    "stage1": {
        "momentum": 0.999, "temperature": 0.08, "rectify": True, "threshold": 0, "rce": (0.1, 1.0), "consistency": 5,
        "self_label": 0.1, "contrastive": 0, "bank": 65_536, "samples": 256, "sampling": "class_balanced",
        "marginal": "pseudo_labels", "epsilon": 0.05, "sinkhorn_iterations": 3, "cutmix": 0.5,
        "cutmix_labels": "source", "teacher_mode": "eval",
    },
    "stage2": {"threshold": 0.95, "distillation": 1, "kd_loss": "kl"},
    "stage3": {"threshold": 0.95, "distillation": 1, "kd_loss": "kl"},
    "stage1_proda": {"momentum": 0.999, "prototype_momentum": 1e-4, "rce": (0.1, 1.0), "consistency": 10},
}  # fmt: skip


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("stem", RATES)
def test_rates_and_weights_of_each_stage(task, stem, tmp_path):
    method = small(f"{task}/{stem}", tmp_path)
    rates = {group["name"]: group["lr"] for group in method.parameter_groups()}
    assert rates == pytest.approx(RATES[stem])
    assert {key: getattr(method.options, key) for key in METHOD[stem]} == METHOD[stem]
    if stem == "stage1_proda":
        assert method.options.regulariser == (0.1 if task.startswith("gta5") else 0)
    if stem == "warm_up":
        group = method.parameter_groups()[-1]
        assert (group["optimizer"], group["betas"], group["weight_decay"]) == ("adam", (0.9, 0.99), 0)


@pytest.mark.parametrize(
    "stem, initial, step, rate",
    [("stage1", 5e-4, 998, 4.950072e-4), ("stage2", 6e-3, 998, 5.940087e-3), ("stage1", 1e-4, 45_000, 5.3589e-5)],
)
def test_schedule_gives_the_rates_of_the_published_logs(stem, initial, step, rate):
    cfg = load(f"gta5_to_cityscapes/{stem}")
    assert learning_rate(initial, step, cfg.optim, cfg.train.steps) == pytest.approx(rate, rel=1e-5)


@pytest.mark.parametrize("stem, norms", [("warm_up", 0), ("stage1", 0), ("stage2", 1), ("stage3", 1)])
def test_networks_and_where_they_start(stem, norms):
    for task, (classes, *_) in TASKS.items():
        cfg = load(f"{task}/{stem}")
        with torch.device("meta"):
            model = build_model(cfg.model)
        count = 65_063_568 + 256 * (classes - 19) + 4096 * norms
        assert sum(p.numel() for p in model.parameters()) == count
        start = {"warm_up": (True, None), "stage2": ("pretrained_models/r101_1x_sk0.pth", None)}
        before = {"stage1": "warm_up", "stage3": "stage2"}.get(stem)
        expected = start.get(stem, (False, f"runs/{task}/{before}/checkpoints/last"))
        assert (cfg.model.pretrained, cfg.model.checkpoint) == expected
        assert cfg.model.options.get("freeze_bn", False) == (stem == "warm_up")


def test_proda_has_its_own_augmentations():
    for task, stage in ((task, stage) for task in TASKS for stage in (1, 2, 3)):
        streams = load(f"{task}/stage{stage}_proda").data.streams
        views = build_transform(streams["target"].augment)
        assert (views.strong, views.blur, views.jitter) == (True, 0, 0)
        assert streams["source"].augment["colour_from"] is None
        base = [1052, 1914] if task.startswith("gta5") else [760, 1280]
        assert streams["source"].augment["base"] == base and streams["target"].augment["base"] == [1024, 2048]


def test_sigma_of_blv_is_the_ablations_best():
    for task, sigma in (("gta5_to_cityscapes", 6.0), ("synthia_to_cityscapes", 4.0)):
        for stage in ("warm_up", "stage1", "stage2", "stage3"):
            remedies = load(f"{task}/{stage}_blv").remedies
            refresh = {} if stage == "warm_up" else {"counts": {"refresh": 1000}}
            assert remedies == {"logits": {"name": "blv", "preset": "paper", "sigma": sigma}, **refresh}
