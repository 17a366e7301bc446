"""The configs of the benchmark under official names: they build, and hold the values of the release."""

import functools
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from common.config import ConfigError, load_config
from common.data import DATASETS
from common.data.catalogue.registry import folder_row
from common.data.orders import SamplerConfig
from common.data.recipes.build import build_transform
from common.data.statistics import Statistics
from common.engine.optim import learning_rate
from common.losses.blv import BLV
from ltss_benchmark.methods import build_method
from tests.contexts import context

FOLDER = Path(__file__).parents[2] / "ltss_benchmark" / "configs"
SETS = {  # classes, longest side, steps, their short form, interval of evaluation of both models
    "ade20k": (150, 2048, 160_000, "160k", 10_000, 10_000),
    "ade20k_full": (847, 2048, 200_000, "200k", 10_000, 10_000),
    "coco_stuff_118k": (171, 1333, 900_000, "900k", 10_000, 10_000),
    "coco_stuff_lt_40k": (171, 1333, 320_000, "320k", 10_000, 10_000),
    "mhpv2_15k": (59, 1333, 120_000, "120k", 10_000, 10_000),
    "mhpv2_lt_7k": (59, 1333, 52_000, "52k", 5_000, 10_000),
}
LONG_TAILED = ("ade20k_full", "coco_stuff_lt_40k", "mhpv2_lt_7k")
RFS = {
    "ade20k": ("pixel", 0.001),
    "ade20k_full": ("image", 0.0003),
    "coco_stuff_lt_40k": ("image", 0.0012),
    "mhpv2_lt_7k": ("image", 0.0012),
}
MATCHER = {"ade20k_full": 0.0003, "coco_stuff_lt_40k": 0.0012, "mhpv2_lt_7k": 0.0024}
RUNS = {"ade20k_full": "ade20k-full", "coco_stuff_lt_40k": "coco-stuff-lt", "mhpv2_lt_7k": "mhpv2-lt"}
SWIN = {  # name: backbone, crop
    "maskformer2_swin_tiny_bs16_160k": ("swin_tiny", 512),
    "maskformer2_swin_small_bs16_160k": ("swin_small", 512),
    "maskformer2_swin_base_384_bs16_160k_res640": ("swin_base", 640),
    "maskformer2_swin_base_IN21k_384_bs16_160k_res640": ("swin_base", 640),
    "maskformer2_swin_large_IN21k_384_bs16_160k_res640": ("swin_large", 640),
}
TRAINED = {  # elements at 847 classes, all of the network
    ("mask2former", "resnet50"): 44_167_376,
    ("mask2former", "swin_large"): 215_667_908,
    ("deeplabv3plus", "resnet50"): 40_564_207,
}


def official() -> list[str]:
    """The 35 names."""
    names = []
    for data, (*_, steps, _, _) in SETS.items():
        base = f"maskformer2_R50_bs16_{steps}"
        names += [f"{data}/mask2former/{base}", f"{data}/deeplabv3p/deeplabv3p_R50_bs16_{steps}"]
        names += [f"{data}/mask2former/rfs-{base}"] if data in RFS else []
        if data in LONG_TAILED:
            names += [f"{data}/mask2former/{solution}-{base}" for solution in ("copypaste", "seesaw", "matcher")]
    names += [f"ade20k/mask2former/swin/{name}" for name in SWIN] + ["ade20k/mask2former/maskformer2_R101_bs16_90k"]
    large = ("maskformer2_SwinL_bs16_200k", "maskformer2_SwinL_bs8_400k")
    large += tuple(f"{solution}-maskformer2_SwinL_bs16_200k" for solution in ("copypaste", "matcher"))
    return names + [f"ade20k_full/mask2former/{name}" for name in large]


OURS = [f"{d}/mask2former/benchmark-maskformer2_R50_bs16_{SETS[d][3]}" for d in LONG_TAILED]
OURS += [f"{d}/deeplabv3p/blv-deeplabv3p_R50_bs16_{SETS[d][3]}" for d in LONG_TAILED]
SHIPPED = sorted(str(p.relative_to(FOLDER).with_suffix("")) for p in FOLDER.glob("[!_]*/**/*.yaml"))


