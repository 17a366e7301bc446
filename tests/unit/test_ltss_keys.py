"""detectron2's keys on the benchmark's command line: what each one does, and which are refused."""

import inspect
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

from common.config import Config, ConfigError, load_config
from common.data.orders import SamplerConfig
from common.data.recipes.build import build_transform
from common.data.statistics import Statistics
from common.engine.optim import build_optimizers, rates, set_learning_rates
from common.models.backbones import BACKBONES
from ltss_benchmark.detectron2_keys import read_config
from ltss_benchmark.detectron2_keys.agreeing import AGREEING
from ltss_benchmark.detectron2_keys.read import KNOWN
from ltss_benchmark.detectron2_keys.translated import DEPENDENT, KEYS, TTA_SCALES
from ltss_benchmark.detectron2_keys.untranslated import DONE_ANYWAY, REFUSED
from ltss_benchmark.methods import build_method, check_options, ignored
from tests.contexts import context

CONFIGS = Path(__file__).parents[2] / "ltss_benchmark" / "configs"
BASE = CONFIGS / "ade20k_full" / "mask2former" / "maskformer2_R50_bs16_200k.yaml"
SMALL = CONFIGS / "camvid" / "mask2former" / "maskformer2_R18.yaml"
STREAM, CRITERION, OPTIONS = "data.streams.labeled", "method.criterion", "model.options"

