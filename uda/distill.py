"""CPSL, stages 2 and 3: a student learns from source labels, hard pseudo-labels and the previous stage's network.

    source   CE of the labelled source crop
    target   CE of the strong target view against the pseudo-labels whose confidence exceeds a threshold
    KD       KL( teacher ‖ student ) on the same strong view, the teacher frozen and in evaluation mode

Stage 2 starts from self-supervised weights (SimCLRv2) with an extra normalisation, stage 3 from stage 2's student.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from common.config import Config
from common.config.bounds import NotNegative, Rate
from common.data import IGNORE
from common.engine.method import Batch, Losses, MethodContext
from common.losses.distillation import distillation
from common.ops.resize import size_of
from common.ops.warp import warp_labels
from uda.base import CONFIDENCE_STEPS, STRIDE, Stage, network_of, to_grid


@dataclass(frozen=True)
class DistillConfig:
    """The `method:` section of stages 2 and 3."""

    teacher: str  # checkpoint of the previous stage, ours or the release's
    threshold: Rate = 0.95  # confidence that a pseudo-label has to exceed
    distillation: NotNegative = 1.0
    # release: inner_product, a KL whose logarithm is missing
    kd_loss: Literal["kl", "inner_product"] = "kl"
    head_lr_mult: NotNegative = 10.0
    # release: its optimiser lists each backbone tensor three times
    backbone_lr_mult: NotNegative = 3.0


class Distill(Stage):
    """Batches: `source` (image, label), `target` (strong, pseudo, confidence, warp, cutout)."""

    Options = DistillConfig
    options: DistillConfig
    backwards = 2
    labels_from = "the files of an earlier stage"

    def __init__(self, cfg: Config, context: MethodContext):
        super().__init__(cfg, context)
        self.teacher = network_of(cfg.model, self.options.teacher).requires_grad_(False)

    def forward(self, streams: Mapping[str, Batch], step: int) -> Iterator[Losses]:
        """Two parts, back-propagated one by one: source, then the strong target view."""
        progress = step / self.steps
        yield self.source_terms(streams["source"], progress)
        yield self.target_terms(streams["target"], progress)

    def target_terms(self, target: Batch, progress: float) -> Losses:
        label = self.labels_on_grid(target)
        self.loss.count(label)
        out = self.model(target["strong"])
        student = to_grid(out["logits"], size_of(label))
        facts = {"features": out["features"], "small": out["logits"]}
        ce = self.loss(student, label, progress=progress, **facts)
        terms = {"target_ce": ce, "labelled": (label != IGNORE).float().mean()}
        if self.options.distillation == 0:
            return {"loss": ce, **terms}

        with torch.no_grad():
            teacher = to_grid(self.teacher.eval()(target["strong"])["logits"], size_of(label))

        kd = distillation(student, teacher, self.options.kd_loss)

        return {"loss": ce + self.options.distillation * kd, **terms, "kd": kd}

    @torch.no_grad()
    def labels_on_grid(self, target: Batch) -> Tensor:
        """Pseudo-labels (B, h, w) of the strong view on the quarter grid, −1 where they are not sure enough.

        8-bit confidence counts 254ths, rounded down, so the threshold never lets more through than it says; that of
        the release's files is a float.
        """
        label, confidence = (
            target[key][:, ::STRIDE, ::STRIDE] for key in ("pseudo", "confidence")
        )
        scale = 1 if confidence.is_floating_point() else CONFIDENCE_STEPS
        label = torch.where(confidence.float() > self.options.threshold * scale, label, IGNORE)
        crop = size_of(target["strong"])

        return warp_labels(label, target["warp"], crop, target["cutout"])