@functools.cache
def load(name: str):
    return load_config(FOLDER / f"{name}.yaml")


def statistics(classes: int) -> Statistics:
    return Statistics(np.ones((4, classes), np.int32), np.zeros(4, np.int32))


@functools.cache
def build(name: str):
    cfg = load(name)
    with torch.device("meta"):
        return build_method(cfg, context(statistics(cfg.model.num_classes)))


def test_all_official_configs_are_there():
    assert len(official()) == 35 == len(set(official()))
    full_size = [name for name in SHIPPED if not name.startswith(("camvid/", "toy/", "small/"))]
    assert sorted(official() + OURS) == full_size


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_configs_build(name):
    cfg, method = load(name), build(name)
    stream = cfg.data.streams["labeled"]
    row = folder_row(stream.folder) if stream.dataset == "folder" else DATASETS[stream.dataset]
    assert cfg.model.num_classes == row.num_classes
    transform = build_transform(stream.augment)
    assert transform.crop == tuple(stream.augment["crop"])
    assert ("copypaste" in name or "benchmark" in name) == (transform.copy_paste == "random")
    assert ("rfs" in name or "benchmark" in name) == (SamplerConfig(**stream.sampler).order == "repeat_factor")
    assert stream.batch_size % cfg.train.devices == 0
    trained = [p for p in method.parameters() if p.requires_grad]
    assert sum(len(group["params"]) for group in method.parameter_groups()) == len(trained)
    if cfg.method["name"] == "deeplabv3plus":
        assert ("blv" in name) == (isinstance(method.pixel_loss.logits, BLV))
        return
    assert ("seesaw" in name or "benchmark" in name) == (method.criterion.seesaw is not None)
    assert ("matcher" in name or "benchmark" in name) == (method.criterion.matcher.copies is not None)


@pytest.mark.parametrize("name", official() + OURS)
def test_common_settings(name):
    """Optimiser, schedule, batch and loss of the release."""
    cfg = load(name)
    half = "bs8" in name
    classes, longest, steps, _, period, deeplab_period = SETS[name.split("/")[0]]
    stream, o, e = cfg.data.streams["labeled"], cfg.optim, cfg.eval
    assert (stream.batch_size, cfg.train.devices, cfg.data.workers) == (8 if half else 16, 8, 4)
    assert (cfg.model.num_classes, cfg.train.steps) == (classes, 400_000 if half else steps)
    assert (o.schedule, o.power, o.floor, cfg.train.save_every) == ("poly", 0.9, 0.0, 5000)
    assert (cfg.model.mean, cfg.model.std) == ((123.675, 116.28, 103.53), (58.395, 57.12, 57.375))
    assert e.convention == ("ltss" if name.startswith(LONG_TAILED) else "detectron2")
    large = "Swin" in name or "res640" in name
    crop, longest = (640, 2560) if large else (512, longest)
    transform = build_transform(stream.augment)
    assert transform.crop == (crop, crop) and transform.max_size == longest
    assert transform.choices == tuple(int(0.1 * x * crop) for x in range(5, 21))
    assert (transform.category_limit, transform.colour, transform.flip) == (1.0, True, 0.5)
    assert (e.short_edge, e.max_edge, e.scaled_max_edge) == (crop, longest, 7 * crop)
    assert (e.mode, e.scales, e.flip, e.batch_size) == ("whole", (1.0,), False, 1)
    if "deeplabv3p" in name:
        assert (o.name, o.lr, o.momentum, o.nesterov, o.weight_decay) == ("sgd", 0.01, 0.9, False, 1e-4)
        assert (o.clip, cfg.train.precision, e.every) == (None, "fp32", deeplab_period)
        assert (o.warmup, o.warmup_ratio if o.warmup else 0) == ((1000, 0.001) if "mhpv2_lt" in name else (0, 0))
        hardest = {"name": "hard_pixels", "fraction": 0.2}
        assert cfg.remedies["focus"] == (None if "blv" in name else hardest)
        return
    assert (o.name, o.lr, o.betas, o.weight_decay) == ("adamw", 5e-5 if half else 1e-4, (0.9, 0.999), 0.05)
    assert (o.clip, o.warmup, cfg.train.precision) == (0.01, 0, "fp16")
    assert e.every == (20_000 if half else 5_000 if large else period)
    loss = build(name).criterion.options
    assert (loss.class_weight, loss.mask_weight, loss.dice_weight, loss.no_object_weight) == (2.0, 5.0, 5.0, 0.1)
    assert (loss.points, loss.oversample, loss.importance, loss.normalizer) == (12544, 3.0, 0.75, "targets")
    assert build(name).model.decoder.query_feat.weight.shape == (100, 256)


