"""detectron2's keys that become keys of this project: what each value is translated to."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from common import distributed
from common.config import Config, ConfigError, OptimConfig
from ltss_benchmark.detectron2_keys.weights import quoted, weights

Typed = Mapping[str, str]  # every detectron2 key on the command line
# our key, or what makes the overrides of a value
Translation = str | Callable[[str, Typed], Sequence[str]]

AUGMENT = "data.streams.labeled.augment"
SAMPLER = "data.streams.labeled.sampler"
CRITERION = "method.criterion"
MATCHER = "method.matcher"
NETWORK = "model.options"
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
        raise ConfigError(
            f"{value!r} has no last part that could name the run; give a folder of its own"
        )
    return [f"output={quoted(str(path.parent))}", f"name={quoted(path.name)}"]


def seed(value: str, typed: Typed) -> Sequence[str]:
    """detectron2 draws one where it is negative."""
    if int(value) < 0:
        raise ConfigError(
            f"{value} (a random seed) is not used here: runs can be repeated; give a number from 0 on"
        )
    return [f"seed={value}"]


def layers(value: str, typed: Typed) -> Sequence[str]:
    """detectron2 counts the prediction before the first layer, too."""
    return [f"{NETWORK}.decoder_layers={int(value) - 1}"]


KEYS: dict[str, Translation] = {
    "OUTPUT_DIR": folder,
    "SEED": seed,
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
    "MATCHER.MODE": choice(
        default=[f"{MATCHER}.mode=one_to_one"], multi_match=[f"{MATCHER}.mode=frequency"]
    ),
    "MATCHER.T": f"{MATCHER}.threshold",
    "MATCHER.S": f"{MATCHER}.scale",
    "INPUT.CROP.SIZE": f"{AUGMENT}.crop",
    "INPUT.CROP.SINGLE_CATEGORY_MAX_AREA": f"{AUGMENT}.category_limit",
    "INPUT.MIN_SIZE_TRAIN": f"{AUGMENT}.short_edges",
    "INPUT.MAX_SIZE_TRAIN": f"{AUGMENT}.max_size",
    "INPUT.MIN_SIZE_TEST": "eval.short_edge",
    "INPUT.MAX_SIZE_TEST": "eval.max_edge",
    "INPUT.COLOR_AUG_SSD": f"{AUGMENT}.colour",
    "INPUT.RANDOM_FLIP": choice(
        horizontal=[f"{AUGMENT}.flip=0.5"], none=[f"{AUGMENT}.flip=0.0"]
    ),
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
    "SOLVER.WARMUP_FACTOR": "optim.warmup_ratio",
    "TEST.AUG.ENABLED": switch(
        [f"eval.scales={list(TTA_SCALES)}", "eval.flip=true"],
        ["eval.scales=[1.0]", "eval.flip=false"],
    ),
    "TEST.AUG.FLIP": "eval.flip",
    "TEST.AUG.MAX_SIZE": "eval.scaled_max_edge",
}


def copy_paste(value: str, typed: Typed, draft: Config) -> Sequence[str]:
    if not truth(value):
        return [f"{AUGMENT}.copy_paste=none"]

    before = mode_of(draft)
    mode = typed.get("INPUT.COPY_PASTE.MODE", "random" if before == "none" else before)
    return [f"{AUGMENT}.copy_paste={mode}"]


def copy_paste_mode(value: str, typed: Typed, draft: Config) -> Sequence[str]:
    """Of a Copy-Paste that is on; `copy_paste` sees to it where that is typed, too."""
    if "INPUT.COPY_PASTE.ENABLED" in typed:
        return []
    if mode_of(draft) == "none":
        if distributed.rank() == 0:
            text = "INPUT.COPY_PASTE.MODE: ignored, since Copy-Paste is off; add INPUT.COPY_PASTE.ENABLED True"
            warnings.warn(text, stacklevel=2)
        return []

    return [f"{AUGMENT}.copy_paste={value}"]


def mode_of(draft: Config) -> str:
    """The mode of Copy-Paste in a config."""
    stream = draft.data.streams.get("labeled")
    return "none" if stream is None else stream.augment.get("copy_paste", "none")


def period(value: str, typed: Typed, draft: Config) -> Sequence[str]:
    """0: only after the last step."""
    return [f"eval.every={value if int(value) else draft.train.steps}"]


def warmup(value: str, typed: Typed, draft: Config) -> Sequence[str]:
    """With detectron2's factor, where nobody gives another."""
    given = (
        "SOLVER.WARMUP_FACTOR" in typed or draft.optim.warmup_ratio != OptimConfig.warmup_ratio
    )
    return [f"optim.warmup={value}", *([] if given else ["optim.warmup_ratio=0.001"])]


# on the config without them
DEPENDENT: dict[str, Callable[[str, Typed, Config], Sequence[str]]] = {
    "INPUT.COPY_PASTE.ENABLED": copy_paste,
    "INPUT.COPY_PASTE.MODE": copy_paste_mode,
    "SOLVER.WARMUP_ITERS": warmup,
    "MODEL.WEIGHTS": weights,
    "TEST.EVAL_PERIOD": period,
}


def listed(value: str) -> str:
    """A tuple `(512, 512)` as a list of YAML."""
    return "[" + value[1:].rstrip(")").rstrip(", ") + "]" if value.startswith("(") else value
