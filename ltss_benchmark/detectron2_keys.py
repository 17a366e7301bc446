"""What users type after detectron2's commands, `KEY VALUE …`, in this project's keys; or a refusal by name.

`overrides` takes both forms, also mixed: `SOLVER.MAX_ITER 1000 optim.lr=5e-5`. A value is read as YAML; detectron2's
tuples `(512, 512)` are understood.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from common.config import ConfigError, nearest

Typed = Mapping[str, str]  # every detectron2 key on the command line
Translation = str | Callable[[str, Typed], Sequence[str]]  # our key, or what makes the overrides of a value

AUGMENT, SAMPLER = "data.streams.labeled.augment", "data.streams.labeled.sampler"
CRITERION, MATCHER, NETWORK = "method.criterion", "method.matcher", "model.options"
TTA_SCALES = (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)


def truth(value: str) -> bool:
    """True or False; ConfigError for anything else."""
    if value.lower() not in ("true", "false"):
        raise ConfigError(f"{value!r} is neither True nor False")
    return value.lower() == "true"


def choice(**known: Sequence[str]) -> Translation:
    """One of `known`, whatever its case, each with its overrides."""

    def translate(value: str, typed: Typed) -> Sequence[str]:
        for name, result in known.items():
            if value.lower().replace("-", "_") == name.lower():
                return result
        raise ConfigError(f"{value!r} is not one of {', '.join(known)}")

    return translate


def switch(on: Sequence[str], off: Sequence[str]) -> Translation:
    return lambda value, typed: on if truth(value) else off


def folder(value: str, typed: Typed) -> Sequence[str]:
    """A run's folder is <output>/<name>."""
    path = Path(value)
    if not path.name:
        raise ConfigError(f"{value!r} has no last part that could name the run; give a folder of its own")
    return [f"output={path.parent}", f"name={path.name}"]


def copy_paste(value: str, typed: Typed) -> Sequence[str]:
    mode = typed.get("INPUT.COPY_PASTE.MODE", "random") if truth(value) else "none"
    return [f"{AUGMENT}.copy_paste={mode}"]


def copy_paste_mode(value: str, typed: Typed) -> Sequence[str]:
    return [] if "INPUT.COPY_PASTE.ENABLED" in typed else [f"{AUGMENT}.copy_paste={value}"]


def layers(value: str, typed: Typed) -> Sequence[str]:
    """detectron2 counts the prediction before the first layer, too."""
    return [f"{NETWORK}.decoder_layers={int(value) - 1}"]