EXAMPLES = {  # a value that users type, and what it gives
    "OUTPUT_DIR": ("runs/a/b", "folder", Path("runs/a/b")),
    "SEED": ("7", "seed", 7),
    "SOLVER.MAX_ITER": ("1000", "train.steps", 1000),
    "SOLVER.IMS_PER_BATCH": ("8", f"{STREAM}.batch_size", 8),
    "SOLVER.REFERENCE_WORLD_SIZE": ("4", "train.devices", 4),
    "SOLVER.BASE_LR": ("5e-5", "optim.lr", 5e-5),
    "SOLVER.MOMENTUM": ("0.8", "optim.momentum", 0.8),
    "SOLVER.NESTEROV": ("True", "optim.nesterov", True),
    "SOLVER.WEIGHT_DECAY": ("1e-3", "optim.weight_decay", 1e-3),
    "SOLVER.OPTIMIZER": ("SGD", "optim.name", "sgd"),
    "SOLVER.AMP.ENABLED": ("False", "train.precision", "fp32"),
    "SOLVER.CHECKPOINT_PERIOD": ("100", "train.save_every", 100),
    "SOLVER.CLIP_GRADIENTS.CLIP_VALUE": ("0.1", "optim.clip", 0.1),
    "SOLVER.POLY_LR_POWER": ("1.0", "optim.power", 1.0),
    "SOLVER.WARMUP_ITERS": ("10", "optim.warmup", 10),
    "SOLVER.WARMUP_FACTOR": ("0.1", "optim.warmup_ratio", 0.1),
    "MODEL.WEIGHTS": ("a.pkl", "model.checkpoint", "a.pkl"),
    "MODEL.PIXEL_MEAN": ("[1.0, 2.0, 3.0]", "model.mean", (1.0, 2.0, 3.0)),
    "MODEL.PIXEL_STD": ("(1.0, 2.0, 3.0)", "model.std", (1.0, 2.0, 3.0)),
    "MODEL.SWIN.DROP_PATH_RATE": ("0.2", f"{OPTIONS}.backbone.drop_path", 0.2),
    "MODEL.SEM_SEG_HEAD.NUM_CLASSES": ("5", "model.num_classes", 5),
    "MODEL.SEM_SEG_HEAD.TRANSFORMER_ENC_LAYERS": ("3", f"{OPTIONS}.encoder_layers", 3),
    "MODEL.MASK_FORMER.NUM_OBJECT_QUERIES": ("50", f"{OPTIONS}.num_queries", 50),
    "MODEL.MASK_FORMER.HIDDEN_DIM": ("128", f"{OPTIONS}.hidden_dim", 128),
    "MODEL.MASK_FORMER.NHEADS": ("4", f"{OPTIONS}.heads", 4),
    "MODEL.MASK_FORMER.DIM_FEEDFORWARD": ("512", f"{OPTIONS}.decoder_hidden", 512),
    "MODEL.MASK_FORMER.DEC_LAYERS": ("10", f"{OPTIONS}.decoder_layers", 9),
    "MODEL.MASK_FORMER.NO_OBJECT_WEIGHT": ("0.2", f"{CRITERION}.no_object_weight", 0.2),
    "MODEL.MASK_FORMER.CLASS_WEIGHT": ("1.0", f"{CRITERION}.class_weight", 1.0),
    "MODEL.MASK_FORMER.MASK_WEIGHT": ("20.0", f"{CRITERION}.mask_weight", 20.0),
    "MODEL.MASK_FORMER.DICE_WEIGHT": ("1.0", f"{CRITERION}.dice_weight", 1.0),
    "MODEL.MASK_FORMER.TRAIN_NUM_POINTS": ("100", f"{CRITERION}.points", 100),
    "MODEL.MASK_FORMER.OVERSAMPLE_RATIO": ("2.0", f"{CRITERION}.oversample", 2.0),
    "MODEL.MASK_FORMER.IMPORTANCE_SAMPLE_RATIO": ("0.5", f"{CRITERION}.importance", 0.5),
    "DATALOADER.NUM_WORKERS": ("0", "data.workers", 0),
    "DATALOADER.SAMPLER_TRAIN": ("RepeatFactorTrainingSampler_Seg", f"{STREAM}.sampler.order", "repeat_factor"),
    "DATALOADER.REPEAT_THRESHOLD": ("0.001", f"{STREAM}.sampler.threshold", 0.001),
    "DATALOADER.REPEAT_FACTOR_MODE": ("mean", f"{STREAM}.sampler.mode", "mean"),
    "DATALOADER.FREQUENCY_TYPE": ("pixel", f"{STREAM}.sampler.level", "pixel"),
    "INPUT.COPY_PASTE.ENABLED": ("True", f"{STREAM}.augment.copy_paste", "random"),
    "INPUT.COPY_PASTE.MAX_NUM": ("9", f"{STREAM}.augment.copy_paste_max", 9),
    "INPUT.CROP.SIZE": ("(640, 640)", f"{STREAM}.augment.crop", [640, 640]),
    "INPUT.CROP.SINGLE_CATEGORY_MAX_AREA": ("0.75", f"{STREAM}.augment.category_limit", 0.75),
    "INPUT.MIN_SIZE_TRAIN": ("(256,)", f"{STREAM}.augment.short_edges", [256]),
    "INPUT.MAX_SIZE_TRAIN": ("999", f"{STREAM}.augment.max_size", 999),
    "INPUT.MIN_SIZE_TEST": ("640", "eval.short_edge", 640),
    "INPUT.MAX_SIZE_TEST": ("999", "eval.max_edge", 999),
    "INPUT.COLOR_AUG_SSD": ("False", f"{STREAM}.augment.colour", False),
    "INPUT.RANDOM_FLIP": ("none", f"{STREAM}.augment.flip", 0.0),
    "LOSS.LOSS_TYPE": ("Seesaw", f"{OPTIONS}.class_head", "seesaw"),
    "LOSS.SEESAW_P": ("0.8", f"{CRITERION}.seesaw_p", 0.8),
    "LOSS.SEESAW_Q": ("2.0", f"{CRITERION}.seesaw_q", 2.0),
    "MATCHER.MODE": ("multi-match", "method.matcher.mode", "frequency"),
    "MATCHER.T": ("0.001", "method.matcher.threshold", 0.001),
    "MATCHER.S": ("3.0", "method.matcher.scale", 3.0),
    "TEST.EVAL_PERIOD": ("50", "eval.every", 50),
    "TEST.AUG.ENABLED": ("True", "eval.scales", (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)),
    "TEST.AUG.FLIP": ("True", "eval.flip", True),
    "TEST.AUG.MAX_SIZE": ("999", "eval.scaled_max_edge", 999),
}


def at(cfg: Config, path: str):
    value = cfg
    for part in path.split("."):
        value = value[part] if isinstance(value, dict) else getattr(value, part)
    return value


