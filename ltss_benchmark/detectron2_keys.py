"""What users type after detectron2's commands, `KEY VALUE …`, in this project's keys; or a refusal by name.

`read_config` takes both forms, also mixed: `SOLVER.MAX_ITER 1000 optim.lr=5e-5`. A value is read as YAML; detectron2's
tuples `(512, 512)` are understood. A key that says what is done anyway changes nothing.
"""

import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from common import distributed
from common.config import Config, ConfigError, OptimConfig, load_config, nearest

Pairs = Sequence[tuple[str, str]]  # of the command line: key, value
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
    return [f"output={quoted(str(path.parent))}", f"name={quoted(path.name)}"]


def quoted(text: str) -> str:
    """What YAML reads as this very string, which may look like a number."""
    return json.dumps(text, ensure_ascii=False)


def weights(value: str, typed: Typed) -> Sequence[str]:
    return [f"model.checkpoint={quoted(value) if value else 'null'}"]


def seed(value: str, typed: Typed) -> Sequence[str]:
    """detectron2 draws one where it is negative."""
    if int(value) < 0:
        raise ConfigError(f"{value} (a random seed) is not used here: runs can be repeated; give a number from 0 on")
    return [f"seed={value}"]


def layers(value: str, typed: Typed) -> Sequence[str]:
    """detectron2 counts the prediction before the first layer, too."""
    return [f"{NETWORK}.decoder_layers={int(value) - 1}"]