@pytest.mark.parametrize("data", SETS)
def test_remedies(data):
    base = f"maskformer2_R50_bs16_{SETS[data][3]}"
    for solution in ("rfs", "benchmark"):
        if data in RFS and (solution == "rfs" or data in LONG_TAILED):
            sampler = SamplerConfig(**load(f"{data}/mask2former/{solution}-{base}").data.streams["labeled"].sampler)
            assert (sampler.level, sampler.threshold, sampler.mode) == (*RFS[data], "max")
    if data not in LONG_TAILED:
        return
    for solution in ("copypaste", "benchmark"):
        augment = load(f"{data}/mask2former/{solution}-{base}").data.streams["labeled"].augment
        assert (augment["copy_paste"], augment["copy_paste_max"]) == ("random", 100)
    for solution in ("seesaw", "benchmark"):
        options = build(f"{data}/mask2former/{solution}-{base}").criterion.options
        assert (options.class_loss, options.seesaw_p, options.seesaw_q) == ("seesaw", 1.2, 1.0)
    for solution in ("matcher", "benchmark"):
        matcher = load(f"{data}/mask2former/{solution}-{base}").method["matcher"]
        assert matcher == {"mode": "frequency", "threshold": MATCHER[data], "scale": 2.0}
    for solution, run in (
        ("rfs", "rfs"),
        ("copypaste", "copypaste"),
        ("seesaw", "seesaw"),
        ("matcher", "freq-matcher"),
    ):
        folder = load(f"{data}/mask2former/{solution}-{base}").folder
        assert folder == Path(f"training_dir/{RUNS[data]}_{run}_r50_bs16_{SETS[data][3]}")
    assert load(f"{data}/mask2former/{base}").output == "output"


def test_a_remedy_changes_nothing_else():
    """A solution's config is the baseline's but for the entries of the remedy."""
    base = load("ade20k_full/mask2former/maskformer2_R50_bs16_200k")
    for name in ("rfs", "copypaste", "seesaw", "matcher", "benchmark"):
        cfg = load(f"ade20k_full/mask2former/{name}-maskformer2_R50_bs16_200k")
        assert (cfg.optim, cfg.train, cfg.eval, cfg.data.val) == (base.optim, base.train, base.eval, base.data.val)
        same = dict(cfg.model.options) | {"class_head": "softmax"}
        assert same == base.model.options and cfg.model.backbone == base.model.backbone