def statistics(classes: int) -> Statistics:
    return Statistics(np.ones((4, classes), np.int32), np.zeros(4, np.int32))


def method_of(cfg: Config):
    with torch.device("meta"):
        return build_method(cfg, context(statistics(cfg.model.num_classes)))


@pytest.mark.parametrize("key", EXAMPLES)
def test_keys_of_detectron2(key):
    text, path, expected = EXAMPLES[key]
    assert at(read_config(BASE, [key, text]), path) == expected


def test_every_key_has_an_example_and_all_are_taken():
    """The owners of the sections take the values: a network is built, its criterion, recipe and sampler."""
    assert EXAMPLES.keys() | {"INPUT.COPY_PASTE.MODE"} == KEYS.keys() | DEPENDENT.keys()
    apart = ("MODEL.SWIN.DROP_PATH_RATE",)  # of another backbone
    words = [f"{key}={text}" for key, (text, *_) in EXAMPLES.items() if key not in apart]
    cfg = read_config(BASE, words)
    method = method_of(cfg)
    options = method.criterion.options
    assert (options.points, options.oversample, options.seesaw_q, options.mask_weight) == (100, 2.0, 2.0, 20.0)
    assert method.criterion.matcher.copies is not None and len(method.model.decoder.query_feat.weight) == 50
    stream = cfg.data.streams["labeled"]
    transform, sampler = build_transform(stream.augment), SamplerConfig(**stream.sampler)
    assert (transform.crop, transform.choices, transform.copy_paste) == ((640, 640), (256,), "random")
    assert (sampler.order, sampler.threshold, sampler.mode, sampler.level) == ("repeat_factor", 0.001, "mean", "pixel")
    assert "drop_path" in inspect.signature(BACKBONES["swin_tiny"]).parameters


# Rates --------------------------------------------------------------------------------------------------------------


def detectron2_rate(step, base=1e-4, steps=1000, power=0.9, warmup=0, factor=0.001):
    """base · w(t) · (1 − t/T)^power; w rises linearly from the factor to 1 in the warm-up."""
    share = factor * (1 - step / warmup) + step / warmup if step < warmup else 1.0
    return base * share * (1 - step / steps) ** power


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("SOLVER.BASE_LR 5e-5", {"base": 5e-5}),
        ("SOLVER.POLY_LR_POWER 0.5 SOLVER.POLY_LR_CONSTANT_ENDING 0.0", {"power": 0.5}),
        ("SOLVER.WARMUP_ITERS 100", {"warmup": 100}),
        ("SOLVER.WARMUP_ITERS 100 SOLVER.WARMUP_METHOD linear", {"warmup": 100}),
        ("SOLVER.WARMUP_FACTOR 0.1 SOLVER.WARMUP_ITERS 100", {"warmup": 100, "factor": 0.1}),
        ("SOLVER.WARMUP_ITERS 100 optim.warmup_ratio=0.1", {"warmup": 100, "factor": 0.1}),
        ("SOLVER.WARMUP_ITERS 100 SOLVER.WARMUP_FACTOR 1e-6", {"warmup": 100, "factor": 1e-6}),
    ],
)
def test_rates_of_every_group_are_detectron2s(words, expected):
    cfg = read_config(BASE, ["SOLVER.MAX_ITER", "1000", *words.split()])
    optimizers = build_optimizers(method_of(cfg).parameter_groups())
    for step in (0, 1, 50, 100, 500, 999):
        set_learning_rates(optimizers, step, cfg.optim, cfg.train.steps)
        backbone, *others = rates(optimizers).values()
        assert backbone == pytest.approx(0.1 * detectron2_rate(step, **expected), rel=1e-6)
        assert others == pytest.approx([detectron2_rate(step, **expected)] * len(others), rel=1e-6)


# Keys that depend on the config -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "every"),
    [
        ("TEST.EVAL_PERIOD 0", 200_000),
        ("TEST.EVAL_PERIOD 0 SOLVER.MAX_ITER 30", 30),
        ("train.steps=40 TEST.EVAL_PERIOD=0", 40),
    ],
)
def test_an_evaluation_at_the_end_only(words, every):
    cfg = read_config(BASE, words.split())
    assert cfg.eval.every == every == cfg.train.steps


