"""ProDA (CVPR 2021), the parent of CPSL, as a baseline: prototypes are class means that move, nothing is learned there.

Rectification weights are softmax_k(−(d_k − min d)) with d the Euclidean distance of raw teacher features to raw
prototypes; consistency is on softmax(−d). No bank, no CutMix, no self-labelling loss; logits get a pull towards the
uniform distribution. A class without a prototype takes no part, as in CPSL.
"""

from collections.abc import Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass

import torch
from torch import Tensor

from common.config import Config
from common.config.bounds import NotNegative, Share
from common.data import IGNORE
from common.engine.method import Batch, Losses, MethodContext, move_average
from common.losses.distillation import consistency
from common.ops.resampled_products import resampled_products
from common.ops.resize import size_of
from common.ops.resize_chain import reached, resample_labels
from common.ops.ring import gather_rows
from common.ops.warp import warp_maps
from uda.base import (
    STRIDE,
    Resampling,
    Stage,
    known_prototypes,
    onto_crop,
    onto_grid,
    rectified,
    to_grid,
)
from uda.pseudo_labels import class_sums, enough


@dataclass(frozen=True)
class ProDAConfig:
    """The `method:` section of ProDA's stage 1."""

    prototypes: str
    momentum: Share = 0.999  # of the teacher
    prototype_momentum: Share = 1e-4
    rce: tuple[NotNegative, NotNegative] = (0.1, 1.0)
    consistency: NotNegative = 10.0
    # of −mean log p, the KL to the uniform distribution (GTA5 only)
    regulariser: NotNegative = 0.1
    head_lr_mult: NotNegative = 1.0
    backbone_lr_mult: NotNegative = 1.0


class ProDA(Stage):
    """Batches as in `cpsl.CPSL`."""

    Options = ProDAConfig
    options: ProDAConfig
    backwards = 3
    known: Tensor
    prototypes: Tensor

    def __init__(self, cfg: Config, context: MethodContext):
        super().__init__(cfg, context)
        self.teacher = deepcopy(self.model).requires_grad_(False)
        start = known_prototypes(self.options.prototypes, cfg.model.num_classes)
        self.register_buffer("known", start.known, persistent=False)
        self.register_buffer("prototypes", start.rows)
        # class sums of each image of this step, used after the update
        self._seen: list[tuple[Tensor, Tensor]] = []

    def forward(self, streams: Mapping[str, Batch], step: int) -> Iterator[Losses]:
        target = streams["target"]
        progress = step / self.steps
        yield self.source_terms(streams["source"], progress)
        closeness, label = self.label_target(target)
        self.loss.count(label)
        out = self.model(target["weak"])
        logits = to_grid(out["logits"], size_of(label))
        sce = self.symmetric_loss(logits, label, self.options.rce, progress, out)
        pull = uniform_pull(logits, label != IGNORE)
        yield {
            "loss": sce + self.options.regulariser * pull,
            "target_sce": sce,
            "regulariser": pull,
        }
        del logits, out
        yield self.strong_terms(target, closeness)

    @torch.no_grad()
    def label_target(self, target: Batch) -> tuple[Tensor, Tensor]:
        """−d of the teacher's features on the crop's grid (B, K, h, w), 0 in padding, and the rectified labels (B, h,
        w), ignored there."""
        out = self.teacher.eval()(target["full"])
        self._seen += [
            class_sums(*pair) for pair in zip(out["logits"], out["features"], strict=True)
        ]
        crop = size_of(target["weak"])
        grid = onto_crop(out["features"], target)
        closeness = self.closeness(out["features"], grid)
        warm = resample_labels(target["soft"], target["geometry"], crop, stride=STRIDE)
        label = rectified(warm, closeness, self.known).argmax(1)

        # in padding no class has any probability, and there is no feature to be close
        label = label.masked_fill(warm.amax(1) <= 0, IGNORE)
        return closeness * reached(grid.rows, grid.columns)[:, None], label

    def closeness(self, features: Tensor, grid: Resampling) -> Tensor:
        """−‖z − η_k‖ of features (B, D, h, w) brought to a grid (H, W), k of the K classes with a prototype:
        (B, K, H, W)."""
        dots, squares = resampled_products(features, self.prototypes, *grid)
        own = self.prototypes.square().sum(1)[:, None, None]
        return -(squares[:, None] - 2 * dots + own).clamp(min=1e-12).sqrt()

    def strong_terms(self, target: Batch, closeness: Tensor) -> Losses:
        out = self.model(target["strong"])
        crop = size_of(target["weak"])
        teacher, mask = warp_maps(closeness, target["warp"], crop, target["cutout"])
        mask = mask & (teacher != 0).any(1)  # padding
        student = self.closeness(
            out["features"], onto_grid(out["features"], size_of(closeness))
        )
        term = consistency(student, teacher, mask, temperature=1.0)
        # the last part has to reach every parameter
        untouched = 0.0 * out["logits"].sum() + self.loss.untouched()

        return {"loss": self.options.consistency * term + untouched, "consistency": term}

    @torch.no_grad()
    def after_step(self, step: int) -> None:
        move_average(self.teacher, self.model, self.options.momentum)
        sums, counts = (
            gather_rows(torch.stack(values)) for values in zip(*self._seen, strict=True)
        )

        for total, count in zip(sums, counts, strict=True):
            means = total / count.clamp(min=1)[:, None]
            share = (enough(count) * self.options.prototype_momentum)[:, None]
            self.prototypes += share[self.known] * (means[self.known] - self.prototypes)

        self._seen = []
        super().after_step(step)


def uniform_pull(logits: Tensor, shown: Tensor) -> Tensor:
    """−mean log p over classes and the pixels `shown` (B, h, w), of logits (B, K, h, w): up to a constant the
    divergence of the uniform distribution from p."""
    of_pixels = logits.float().log_softmax(1).mean(1)
    return -(of_pixels * shown).sum() / shown.sum().clamp(min=1)