@pytest.mark.parametrize("name", SWIN)
def test_swins_of_ade20k(name):
    cfg = load(f"ade20k/mask2former/swin/{name}")
    backbone, crop = SWIN[name]
    assert cfg.model.backbone == backbone and cfg.model.options["backbone"] == {"drop_path": 0.3}
    assert cfg.data.streams["labeled"].augment["crop"] == [crop, crop]
    assert cfg.eval.every == (10_000 if crop == 512 else 5_000)
    own_file = "IN21k" in name and backbone == "swin_base"
    assert cfg.model.pretrained == ("swin_base_patch4_window12_384_22k.pth" if own_file else True)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (
            "ade20k_full/mask2former/maskformer2_R50_bs16_200k",
            {(1e-5, 0.05): (53, 23_454_912), (1e-4, 0.05): (199, 20_637_456), (1e-4, 0.0): (93, 75_008)},
        ),
        (
            "ade20k_full/mask2former/seesaw-maskformer2_R50_bs16_200k",
            {(1e-5, 0.05): (53, 23_454_912), (1e-4, 0.05): (199, 20_637_713), (1e-4, 0.0): (93, 75_008)},
        ),
        (
            "ade20k/mask2former/maskformer2_R50_bs16_160k",
            {(1e-5, 0.05): (53, 23_454_912), (1e-4, 0.05): (199, 20_458_327), (1e-4, 0.0): (93, 75_008)},
        ),
        (
            "ade20k_full/mask2former/maskformer2_SwinL_bs16_200k",
            {
                (1e-5, 0.05): (197, 194_813_760),
                (1e-5, 0.0): (136, 387_444),
                (1e-4, 0.05): (199, 20_391_696),
                (1e-4, 0.0): (93, 75_008),
            },
        ),
        (
            "ade20k_full/deeplabv3p/deeplabv3p_R50_bs16_200k",
            {(0.01, 1e-4): (65, 40_507_407), (0.01, 0.0): (122, 56_800)},
        ),
    ],
)
def test_groups_of_the_optimiser(name, expected):
    """Tensors and elements by initial rate and decay, as counted in the release."""
    found = {}
    for group in build(name).parameter_groups():
        key = (pytest.approx(group["lr"]), group["weight_decay"])
        key = next(k for k in expected if k == key)
        tensors, elements = found.get(key, (0, 0))
        found[key] = (tensors + len(group["params"]), elements + sum(p.numel() for p in group["params"]))
    assert found == expected
    if "ade20k_full" in name and "seesaw" not in name:
        cfg = load(name)
        assert sum(n for _, n in found.values()) == TRAINED[cfg.method["name"], cfg.model.backbone]


def test_norms_of_the_residual_backbones():
    """ResNet-50 keeps its statistics and affine; ResNet-101 trains them, without decay."""
    fixed = build("ade20k/mask2former/maskformer2_R50_bs16_160k")
    trained = build("ade20k/mask2former/maskformer2_R101_bs16_90k")
    assert not any("bn" in name for name, _ in fixed.model.backbone.named_parameters())
    norms = {id(p) for name, p in trained.model.backbone.named_parameters() if "bn" in name or "downsample.1" in name}
    group = next(g for g in trained.parameter_groups() if g["lr"] == pytest.approx(1e-5) and not g["weight_decay"])
    assert {id(p) for p in group["params"]} == norms and len(norms) == 2 * 104


def decays(method) -> dict[str, tuple[float, float]]:
    """Rate and decay of every trained parameter."""
    names = {id(p): name for name, p in method.named_parameters()}
    return {names[id(p)]: (g["lr"], g["weight_decay"]) for g in method.parameter_groups() for p in g["params"]}


@pytest.mark.parametrize(
    ("change", "name", "tensors"),
    [
        ("model.options.frozen_norm=false", r"bn\d\.|downsample\.1\.", 106),
        ("model.backbone=swin_tiny", r"norm\w*\.|relative_position_bias_table", 64 + 12),
    ],
)
def test_norms_of_another_backbone_are_not_decayed(change, name, tensors):
    """One override of the ResNet-50 config is enough."""
    cfg = load_config(FOLDER / "ade20k/mask2former/maskformer2_R50_bs16_160k.yaml", [change])
    with torch.device("meta"):
        found = decays(build_method(cfg, context(statistics(cfg.model.num_classes))))
    backbone = {n: value for n, value in found.items() if n.startswith("model.backbone.")}
    norms = {n: value for n, value in backbone.items() if re.search(name, n)}
    assert len(norms) == tensors and set(norms.values()) == {(0.1 * 1e-4, 0.0)}
    assert {value for n, value in backbone.items() if n not in norms} == {(0.1 * 1e-4, 0.05)}
    fixed = decays(build("ade20k/mask2former/maskformer2_R50_bs16_160k"))
    assert {n: v for n, v in found.items() if n not in backbone} == {
        n: v for n, v in fixed.items() if "backbone" not in n
    }


