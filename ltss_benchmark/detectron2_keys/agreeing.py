"""detectron2's keys that are taken where they say what the config does, in detectron2's words, and refused elsewhere.

Each has what the config does and how to make it do something else. Nothing is translated: one network or data set
chosen by several keys could contradict itself.
"""

import re
from collections.abc import Callable, Sequence
from typing import Any

from common.config import Config, GroupConfig
from common.config.text import parse
from common.data import DATASETS
from ltss_benchmark.detectron2_keys.translated import TTA_SCALES, listed

STREAM = "labeled"
MATCHER_NAMES = {
    "ade20k_full": "ade20k-full",
    "coco_stuff_lt_40k": "coco-lt",
    "mhpv2_lt_7k": "mhpv2-lt",
}
SWINS = {  # EMBED_DIM, DEPTHS, NUM_HEADS, WINDOW_SIZE, PRETRAIN_IMG_SIZE
    "swin_tiny": (96, [2, 2, 6, 2], [3, 6, 12, 24], 7, 224),
    "swin_small": (96, [2, 2, 18, 2], [3, 6, 12, 24], 7, 224),
    "swin_base": (128, [2, 2, 18, 2], [4, 8, 16, 32], 12, 384),
    "swin_large": (192, [2, 2, 18, 2], [6, 12, 24, 48], 12, 384),
}
# stands for all of the backbone in `optim.groups`
BACKBONE_WEIGHT = "model.backbone.layer1.0.conv1.weight"
NORM_WEIGHT = {
    "mask2former": "model.decoder.norm.weight",
    "deeplabv3plus_d2": "model.aspp.project.norm.weight",
}
EMBEDDING = "model.decoder.query_feat.weight"

# the values that say what a config does; none where detectron2 has no word
Said = Callable[[Config], Sequence[Any]]


def of_model(**words: str) -> Said:
    """The word for `model.name`."""
    return lambda cfg: [words[cfg.model.name]] if cfg.model.name in words else []


def crop_side(cfg: Config) -> Sequence[Any]:
    """Crops are padded to their own size."""
    crop = list(cfg.data.streams[STREAM].augment.get("crop", ()))
    return crop[:1] if len(set(crop)) == 1 else []


def train_set(cfg: Config) -> Sequence[Any]:
    return _registered(cfg.data.streams[STREAM].dataset, "train")


def test_set(cfg: Config) -> Sequence[Any]:
    return _registered(cfg.data.val.dataset, "val")


def _registered(dataset: str, split: str) -> Sequence[Any]:
    name = f"{dataset}_sem_seg_{split}"
    return [] if dataset == "folder" else [[name], name]


def matcher_set(cfg: Config) -> Sequence[Any]:
    """Of whose classes the frequencies are: the config's own set; none without the Frequency-based Matcher."""
    own = MATCHER_NAMES.get(cfg.data.streams[STREAM].dataset)
    return [
        *([own] if own else []),
        *([] if cfg.method.get("matcher", {}).get("mode") == "frequency" else [""]),
    ]


def ignored_value(cfg: Config) -> Sequence[Any]:
    source = cfg.data.streams[STREAM]
    if source.dataset == "folder":
        return list((source.folder or {}).get("ignore", (255,)))
    return list(DATASETS[source.dataset].ignore) if source.dataset in DATASETS else []


def backbone_name(cfg: Config) -> Sequence[Any]:
    if cfg.model.backbone in SWINS:
        return ["D2SwinTransformer"]
    words = {
        "mask2former": "build_resnet_backbone",
        "deeplabv3plus_d2": "build_resnet_deeplab_backbone",
    }
    return of_model(**words)(cfg)


def resnet_depth(cfg: Config) -> Sequence[Any]:
    found = re.fullmatch(r"resnet(\d+)", cfg.model.backbone)
    return [int(found[1])] if found else []


def resnet_norm(cfg: Config) -> Sequence[Any]:
    if not resnet_depth(cfg):
        return []
    frozen = cfg.model.name == "mask2former" and cfg.model.options.get("frozen_norm", True)
    return ["FrozenBN" if frozen else {"bn": "BN", "sync_bn": "SyncBN"}[cfg.model.norm]]


def swin(part: int) -> Said:
    return lambda cfg: [SWINS[cfg.model.backbone][part]] if cfg.model.backbone in SWINS else []


def pixel_loss(cfg: Config) -> Sequence[Any]:
    if cfg.model.name != "deeplabv3plus_d2":
        return []

    focus = cfg.remedies.get("focus") or {}
    words = {"hard_pixels": "hard_pixel_mining", None: "cross_entropy"}
    others = [slot for slot in ("logits", "class_weight", "sets") if cfg.remedies.get(slot)]
    word = words.get(focus.get("name"))

    return [word] if word and not others else []


def schedule(cfg: Config) -> Sequence[Any]:
    words = {"poly": "WarmupPolyLR", "step": "WarmupMultiStepLR"}
    return [words[cfg.optim.schedule]] if cfg.optim.schedule in words else []


def backbone_rate(cfg: Config) -> Sequence[Any]:
    rule = _rule(cfg, BACKBONE_WEIGHT)
    return [1.0 if rule is None else rule.lr_mult]


def norm_decay(cfg: Config) -> Sequence[Any]:
    return [_decay(cfg, NORM_WEIGHT[cfg.model.name])] if cfg.model.name in NORM_WEIGHT else []