KEYS: dict[str, Translation] = {
    "OUTPUT_DIR": folder,
    "SEED": seed,
    "MODEL.WEIGHTS": weights,
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
        [f"eval.scales={list(TTA_SCALES)}", "eval.flip=true"], ["eval.scales=[1.0]", "eval.flip=false"]
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
    given = "SOLVER.WARMUP_FACTOR" in typed or draft.optim.warmup_ratio != OptimConfig.warmup_ratio
    return [f"optim.warmup={value}", *([] if given else ["optim.warmup_ratio=0.001"])]


DEPENDENT: dict[str, Callable[[str, Typed, Config], Sequence[str]]] = {  # on the config without them
    "INPUT.COPY_PASTE.ENABLED": copy_paste,
    "INPUT.COPY_PASTE.MODE": copy_paste_mode,
    "SOLVER.WARMUP_ITERS": warmup,
    "TEST.EVAL_PERIOD": period,
}

DONE_ANYWAY: dict[str, tuple[Sequence[str], str]] = {  # the value that changes nothing, and why no other is taken
    "DATALOADER.ANN_TYPE": (["seg"], "repeat factors come from the label maps; see data.streams.labeled.sampler"),
    "DATALOADER.ASPECT_RATIO_GROUPING": (["false"], "crops have one size, so nothing is grouped"),
    "DATALOADER.FILTER_EMPTY_ANNOTATIONS": (["false"], "set data.streams.labeled.list to the images to train on"),
    "DATALOADER.REPEAT_SQRT": (["true"], "repeat factors are square roots"),
    "INPUT.CROP.ENABLED": (["true"], "every image is cropped; set INPUT.CROP.SIZE"),
    "INPUT.CROP.TYPE": (["absolute"], "INPUT.CROP.SIZE is in pixels"),
    "INPUT.FORMAT": (["rgb"], "images are RGB"),
    "INPUT.MIN_SIZE_TRAIN_SAMPLING": (["choice"], "INPUT.MIN_SIZE_TRAIN lists the sizes"),
    "MODEL.BACKBONE.FREEZE_AT": (["0"], "every stage is trained; rates of a part are set by optim.groups"),
    "MODEL.MASK_FORMER.DEEP_SUPERVISION": (["true"], "every prediction is trained"),
    "MODEL.MASK_FORMER.DROPOUT": (["0", "0.0"], "the decoder has none"),
    "MODEL.MASK_FORMER.ENC_LAYERS": (["0"], "set MODEL.SEM_SEG_HEAD.TRANSFORMER_ENC_LAYERS"),
    "MODEL.MASK_FORMER.ENFORCE_INPUT_PROJ": (["false"], "the decoder takes the pixel decoder's channels as they are"),
    "MODEL.MASK_FORMER.PRE_NORM": (["false"], "norms follow their layers"),
    "MODEL.MASK_FORMER.SIZE_DIVISIBILITY": (["32"], "inputs are padded to what the network needs"),
    "MODEL.MASK_FORMER.TEST.INSTANCE_ON": (["false"], "segmentation is semantic"),
    "MODEL.MASK_FORMER.TEST.PANOPTIC_ON": (["false"], "segmentation is semantic"),
    "MODEL.MASK_FORMER.TEST.SEMANTIC_ON": (["true"], "segmentation is semantic"),
    "SOLVER.BIAS_LR_FACTOR": (["1", "1.0"], "set optim.groups"),
    "SOLVER.CLIP_GRADIENTS.CLIP_TYPE": (
        ["full_model"], "all gradients are clipped together by optim.clip, each by optim.clip_each",
    ),
    "SOLVER.CLIP_GRADIENTS.NORM_TYPE": (["2", "2.0"], "optim.clip is an L2 norm"),
    "SOLVER.POLY_LR_CONSTANT_ENDING": (
        ["0", "0.0"], "it is a share of each group's rate, optim.floor one lowest rate of all groups; set that",
    ),
    "SOLVER.RESCALE_INTERVAL": (["false"], "give the numbers of steps themselves"),
    "SOLVER.WARMUP_METHOD": (["linear"], "warm-up is linear; set optim.warmup and optim.warmup_ratio"),
    "SOLVER.WEIGHT_DECAY_BIAS": (["none", "null"], "set optim.groups"),
    "TEST.PRECISE_BN.ENABLED": (["false"], "batch norm keeps the statistics of training"),
    "WANDB.ENABLED": (["false"], "log.jsonl and TensorBoard files are always written"),
}  # fmt: skip

SWIN = "set model.backbone to swin_tiny, swin_small, swin_base or swin_large"
PANOPTIC = "it belongs to panoptic and instance segmentation; leave it out"
RUN = "OUTPUT_DIR names the run; log.jsonl and TensorBoard files are always written"
REFUSED: dict[str, str] = {
    "CUDNN_BENCHMARK": "set train.deterministic",
    "DATALOADER.RANDOM_SUBSET_RATIO": "set data.streams.labeled.list to the images to train on",
    "DATALOADER.REPEAT_FACTOR_FILE": "repeat factors are made from class counts, which are kept below data.cache",
    "DATASETS.TEST": "set data.val.dataset",
    "DATASETS.TRAIN": "set data.dataset",
    "INPUT.COPY_PASTE.RARE_FILE": "set data.streams.labeled.augment.rare_classes",
    "INPUT.DATASET_MAPPER_NAME": "set data.streams.labeled.augment.recipe",
    "INPUT.SIZE_DIVISIBILITY": "crops are padded to INPUT.CROP.SIZE",
    "MATCHER.DATASET": "set method.matcher.counts to dataset or published",
    "MODEL.BACKBONE.NAME": "set model.backbone",
    "MODEL.DEVICE": "give --device",
    "MODEL.MASK_FORMER.TEST.OBJECT_MASK_THRESHOLD": PANOPTIC,
    "MODEL.MASK_FORMER.TEST.OVERLAP_THRESHOLD": PANOPTIC,
    "MODEL.MASK_FORMER.TRANSFORMER_DECODER_NAME": "set model.name",
    "MODEL.META_ARCHITECTURE": "set model.name",
    "MODEL.RESNETS.DEPTH": "set model.backbone to resnet18, resnet50 or resnet101",
    "MODEL.RESNETS.NORM": "set model.options.frozen_norm and model.norm",
    "MODEL.SEM_SEG_HEAD.IGNORE_VALUE": "the data set knows it; that of a folder is data.folder.ignore",
    "MODEL.SEM_SEG_HEAD.LOSS_TYPE": "set method.loss of a DeepLabV3+ to hard_pixels, ce or blv",
    "MODEL.SEM_SEG_HEAD.NAME": "set model.name",
    "MODEL.SEM_SEG_HEAD.PIXEL_DECODER_NAME": "set model.name",
    **{f"MODEL.SWIN.{name}": SWIN for name in ("DEPTHS", "EMBED_DIM", "NUM_HEADS", "PRETRAIN_IMG_SIZE", "WINDOW_SIZE")},
    "SOLVER.BACKBONE_MULTIPLIER": "set optim.groups",
    "SOLVER.BASE_LR_END": "set optim.floor",
    "SOLVER.CLIP_GRADIENTS.ENABLED": "set optim.clip to a norm, or to null",
    "SOLVER.GAMMA": "set optim.gamma with optim.schedule=step",
    "SOLVER.LR_SCHEDULER_NAME": "set optim.schedule",
    "SOLVER.NUM_DECAYS": "set optim.milestones with optim.schedule=step",
    "SOLVER.STEPS": "set optim.milestones with optim.schedule=step",
    "SOLVER.WEIGHT_DECAY_EMBED": "set optim.groups",
    "SOLVER.WEIGHT_DECAY_NORM": "set optim.groups",
    "TEST.AUG.MIN_SIZES": "set eval.scales, multiples of eval.short_edge",
    "VIS_PERIOD": "set eval.panels",
    **{f"WANDB.{name}": RUN for name in ("ENTITY", "NAME", "PROJECT")},
}


def read_config(path: Path, words: Sequence[str]) -> Config:
    """The config of a file under a command line of KEY VALUE pairs and key=value words. Raises ConfigError."""
    pairs = split_pairs(words)
    draft = load_config(path, overrides([pair for pair in pairs if pair[0] not in DEPENDENT]))
    return load_config(path, overrides(pairs, draft))


def overrides(pairs: Pairs, draft: Config | None = None) -> list[str]:
    """`section.key=value` words of the pairs. draft: the config without the keys in DEPENDENT, which only they need."""
    typed = {key: value for key, value in pairs if key.isupper()}
    result: list[str] = []
    for key, value in pairs:
        result += translated(key, value.strip(), typed, draft) if key.isupper() else [f"{key}={value}"]
    return result


def split_pairs(words: Sequence[str]) -> Pairs:
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


def translated(key: str, value: str, typed: Typed, draft: Config | None) -> Sequence[str]:
    """Our overrides for one of detectron2's keys."""
    known, instead = DONE_ANYWAY.get(key, ((), REFUSED.get(key)))
    if instead is not None:
        if value.lower() in known:
            return []
        raise ConfigError(f"{key}: {'not' if key in REFUSED else f'{value!r} is not'} used here: {instead}")
    if key not in KEYS and key not in DEPENDENT:
        raise ConfigError(f"{key}: unknown; {nearest(key, [*KEYS, *DEPENDENT])}")
    try:
        if key in DEPENDENT:
            return DEPENDENT[key](value, typed, draft)
        rule = KEYS[key]
        return [f"{rule}={listed(value)}"] if isinstance(rule, str) else rule(value, typed)
    except ValueError as error:
        raise ConfigError(f"{key}: {error}") from error


def listed(value: str) -> str:
    """A tuple `(512, 512)` as a list of YAML."""
    return "[" + value[1:].rstrip(")").rstrip(", ") + "]" if value.startswith("(") else value
