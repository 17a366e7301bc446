"""METHODS: what trains the networks of the benchmark."""

import warnings
from collections.abc import Mapping
from typing import Any

import torch

from common import distributed
from common.config import Config, ConfigError, typed
from common.data import build_transform
from common.data.orders import SamplerConfig
from common.data.statistics import placeholder
from common.engine.method import Method, MethodContext, make_method
from ltss_benchmark.criterion import CriterionConfig
from ltss_benchmark.deeplabv3plus import DeepLabV3PlusMethod
from ltss_benchmark.mask2former import STREAM, Mask2FormerMethod

METHODS: dict[str, type[Method]] = {
    "mask2former": Mask2FormerMethod,
    "deeplabv3plus": DeepLabV3PlusMethod,
}


def build_method(cfg: Config, context: MethodContext) -> Method:
    """The method that `method.name` names; warns of options that are set in vain. Raises ConfigError."""
    method = make_method(METHODS, cfg, context)
    if distributed.rank() == 0:
        for text in ignored(cfg):
            warnings.warn(text, stacklevel=2)

    return method


def check_options(cfg: Config) -> None:
    """ConfigError for options of the method, the network or the labelled stream that nothing could be made with.

    Before a file is opened: the method is built without memory, on counts of a single image.
    """
    if STREAM not in cfg.data.streams:
        raise ConfigError(f"{cfg.name}: data.streams has no {STREAM!r}")

    stream = cfg.data.streams[STREAM]
    classes = cfg.model.num_classes
    build_transform(stream.augment, f"data.streams.{STREAM}.augment")
    typed(SamplerConfig, stream.sampler, f"data.streams.{STREAM}.sampler")

    with torch.device("meta"):
        make_method(METHODS, cfg, MethodContext(placeholder(classes)))


REMEDIES = (  # section, option that chooses a remedy, its default, the choice that uses the others
    ("method.matcher", "mode", "one_to_one", "frequency", ("threshold", "scale", "counts")),
    ("method.criterion", "class_loss", "ce", "seesaw", ("seesaw_p", "seesaw_q")),
    (f"data.streams.{STREAM}.augment", "copy_paste", "none", "random", ("copy_paste_max",)),
    (f"data.streams.{STREAM}.augment", "copy_paste", "none", "rare", ("rare_classes",)),
)


def ignored(cfg: Config) -> list[str]:
    """What is set for a remedy that the config does not use, in one line a section."""
    stream = cfg.data.streams[STREAM]
    lines = []

    for section, option, default, used, others in REMEDIES:
        owner: Mapping[str, Any] = cfg.method if section.startswith("method.") else vars(stream)
        values = owner.get(section.rpartition(".")[2], {})
        choice = values.get(option, default)
        given = [name for name in others if name in values]
        if given and choice != used:
            lines.append(
                f"{section}: {', '.join(given)}: ignored where {option} is {choice}, not {used}"
            )

    criterion = cfg.method.get("criterion", {})
    weight = criterion.get("no_object_weight", CriterionConfig.no_object_weight)
    if criterion.get("class_loss") == "seesaw" and weight != CriterionConfig.no_object_weight:
        lines.append(
            f"method.criterion: no_object_weight: {weight} is ignored where class_loss is seesaw"
        )

    return lines