KEYS: dict[str, Translation] = {
    "OUTPUT_DIR": folder,
    "SEED": "seed",
    "MODEL.WEIGHTS": "model.checkpoint",
    "MODEL.SEM_SEG_HEAD.NUM_CLASSES": "model.num_classes",
    "MODEL.SWIN.DROP_PATH_RATE": f"{NETWORK}.backbone.drop_path",
    "MODEL.PIXEL_MEAN": "model.mean",
    "MODEL.PIXEL_STD": "model.std",
    "MODEL.MASK_FORMER.NUM_OBJECT_QUERIES": f"{NETWORK}.num_queries",
    "MODEL.MASK_FORMER.HIDDEN_DIM": f"{NETWORK}.hidden_dim",
    "MODEL.MASK_FORMER.NHEADS": f"{NETWORK}.heads",
    "MODEL.MASK_FORMER.DIM_FEEDFORWARD": f"{NETWORK}.decoder_hidden",
    "MODEL.MASK_FORMER.DEC_LAYERS": layers,
    "MODEL.SEM_SEG_HEAD.TRANSFORMER_ENC_LAYERS": f"{NETWORK}.encoder_layers",
    "MODEL.MASK_FORMER.NO_OBJECT_WEIGHT": f"{CRITERION}.no_object_weight",
    "MODEL.MASK_FORMER.CLASS_WEIGHT": f"{CRITERION}.class_weight",
    "MODEL.MASK_FORMER.MASK_WEIGHT": f"{CRITERION}.mask_weight",
    "MODEL.MASK_FORMER.DICE_WEIGHT": f"{CRITERION}.dice_weight",
    "MODEL.MASK_FORMER.TRAIN_NUM_POINTS": f"{CRITERION}.points",
    "MODEL.MASK_FORMER.OVERSAMPLE_RATIO": f"{CRITERION}.oversample",
    "MODEL.MASK_FORMER.IMPORTANCE_SAMPLE_RATIO": f"{CRITERION}.importance",
    "LOSS.LOSS_TYPE": choice(
        CE=[f"{CRITERION}.class_loss=ce", f"{NETWORK}.class_head=softmax"],
        Seesaw=[f"{CRITERION}.class_loss=seesaw", f"{NETWORK}.class_head=seesaw"],
    ),
    "LOSS.SEESAW_P": f"{CRITERION}.seesaw_p",
    "LOSS.SEESAW_Q": f"{CRITERION}.seesaw_q",
    "MATCHER.MODE": choice(default=[f"{MATCHER}.mode=one_to_one"], multi_match=[f"{MATCHER}.mode=frequency"]),
    "MATCHER.T": f"{MATCHER}.threshold",
    "MATCHER.S": f"{MATCHER}.scale",
    "INPUT.CROP.SIZE": f"{AUGMENT}.crop",
    "INPUT.CROP.SINGLE_CATEGORY_MAX_AREA": f"{AUGMENT}.category_limit",
    "INPUT.MIN_SIZE_TRAIN": f"{AUGMENT}.short_edges",
    "INPUT.MAX_SIZE_TRAIN": f"{AUGMENT}.max_size",
    "INPUT.MIN_SIZE_TEST": "eval.short_edge",
    "INPUT.MAX_SIZE_TEST": "eval.max_edge",
    "INPUT.COLOR_AUG_SSD": f"{AUGMENT}.colour",
    "INPUT.RANDOM_FLIP": choice(horizontal=[f"{AUGMENT}.flip=0.5"], none=[f"{AUGMENT}.flip=0.0"]),
    "INPUT.COPY_PASTE.ENABLED": copy_paste,
    "INPUT.COPY_PASTE.MODE": copy_paste_mode,
    "INPUT.COPY_PASTE.MAX_NUM": f"{AUGMENT}.copy_paste_max",
    "DATALOADER.NUM_WORKERS": "data.workers",
    "DATALOADER.SAMPLER_TRAIN": choice(
        TrainingSampler=[f"{SAMPLER}.order=shuffle"],
        RepeatFactorTrainingSampler=[f"{SAMPLER}.order=repeat_factor"],
        RepeatFactorTrainingSampler_Seg=[f"{SAMPLER}.order=repeat_factor"],
    ),
    "DATALOADER.REPEAT_THRESHOLD": f"{SAMPLER}.threshold",
    "DATALOADER.REPEAT_FACTOR_MODE": f"{SAMPLER}.mode",
    "DATALOADER.FREQUENCY_TYPE": f"{SAMPLER}.level",
    "SOLVER.MAX_ITER": "train.steps",
    "SOLVER.IMS_PER_BATCH": "data.streams.labeled.batch_size",
    "SOLVER.REFERENCE_WORLD_SIZE": "train.devices",
    "SOLVER.CHECKPOINT_PERIOD": "train.save_every",
    "SOLVER.AMP.ENABLED": switch(["train.precision=fp16"], ["train.precision=fp32"]),
    "SOLVER.OPTIMIZER": choice(ADAMW=["optim.name=adamw"], SGD=["optim.name=sgd"]),
    "SOLVER.BASE_LR": "optim.lr",
    "SOLVER.MOMENTUM": "optim.momentum",
    "SOLVER.NESTEROV": "optim.nesterov",
    "SOLVER.WEIGHT_DECAY": "optim.weight_decay",
    "SOLVER.CLIP_GRADIENTS.CLIP_VALUE": "optim.clip",
    "SOLVER.POLY_LR_POWER": "optim.power",
    "SOLVER.POLY_LR_CONSTANT_ENDING": "optim.floor",
    "SOLVER.WARMUP_ITERS": "optim.warmup",
    "SOLVER.WARMUP_FACTOR": "optim.warmup_ratio",
    "TEST.EVAL_PERIOD": "eval.every",
    "TEST.AUG.ENABLED": switch(
        [f"eval.scales={list(TTA_SCALES)}", "eval.flip=true"], ["eval.scales=[1.0]", "eval.flip=false"]
    ),
    "TEST.AUG.FLIP": "eval.flip",
    "TEST.AUG.MAX_SIZE": "eval.scaled_max_edge",
}

