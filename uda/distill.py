"""CPSL, stages 2 and 3: a student learns from source labels, hard pseudo-labels and the previous stage's network.

    source   CE of the labelled source crop
    target   CE of the strong target view against the pseudo-labels whose confidence exceeds a threshold
    KD       KL( teacher ‖ student ) on the same strong view, the teacher frozen and in evaluation mode

Stage 2 starts from self-supervised weights (SimCLRv2) with an extra normalisation, stage 3 from stage 2's student.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from common.config import Config, ConfigError, typed
from common.data import IGNORE
from common.engine.method import Batch, Losses, Method
from common.losses.self_training import distillation
from common.models import build_model, load_weights
from common.ops.warp import warp_labels
from uda.base import CONFIDENCE_STEPS, STRIDE, SegmentationLoss, groups_of, to_grid


@dataclass(frozen=True)
class DistillConfig:
    """The `method:` section of stages 2 and 3."""

    teacher: str  # checkpoint of the previous stage
    teacher_extra_norm: bool = False  # stage 3's teacher has the extra normalisation
    threshold: float = 0.95  # confidence that a pseudo-label has to exceed
    distillation: float = 1.0
    kd_loss: Literal["kl", "inner_product"] = "kl"  # release: inner_product, a KL whose logarithm is missing
    head_lr_mult: float = 10.0
    backbone_lr_mult: float = 3.0  # release: its optimiser lists each backbone tensor three times
    blv: Mapping[str, Any] | None = None


class Distill(Method):
    """Batches: `source` (image, label), `target` (strong, pseudo, confidence, warp, cutout)."""

    backwards = 2

    def __init__(self, cfg: Config, options: Mapping[str, Any], counts: Any = None):
        super().__init__(cfg.optim)
        self.options = o = typed(DistillConfig, options, f"{cfg.name}: method")
        if not 0 <= o.threshold < 1:
            raise ConfigError(f"{cfg.name}: method: threshold: {o.threshold} is not in [0, 1)")
        self.steps = cfg.train.steps
        self.model = build_model(cfg.model)
        self.segmentation_loss = SegmentationLoss(o.blv, counts, f"{cfg.name}: method: blv")
        norm = {"extra_norm": o.teacher_extra_norm}
        plain = replace(cfg.model, pretrained=False, checkpoint=None, options={**cfg.model.options, **norm})
        self.teacher = build_model(plain).requires_grad_(False)
        load_weights(self.teacher, o.teacher)

    def parameter_groups(self) -> list[dict[str, Any]]:
        return groups_of(self.model, self.optim, self.options.backbone_lr_mult, self.options.head_lr_mult)

    def forward(self, streams: Mapping[str, Batch], step: int) -> Iterator[Losses]:
        """Two parts, back-propagated one by one: source, then the strong target view."""
        source, target, progress = streams["source"], streams["target"], step / self.steps
        logits = self.model(source["image"])["logits"]
        full = F.interpolate(logits, source["label"].shape[-2:], mode="bilinear", align_corners=True)
        loss = self.segmentation_loss(full, source["label"], progress)
        yield {"loss": loss, "source_ce": loss}
        del logits, full
        yield self.target_terms(target, progress)

    def target_terms(self, target: Batch, progress: float) -> Losses:
        label = self.labels_on_grid(target)
        self.segmentation_loss.count(label)
        student = to_grid(self.model(target["strong"])["logits"], label.shape[-2:])
        ce = self.segmentation_loss(student, label, progress)
        terms = {"target_ce": ce, "labelled": (label != IGNORE).float().mean()}
        if self.options.distillation == 0:
            return {"loss": ce, **terms}
        with torch.no_grad():
            teacher = to_grid(self.teacher.eval()(target["strong"])["logits"], label.shape[-2:])
        kd = distillation(student, teacher, self.options.kd_loss)
        return {"loss": ce + self.options.distillation * kd, **terms, "kd": kd}

    @torch.no_grad()
    def labels_on_grid(self, target: Batch) -> Tensor:
        """Pseudo-labels (B, h, w) of the strong view on the quarter grid, −1 where they are not sure enough.

        8-bit confidence counts 254ths, rounded down, so the threshold never lets more through than it says; that of
        the release's files is a float.
        """
        label, confidence = (target[key][:, ::STRIDE, ::STRIDE] for key in ("pseudo", "confidence"))
        scale = 1 if confidence.is_floating_point() else CONFIDENCE_STEPS
        label = torch.where(confidence.float() > self.options.threshold * scale, label, IGNORE)
        crop = tuple(target["strong"].shape[-2:])
        return warp_labels(label, target["warp"], crop, target["cutout"])

    @torch.no_grad()
    def after_step(self, step: int) -> None:
        self.segmentation_loss.after_step(step)