@pytest.mark.parametrize(
    ("name", "words", "mode"),
    [
        ("maskformer2", "ENABLED True MODE rare", "rare"),
        ("maskformer2", "MODE rare ENABLED True", "rare"),
        ("maskformer2", "MODE rare ENABLED False", "none"),
        ("copypaste-maskformer2", "MODE rare", "rare"),
        ("copypaste-maskformer2", "ENABLED False", "none"),
        ("maskformer2", "augment.copy_paste=rare ENABLED True", "rare"),
        ("maskformer2", "augment.copy_paste=random MODE rare", "rare"),
    ],
)
def test_the_mode_of_copy_paste(name, words, mode):
    typed = [f"INPUT.COPY_PASTE.{w}" if w in ("ENABLED", "MODE") else w for w in words.split()]
    typed = [f"{STREAM}.{w}" if w.startswith("augment.") else w for w in typed]
    cfg = read_config(SMALL.with_name(f"{name}_R18.yaml"), typed)
    assert cfg.data.streams["labeled"].augment["copy_paste"] == mode


def test_a_mode_alone_does_not_turn_copy_paste_on():
    with pytest.warns(UserWarning, match="^INPUT.COPY_PASTE.MODE: ignored, .* add INPUT.COPY_PASTE.ENABLED True$") as w:
        cfg = read_config(BASE, ["INPUT.COPY_PASTE.MODE", "rare"])
    assert cfg.data.streams["labeled"].augment["copy_paste"] == "none" and len(w) == 1


# Values -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text", ["runs/2024", "2024/1e3", "1e3", "runs/true", "a b/null", "runs/ä: #1", "x/(a)", 'x/"']
)
def test_folders_and_files_may_look_like_numbers(text):
    cfg = read_config(BASE, ["OUTPUT_DIR", text, "MODEL.WEIGHTS", text])
    assert cfg.folder == Path(text) and cfg.model.checkpoint == text


def test_keys_of_both_kinds_are_mixed():
    words = ["SOLVER.MAX_ITER", "10", "optim.lr=1e-3", "seed", "7", "train.keep", "3", "SEED=8"]
    cfg = read_config(BASE, words)
    assert (cfg.train.steps, cfg.optim.lr, cfg.seed, cfg.train.keep) == (10, 1e-3, 8, 3)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["SOLVER.MAXITER", "3"], "SOLVER.MAXITER: unknown; did you mean 'SOLVER.MAX_ITER'"),
        (["SOLVER.MAX_ITER"], "SOLVER.MAX_ITER: no value follows"),
        (["SOLVER.AMP.ENABLED", "yes"], "SOLVER.AMP.ENABLED: 'yes' is neither True nor False"),
        (["DATALOADER.SAMPLER_TRAIN", "RandomSubsetTrainingSampler"], "is not one of TrainingSampler, Repeat"),
        (["MATCHER.MODE", "rare-first"], "MATCHER.MODE: 'rare-first' is not one of default, multi_match"),
        (["OUTPUT_DIR", "/"], "OUTPUT_DIR: '/' has no last part"),
        (["MODEL.MASK_FORMER.DEC_LAYERS", "ten"], "MODEL.MASK_FORMER.DEC_LAYERS: "),
        (["SEED", "-1"], "SEED: -1 (a random seed) is not used here: runs can be repeated; give a number from 0 on"),
        (["SOLVER.POLY_LR_CONSTANT_ENDING", "0.1"], "optim.floor one lowest rate of all groups"),
        (["DATALOADER.FILTER_EMPTY_ANNOTATIONS", "True"], "set data.streams.labeled.list to the images to train on"),
        (["SOLVER.GAMMA", "0.1"], "set optim.gamma with optim.schedule=step"),
        *((([key, "1"]), f"{key}: not used here: ") for key in REFUSED),
        *((([key, "other"]), f"{key}: 'other' is not used here: {why}") for key, (_, why) in DONE_ANYWAY.items()),
    ],
)
def test_keys_that_are_refused_are_named(words, message):
    with pytest.raises(ConfigError) as error:
        read_config(BASE, words)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_values_of_what_is_done_anyway_change_nothing():
    words = [word for key, (values, _) in DONE_ANYWAY.items() for value in values for word in (key, value.title())]
    assert read_config(BASE, words) == load_config(BASE)