REFUSED: dict[str, str] = {
    "CUDNN_BENCHMARK": "set train.deterministic",
    "DATALOADER.ANN_TYPE": "repeat factors come from the label maps; see data.streams.labeled.sampler",
    "DATALOADER.ASPECT_RATIO_GROUPING": "crops have one size, so nothing is grouped",
    "DATALOADER.REPEAT_FACTOR_FILE": "repeat factors are made from class counts, which are kept below data.cache",
    "DATASETS.TEST": "set data.val.dataset",
    "DATASETS.TRAIN": "set data.dataset",
    "INPUT.COPY_PASTE.RARE_FILE": "set data.streams.labeled.augment.rare_classes",
    "INPUT.DATASET_MAPPER_NAME": "set data.streams.labeled.augment.recipe",
    "INPUT.FORMAT": "images are RGB",
    "MATCHER.DATASET": "set method.matcher.counts to dataset or published",
    "MODEL.BACKBONE.FREEZE_AT": "every stage is trained; rates of a part are set by optim.groups",
    "MODEL.BACKBONE.NAME": "set model.backbone",
    "MODEL.DEVICE": "give --device",
    "MODEL.META_ARCHITECTURE": "set model.name",
    "MODEL.RESNETS.DEPTH": "set model.backbone to resnet18, resnet50 or resnet101",
    "MODEL.RESNETS.NORM": "set model.options.frozen_norm and model.norm",
    "SOLVER.BACKBONE_MULTIPLIER": "set optim.groups",
    "SOLVER.CLIP_GRADIENTS.CLIP_TYPE": "all gradients are clipped together by optim.clip, each by optim.clip_each",
    "SOLVER.CLIP_GRADIENTS.ENABLED": "set optim.clip to a norm, or to null",
    "SOLVER.LR_SCHEDULER_NAME": "set optim.schedule",
    "SOLVER.STEPS": "set optim.milestones with optim.schedule=step",
    "SOLVER.WEIGHT_DECAY_EMBED": "set optim.groups",
    "SOLVER.WEIGHT_DECAY_NORM": "set optim.groups",
    "TEST.AUG.MIN_SIZES": "set eval.scales, multiples of eval.short_edge",
    "VIS_PERIOD": "set eval.panels",
    "WANDB.ENABLED": "log.jsonl and TensorBoard files are always written",
}


def overrides(words: Sequence[str]) -> list[str]:
    """`section.key=value` words from a command line of KEY VALUE pairs and key=value words. Raises ConfigError."""
    pairs = split_pairs(words)
    typed = {key: value for key, value in pairs if key.isupper()}
    result: list[str] = []
    for key, value in pairs:
        result += translated(key, value, typed) if key.isupper() else [f"{key}={value}"]
    return result


def split_pairs(words: Sequence[str]) -> list[tuple[str, str]]:
    """(key, value) of every `key=value` and every `KEY VALUE`."""
    pairs, rest = [], iter(words)
    for word in rest:
        key, sign, value = word.partition("=")
        if not sign:
            value = next(rest, None)
            if value is None:
                raise ConfigError(f"{key}: no value follows; write {key} VALUE or {key}=VALUE")
        pairs.append((key, value))
    return pairs


def translated(key: str, value: str, typed: Typed) -> Sequence[str]:
    """Our overrides for one of detectron2's keys."""
    if key in REFUSED:
        raise ConfigError(f"{key}: not used here: {REFUSED[key]}")
    if key not in KEYS:
        raise ConfigError(f"{key}: unknown; {nearest(key, KEYS)}")
    rule = KEYS[key]
    value = value.strip()
    if value.startswith("("):
        value = "[" + value[1:].rstrip(")").rstrip(", ") + "]"
    if isinstance(rule, str):
        return [f"{rule}={value}"]
    try:
        return rule(value, typed)
    except ValueError as error:
        raise ConfigError(f"{key}: {error}") from error