def embedding_decay(cfg: Config) -> Sequence[Any]:
    return [_decay(cfg, EMBEDDING)] if cfg.model.name == "mask2former" else []


def _decay(cfg: Config, name: str) -> float:
    rule = _rule(cfg, name)
    return (
        cfg.optim.weight_decay
        if rule is None or rule.weight_decay is None
        else rule.weight_decay
    )


def _rule(cfg: Config, name: str) -> GroupConfig | None:
    """The rule of `optim.groups` for a parameter."""
    return next((rule for rule in cfg.optim.groups if re.search(rule.match, name)), None)


def tta_edges(cfg: Config) -> Sequence[Any]:
    """The shorter sides that TEST.AUG.ENABLED uses."""
    scales = cfg.eval.scales if tuple(cfg.eval.scales) != (1.0,) else TTA_SCALES
    return (
        [[round(cfg.eval.short_edge * scale) for scale in scales]]
        if cfg.eval.short_edge
        else []
    )


SWIN_REMEDY = "set model.backbone to swin_tiny, swin_small, swin_base or swin_large"
AGREEING: dict[str, tuple[Said, str]] = {
    "CUDNN_BENCHMARK": (lambda cfg: [not cfg.train.deterministic], "set train.deterministic"),
    "DATASETS.TEST": (test_set, "set data.val.dataset"),
    "DATASETS.TRAIN": (train_set, "set data.dataset"),
    "INPUT.DATASET_MAPPER_NAME": (
        of_model(mask2former="mask_former_semantic", deeplabv3plus_d2="mask_former_semantic"),
        "set data.streams.labeled.augment.recipe",
    ),
    "INPUT.SIZE_DIVISIBILITY": (crop_side, "crops are padded to INPUT.CROP.SIZE"),
    "MATCHER.DATASET": (matcher_set, "set method.matcher.counts to dataset or published"),
    "MODEL.BACKBONE.NAME": (backbone_name, "set model.backbone"),
    "MODEL.MASK_FORMER.TRANSFORMER_DECODER_NAME": (
        of_model(mask2former="MultiScaleMaskedTransformerDecoder"), "set model.name",
    ),
    "MODEL.META_ARCHITECTURE": (
        of_model(mask2former="MaskFormer", deeplabv3plus_d2="SemanticSegmentor"), "set model.name",
    ),
    "MODEL.RESNETS.DEPTH": (resnet_depth, "set model.backbone to resnet18, resnet50 or resnet101"),
    "MODEL.RESNETS.NORM": (resnet_norm, "set model.options.frozen_norm and model.norm"),
    "MODEL.SEM_SEG_HEAD.IGNORE_VALUE": (
        ignored_value, "the data set knows it; that of a folder is data.folder.ignore",
    ),
    "MODEL.SEM_SEG_HEAD.LOSS_TYPE": (pixel_loss, "set remedies.focus of a DeepLabV3+"),
    "MODEL.SEM_SEG_HEAD.NAME": (
        of_model(mask2former="MaskFormerHead", deeplabv3plus_d2="DeepLabV3PlusHead"), "set model.name",
    ),
    "MODEL.SEM_SEG_HEAD.PIXEL_DECODER_NAME": (of_model(mask2former="MSDeformAttnPixelDecoder"), "set model.name"),
    "MODEL.SWIN.DEPTHS": (swin(1), SWIN_REMEDY),
    "MODEL.SWIN.EMBED_DIM": (swin(0), SWIN_REMEDY),
    "MODEL.SWIN.NUM_HEADS": (swin(2), SWIN_REMEDY),
    "MODEL.SWIN.PRETRAIN_IMG_SIZE": (swin(4), SWIN_REMEDY),
    "MODEL.SWIN.WINDOW_SIZE": (swin(3), SWIN_REMEDY),
    "SOLVER.BACKBONE_MULTIPLIER": (backbone_rate, "set optim.groups"),
    "SOLVER.BASE_LR_END": (lambda cfg: [cfg.optim.floor], "set optim.floor"),
    "SOLVER.CLIP_GRADIENTS.ENABLED": (
        lambda cfg: [cfg.optim.clip is not None], "set optim.clip to a norm, or to null",
    ),
    "SOLVER.LR_SCHEDULER_NAME": (schedule, "set optim.schedule"),
    "SOLVER.WEIGHT_DECAY_EMBED": (embedding_decay, "set optim.groups"),
    "SOLVER.WEIGHT_DECAY_NORM": (norm_decay, "set optim.groups"),
    "TEST.AUG.MIN_SIZES": (tta_edges, "set eval.scales, multiples of eval.short_edge"),
}  # fmt: skip


def disagreement(key: str, value: str, cfg: Config) -> str | None:
    """Why a key of AGREEING is not taken; None where `value` says what `cfg` does."""
    said, remedy = AGREEING[key]
    does = said(cfg)
    if any(_equal(_read(value), word) for word in does):
        return None

    known = f" (this config: {does[0] if does[0] != '' else 'none'})" if does else ""

    return f"{key}: {value!r} is not used here{known}: {remedy}"


def _read(value: str) -> Any:
    """A value as YAML has it; what YAML cannot read is a word."""
    try:
        return parse(listed(value)) if value else ""
    except ValueError:
        return value


def _equal(value: Any, word: Any) -> bool:
    if isinstance(word, bool) or isinstance(value, bool):
        return value is word
    if isinstance(word, str):
        return isinstance(value, str) and value.lower() == word.lower()
    return value == word