def test_a_key_is_known_in_one_way():
    assert len(KNOWN) == len(set(KNOWN)) == sum(map(len, (KEYS, DEPENDENT, AGREEING, DONE_ANYWAY, REFUSED)))
    loader = "NUM_WORKERS ASPECT_RATIO_GROUPING SAMPLER_TRAIN REPEAT_THRESHOLD REPEAT_SQRT RANDOM_SUBSET_RATIO " \
        "FILTER_EMPTY_ANNOTATIONS FREQUENCY_TYPE ANN_TYPE REPEAT_FACTOR_FILE REPEAT_FACTOR_MODE"  # fmt: skip
    assert {f"DATALOADER.{name}" for name in loader.split()} == {k for k in KNOWN if k.startswith("DATALOADER.")}
    assert TTA_SCALES == tuple(edge / 512 for edge in (256, 384, 512, 640, 768, 896))


# Bounds -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("MODEL.MASK_FORMER.TRAIN_NUM_POINTS 0", "method.criterion.points: 0 is less than 1"),
        ("MODEL.MASK_FORMER.NUM_OBJECT_QUERIES 0", "model.options.num_queries: 0 is less than 1"),
        ("SOLVER.BASE_LR -1", "optim.lr: -1.0 is less than 0"),
        ("SOLVER.MAX_ITER 0", "train.steps: 0 is less than 1"),
        ("SOLVER.IMS_PER_BATCH 0", "data.streams.labeled.batch_size: 0 is less than 1"),
        ("MODEL.MASK_FORMER.OVERSAMPLE_RATIO 0.5", "method.criterion.oversample: 0.5 is less than 1"),
        ("MODEL.MASK_FORMER.IMPORTANCE_SAMPLE_RATIO 1.5", "method.criterion.importance: 1.5 is more than 1"),
        ("MODEL.MASK_FORMER.DEC_LAYERS 1", "model.options.decoder_layers: 0 is less than 1"),
        ("MODEL.MASK_FORMER.HIDDEN_DIM 33", "model.options.hidden_dim: 33 must be a multiple of 32"),
        ("LOSS.SEESAW_P -1", "method.criterion.seesaw_p: -1.0 is less than 0"),
        ("MATCHER.S 0", "method.matcher.scale: 0.0 is not above 0"),
        ("DATALOADER.FREQUENCY_TYPE video", "data.streams.labeled.sampler.level: 'video' is not one of"),
        ("INPUT.COPY_PASTE.MODE all INPUT.COPY_PASTE.ENABLED True", "data.streams.labeled.augment.copy_paste: 'all'"),
    ],
)
def test_bounds_name_the_key_that_was_typed(words, message):
    key = words.split()[0] if "COPY_PASTE" not in words else "INPUT.COPY_PASTE.ENABLED"
    with pytest.raises(ConfigError) as error:
        read_config(BASE, words.split(), check_options)
    assert str(error.value).startswith(f"{key} ") and message in str(error.value) and "\n" not in str(error.value)


def test_an_error_of_our_own_key_names_no_other():
    with pytest.raises(ConfigError, match=rf"^{BASE.name}: optim.lr: -1.0 is less than 0$"):
        read_config(BASE, ["optim.lr=-1", "SOLVER.MOMENTUM", "0.5"], check_options)


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("[!_]*/**/*.yaml")), ids=lambda path: path.stem)
def test_shipped_configs_are_within_them(path):
    read_config(path, [], check_options)


