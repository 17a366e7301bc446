"""Mask2Former on a long tail, with the remedies that act in the loss: Frequency-based Matcher and Seesaw loss.

A step: the classes of every label map become targets, the network predicts a set of masks after each of its layers,
each prediction is matched to the targets, and matched pairs and left-over queries are trained (`criterion.py`). The
Frequency-based Matcher (`matcher.py`) gives a rare class several queries; Seesaw (`common/losses/seesaw.py`) shields
its logit. Repeat-factor sampling is the stream's `sampler`, Copy-Paste a part of its augmentation.
"""

import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from common.config import Config, ConfigError, GroupConfig
from common.config.bounds import NotNegative, Positive
from common.data import DATASETS
from common.data.statistics import Statistics
from common.engine.method import Batch, Losses, Method, MethodContext
from common.engine.optim import parameter_groups
from common.losses.build import LossContext, Slot, Taken, build_loss
from common.losses.pixel_loss import PixelLoss
from common.losses.seesaw import SeesawLoss
from common.models import build_network
from common.models.mask2former import Mask2Former
from common.models.pretrained.containers import read_weights
from ltss_benchmark.criterion import CriterionConfig, SetCriterion
from ltss_benchmark.matcher import find_targets, queries_per_class

logger = logging.getLogger(__name__)
STREAM = "labeled"
# of the network, by the loss that it is trained with
CLASS_HEADS = {"ce": "softmax", "seesaw": "seesaw"}


@dataclass(frozen=True)
class MatcherConfig:
    """Who may be matched to how many queries: one each, or ⌈max(1, scale · √(threshold / f))⌉ at image frequency f."""

    mode: Literal["one_to_one", "frequency"] = "one_to_one"
    threshold: NotNegative = 0.0  # T
    scale: Positive = 2.0  # S
    # f of the training labels at hand, or of the authors' table
    counts: Literal["dataset", "published"] = "dataset"


@dataclass(frozen=True)
class Mask2FormerConfig:
    """The `method:` section."""

    matcher: MatcherConfig = field(default_factory=MatcherConfig)
    criterion: CriterionConfig = field(default_factory=CriterionConfig)


class Mask2FormerMethod(Method):
    """Batches: `labeled` (image, label). What Seesaw has counted is part of the state."""

    Options = Mask2FormerConfig
    options: Mask2FormerConfig
    uncompiled = "takes minutes to compile on a CPU, untried on a GPU"

    def __init__(self, cfg: Config, context: MethodContext):
        super().__init__(cfg, context)
        self.model = build_network(cfg.model, Mask2Former, "mask2former", cfg.name)
        where = f"{cfg.name}: method"
        options = self.options
        head = cfg.model.options.get("class_head", "softmax")
        wanted = CLASS_HEADS[options.criterion.class_loss]
        if head != wanted:
            raise ConfigError(
                f"{where}.criterion.class_loss: {options.criterion.class_loss} needs model.options.class_head: "
                f"{wanted}, not {head}"
            )

        copies = query_numbers(options.matcher, cfg, context.statistics, f"{where}.matcher")
        remedies = query_loss(cfg, context, self.takes(cfg))
        self.criterion = SetCriterion(
            cfg.model.num_classes, options.criterion, copies, remedies
        )
        if (
            self.criterion.seesaw is not None
            and cfg.model.checkpoint
            and not cfg.model.reset_classifier  # then its queries were of other classes
            and not self.criterion.seesaw.counts.is_meta
        ):
            restore_counts(self.criterion.seesaw, cfg.model.checkpoint)

    @classmethod
    def takes(cls, cfg: Config) -> Taken:
        """Slots of single logits, as a query stands for a class of an image; none beside Seesaw, which adjusts them."""
        of_pixels = "it classifies queries, each of which stands for a region, and no pixels"
        refused: dict[Slot, str] = {"focus": of_pixels, "sets": of_pixels}
        class_loss = cls.options_of(cfg).criterion.class_loss
        if class_loss != "ce":
            adjusts = f"method.criterion.class_loss {class_loss} adjusts for the counts by itself; set it to ce"
            refused |= {"logits": adjusts, "class_weight": adjusts}

        return Taken(refused, by_images=True)

    def forward(self, streams: Mapping[str, Batch], step: int) -> Losses:
        batch = streams[STREAM]
        # first: later it would wait for the network
        targets = find_targets(batch["label"], self.criterion.num_classes)
        out = self.model(batch["image"], batch.get("extent"))
        return self.criterion(out, targets, progress=step / self.steps)

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Those of the config; a rule that finds only constants (the affine of frozen norms) is left out."""
        trained = [
            name for name, parameter in self.named_parameters() if parameter.requires_grad
        ]
        constant = [name for name, _ in self.named_buffers()]

        def has_work(rule: GroupConfig) -> bool:
            return any(re.search(rule.match, n) for n in trained) or not any(
                re.search(rule.match, n) for n in constant
            )

        return parameter_groups(
            self, replace(self.optim, groups=tuple(filter(has_work, self.optim.groups)))
        )


def query_loss(cfg: Config, context: MethodContext, taken: Taken) -> PixelLoss | None:
    """What the section `remedies` makes of the queries' classification; None where it asks for nothing.

    Raises ConfigError for the slots that are not taken.
    """
    counts, sampled = taken.counted(context.counts), taken.counted(context.sampled)
    facts = LossContext(counts, refused=taken.refused, sampled=sampled)
    remedies = build_loss(cfg.remedies, facts, f"{cfg.name}: remedies")

    return (
        remedies if remedies.logits is not None or remedies.class_weight is not None else None
    )


# the release's, ours: further places
COUNTERS = {"criterion.seesaw_loss.cum_samples": 1, "criterion.seesaw.counts": 0}


def restore_counts(seesaw: SeesawLoss, checkpoint: str | Path) -> None:
    """Take over the queries that Seesaw had counted when `checkpoint` was written; it may hold none.

    The release's counter has a last place for "no object", which its loss does not use. Counts of another number of
    classes are left.
    """
    state = read_weights(checkpoint)
    name = next((name for name in COUNTERS if name in state), None)
    if name is None:
        return

    counts = state[name].flatten()
    classes = len(seesaw.counts)
    if len(counts) != classes + COUNTERS[name]:
        logger.info("%s: Seesaw's counts are of other classes and start anew", checkpoint)
        return

    seesaw.counts.copy_(counts[:classes])
    logger.info(
        "%s: Seesaw continues from the %d queries counted", checkpoint, int(seesaw.counts.sum())
    )


def query_numbers(
    options: MatcherConfig, cfg: Config, statistics: Statistics, where: str
) -> np.ndarray | None:
    """Queries (K,) of each class; None for one-to-one matching. Raises ConfigError."""
    if options.mode == "one_to_one":
        return None
    if options.threshold <= 0:
        raise ConfigError(
            f"{where}.threshold: {options.threshold} is not positive; set T, a share of the images"
        )
    if options.counts == "dataset":
        return queries_per_class(
            statistics.frequency("image"), options.threshold, options.scale
        )

    row = DATASETS.get(cfg.data.streams[STREAM].dataset)
    if row is None or row.published is None:
        known = ", ".join(name for name, row in DATASETS.items() if row.published is not None)
        raise ConfigError(f"{where}.counts: published: known for {known}; set it to dataset")

    return queries_per_class(row.published.frequency, options.threshold, options.scale)