def test_a_rule_that_finds_nothing_is_an_error():
    """Neither a parameter nor a constant."""
    cfg = load_config(
        FOLDER / "camvid/mask2former/maskformer2_R18.yaml", ["optim.groups=[{match: 'bakbone', lr_mult: 0.1}]"]
    )
    with torch.device("meta"):
        method = build_method(cfg, context(statistics(cfg.model.num_classes)))
    with pytest.raises(ConfigError, match="optim.groups: no parameter's name matches 'bakbone'"):
        method.parameter_groups()


@pytest.mark.parametrize(
    ("name", "rates"),
    [
        ("ade20k_full/mask2former/maskformer2_R50_bs16_200k", {0: 1e-4, 100_000: 5.3589e-5}),
        ("mhpv2_lt_7k/deeplabv3p/deeplabv3p_R50_bs16_52k", {0: 1e-5, 500: 4.9617e-3, 1000: 9.8268e-3}),
    ],
)
def test_learning_rates(name, rates):
    cfg = load(name)
    for step, rate in rates.items():
        assert learning_rate(cfg.optim.lr, step, cfg.optim, cfg.train.steps) == pytest.approx(rate, rel=1e-4)


@pytest.mark.parametrize(
    ("name", "q"),
    [
        ("ade20k_full", {1: 372, 2: 268, 3: 99, 4: 72, 6: 36}),
        ("coco_stuff_lt_40k", {1: 96, 2: 40, 3: 18, 4: 7, 5: 4, 6: 1, 7: 2, 9: 2, 10: 1}),
        ("mhpv2_lt_7k", {1: 32, 2: 15, 3: 9, 4: 1, 5: 1, 9: 1}),
    ],
)
def test_queries_of_the_published_counts(name, q):
    """`counts: published` gives the number of classes with q queries that the release has."""
    path = FOLDER / name / "mask2former" / f"matcher-maskformer2_R50_bs16_{SETS[name][3]}.yaml"
    cfg = load_config(path, ["method.matcher.counts=published"])
    with torch.device("meta"):
        copies = build_method(cfg, context(statistics(cfg.model.num_classes))).criterion.matcher.copies
    values, counts = np.unique(copies, return_counts=True)
    assert dict(zip(values.tolist(), counts.tolist(), strict=True)) == q


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("mask2former/maskformer2_R18", "method.criterion.class_loss=seesaw", "class_head: seesaw, not softmax"),
        ("mask2former/maskformer2_R18", "method.matcher.mode=frequency", "threshold: 0.0 is not positive"),
        ("mask2former/matcher-maskformer2_R18", "method.matcher.counts=published", "known for ade20k_full, coco"),
        ("mask2former/maskformer2_R18", "method.matchr=1", "did you mean 'matcher'"),
        ("mask2former/maskformer2_R18", "method.name=mask2fromer", "did you mean 'mask2former'"),
        ("deeplabv3p/deeplabv3p_R18", "method.loss=blv", "unknown key 'loss'"),
        ("mask2former/maskformer2_R18", "remedies.focus.name=focal", "no such slot .it classifies queries"),
        ("mask2former/seesaw-maskformer2_R18", "remedies.logits.name=logit_adjustment", "class_loss seesaw adjusts"),
        ("mask2former/maskformer2_R18", "remedies.logits.name=ldam", "needs a cosine classifier"),
    ],
)
def test_settings_that_contradict_each_other(name, change, message):
    cfg = load_config(FOLDER / "camvid" / f"{name}.yaml", [change])
    with pytest.raises(ConfigError, match=message), torch.device("meta"):
        build_method(cfg, context(statistics(11)))