# Unknown keys, and config files of detectron2 -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("SOLVER.MAXITER", "SOLVER.MAX_ITER"),
        ("MODEL.MASKFORMER.NHEADS", "MODEL.MASK_FORMER.NHEADS"),
        ("MODEL.MASK_FORMER.NUM_OBJECT_QUERY", "MODEL.MASK_FORMER.NUM_OBJECT_QUERIES"),
        ("MODEL.META_ARCHITECTUR", "MODEL.META_ARCHITECTURE"),
        ("MODEL.ROI_HEADS.NUM_CLASSES", None),
        ("MODEL.SEM_SEG_HEAD.COMMON_STRIDE", None),
        ("TEST.DETECTIONS_PER_IMAGE", None),
        ("SOLVER.WARMUP_X", None),
    ],
)
def test_nearest_keys_only_where_they_are_near(key, meant):
    with pytest.raises(ConfigError) as error:
        read_config(BASE, [key, "1"])
    expected = f"did you mean {meant!r}?" if meant else "leave it out, or set the option of this project"
    assert str(error.value).startswith(f"{key}: unknown; {expected}") and len(str(error.value)) < 120


@pytest.mark.parametrize(
    ("folder", "name", "counterpart"),
    [
        (
            "configs/ade20k_full/mask2former",
            "maskformer2_R50_bs16_200k.yaml",
            "ade20k_full/mask2former/maskformer2_R50",
        ),
        (
            "configs/mhpv2_lt_7k/mask2former",
            "matcher-maskformer2_R50_bs16_52k.yaml",
            "mhpv2_lt_7k/mask2former/matcher-",
        ),
        ("ade20k/semantic-segmentation", "maskformer2_R50_bs16_160k.yaml", "ade20k/mask2former/maskformer2_R50_bs16"),
        ("lvis", "lvis_R50.yaml", "none of this name; see configs/"),
    ],
)
def test_detectron2s_own_files_are_pointed_to_their_counterparts(tmp_path, folder, name, counterpart):
    path = tmp_path / folder / name
    path.parent.mkdir(parents=True)
    path.write_text("_BASE_: Base.yaml\nMODEL:\n  META_ARCHITECTURE: MaskFormer\n")
    with pytest.raises(ConfigError) as error:
        read_config(path, [])
    assert f"{path}: a config of detectron2" in str(error.value) and counterpart in str(error.value)
    path.unlink()
    with pytest.raises(ConfigError, match="did you mean configs/" if "lvis" not in name else "cannot read the config"):
        read_config(path, [])


# Options that are set in vain ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ("MATCHER.T 0.1 MATCHER.S 1.0", "method.matcher: threshold, scale: ignored where mode is one_to_one"),
        ("LOSS.SEESAW_P 0.8", "method.criterion: seesaw_p: ignored where class_loss is ce, not seesaw"),
        ("LOSS.LOSS_TYPE Seesaw MODEL.MASK_FORMER.NO_OBJECT_WEIGHT 0.5", "0.5 is ignored where class_loss is seesaw"),
        (f"{STREAM}.augment.rare_classes=[1]", "augment: rare_classes: ignored where copy_paste is none, not rare"),
        ("INPUT.COPY_PASTE.ENABLED True " + f"{STREAM}.augment.rare_classes=[1]", "copy_paste is random, not rare"),
        ("INPUT.COPY_PASTE.MAX_NUM 3", "copy_paste_max: ignored where copy_paste is none, not random"),
    ],
)
def test_options_without_their_remedy_are_said(words, line):
    with pytest.warns(UserWarning) as said:
        method_of(read_config(SMALL, words.split()))
    [text] = [str(w.message) for w in said]
    assert line in text and "\n" not in text


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("[!_]*/**/*.yaml")), ids=lambda path: path.stem)
def test_shipped_configs_set_nothing_in_vain(path):
    assert ignored(load_config(path)) == []


def test_remedies_in_use_are_quiet():
    words = "MATCHER.MODE multi-match MATCHER.T 0.1 LOSS.LOSS_TYPE Seesaw LOSS.SEESAW_P 0.8"
    words += " INPUT.COPY_PASTE.ENABLED True"
    rare = ["INPUT.COPY_PASTE.MODE=rare", f"{STREAM}.augment.rare_classes=[1]"]
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        method_of(read_config(SMALL, [*words.split(), *rare]))
    assert [str(w.message) for w in said] == []
