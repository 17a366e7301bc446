"""CPSL: Class-Balanced Pixel-Level Self-Labeling for Domain Adaptive Semantic Segmentation (CVPR 2022), stage 1.

A warmed-up network has left soft pseudo-labels P_ST of every target image, one prototype per class, and the class
distribution δ of its predictions. A step of self-labelling, with θ the student, θ' and c' moving averages of the
student and of the learned prototypes c, n(·) = L2 normalisation:

    source    CE of the labelled source crop
    labels    P_SL(k) = softmax_k( n(z')·n(c'_k) / τ ),   ŷ = argmax_k P_SL(k) · P_ST(k)       (rectification)
    target    α·CE + β·RCE of the weak target crop, into which CutMix pastes source pixels, against ŷ
    L_SL      the prototypes learn to predict a Sinkhorn assignment of teacher features whose class shares are δ
    L_REG     KL between the teacher's similarities, warped to the strong view, and the student's there

L_SL trains the prototypes alone: z' comes from the teacher. The network learns from the other terms. Everything on the
target lives on the crop's quarter grid. Where the release differs from the paper, an option holds its behaviour.

Classes that the warmed-up network hardly predicts have no prototype: of C classes K have one. The others take no part
in L_SL and L_REG, and rectification leaves them the probability of P_ST.
"""

from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from copy import deepcopy
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.config import Config, ConfigError
from common.config.bounds import AtLeast, AtMost, NotNegative, Positive, Rate, Share
from common.data import IGNORE
from common.engine.method import Batch, Losses, MethodContext, move_average
from common.losses.contrast import assignment_cross_entropy, pixel_contrast
from common.losses.distillation import consistency
from common.ops.resampled_products import resampled_products
from common.ops.resize import Size, size_of
from common.ops.resize_chain import reached, resample_labels, resample_points
from common.ops.ring import RingBank, gather_rows, write
from common.ops.sinkhorn import sinkhorn
from common.ops.warp import warp_maps
from uda.base import (
    STRIDE,
    Resampling,
    Stage,
    known_prototypes,
    onto_crop,
    onto_grid,
    read_distribution,
    rectified,
    running_statistics_kept,
    to_grid,
)
from uda.mixing import Box, draw_box, paste, paste_labels
from uda.sampling import class_balanced, stretched, uniform

Rows = Annotated[int, AtLeast(1), AtMost(1 << 24)]  # of the bank


@dataclass(frozen=True)
class CPSLConfig:
    """The `method:` section of stage 1. Defaults are the paper's; comments name what the release does."""

    prototypes: str  # file of calc_prototype.py
    class_distribution: str  # file of generate_class_distribution.py
    momentum: Share = 0.999  # of θ' and c'
    temperature: Positive = 0.08  # τ
    rectify: bool = True  # False: ŷ = argmax P_ST, plain self-training
    threshold: Rate = 0.0  # probability below which a pixel is ignored
    # whose: the label's after rectification, as in the release, or that of P_ST's best class; the first is sharper
    threshold_on: Literal["rectified", "pseudo"] = "rectified"
    rce: tuple[NotNegative, NotNegative] = (0.1, 1.0)  # α, β of the symmetric cross-entropy
    consistency: NotNegative = 5.0
    self_label: NotNegative = 0.1
    contrastive: NotNegative = 0.0  # release: 0.001, with `bank_labels: first`
    # release: first. Bank pixels come from the whole image, their labels are the first of the map, whatever was sampled
    bank_labels: Literal["matched", "first"] = "matched"
    bank: Rows = 65536
    samples: Rows = 256  # pixels per image and step that enter the bank
    sampling: Literal["class_balanced", "uniform"] = "class_balanced"  # release: uniform
    marginal: Literal["pseudo_labels", "uniform"] = "pseudo_labels"  # uniform: as in SwAV
    epsilon: Positive = 0.05  # of Sinkhorn
    sinkhorn_iterations: Annotated[int, AtLeast(0), AtMost(1000)] = 3
    normalise_bank: bool = True  # release: False, scores of the bank use raw prototypes
    cutmix: Share = 0.5  # probability
    # release before September 2022: target
    cutmix_labels: Literal["source", "target"] = "source"
    # release: train, with dropout and batch statistics
    teacher_mode: Literal["eval", "train"] = "eval"
    # False: the strong view does not move batch norm's running statistics
    strong_statistics: bool = True
    head_lr_mult: NotNegative = 5.0  # of the head and the prototypes
    # release: its optimiser lists each backbone tensor three times
    backbone_lr_mult: NotNegative = 3.0

    def __post_init__(self):
        if self.bank_labels == "first" and self.sampling != "uniform":
            raise ValueError(
                f"bank_labels: first is for sampling: uniform, not {self.sampling}; set both"
            )


# unit features (B, n, D), unit logits (B, n, K), labels (B, n)
Sampled = tuple[Tensor, Tensor, Tensor]


class CPSL(Stage):
    """Stage 1. Batches: `source` (image, label), `target` (weak, strong, full, soft, geometry, warp, cutout)."""

    Options = CPSLConfig
    options: CPSLConfig
    backwards = 3
    labels_from = "files of soft labels, rectified by prototypes"
    known: Tensor
    prototypes_ema: Tensor
    distribution: Tensor

    def __init__(self, cfg: Config, context: MethodContext):
        super().__init__(cfg, context)
        o = self.options
        classes = cfg.model.num_classes
        self.teacher = deepcopy(self.model).requires_grad_(False)
        start = known_prototypes(o.prototypes, classes)
        self.register_buffer("known", start.known, persistent=False)
        self.prototypes = nn.Parameter(F.normalize(start.rows, dim=1))
        self.register_buffer("prototypes_ema", F.normalize(start.rows, dim=1))
        self.register_buffer("distribution", read_distribution(o.class_distribution, classes))
        if not self.distribution[start.known].sum() > 0:
            raise ConfigError(
                f"{o.class_distribution}: no share for the classes of {o.prototypes}; make both again"
            )

        self.features = RingBank(o.bank, start.rows.shape[1])
        self.scores = RingBank(o.bank, len(start.known))
        self.bank_labels = RingBank(o.bank, dtype=torch.int64)

    def parameter_groups(self) -> list[dict[str, Any]]:
        groups = super().parameter_groups()
        rate = {"lr": self.optim.lr * self.options.head_lr_mult, "name": "prototypes"}
        return [*groups, {**groups[0], **rate, "params": [self.prototypes]}]

    # One step ---------------------------------------------------------------------------------------------------

    def forward(self, streams: Mapping[str, Batch], step: int) -> Iterator[Losses]:
        """Three parts, back-propagated one by one: source, weak target view, strong target view."""
        source = streams["source"]
        target = streams["target"]
        progress = step / self.steps
        yield self.source_terms(source, progress)
        similarity, label, changed, sampled = self.label_target(target)
        yield self.weak_terms(source, target, label, sampled, progress) | {"changed": changed}
        yield self.strong_terms(target, similarity)

    @torch.no_grad()
    def label_target(self, target: Batch) -> tuple[Tensor, Tensor, Tensor, Sampled]:
        """What the teacher sees in the whole image, on the quarter grid of the crop: similarities with the moving
        prototypes (B, K, h, w); labels (B, h, w) and the share of them that differ from P_ST; pixels for the bank."""
        self.teacher.train(self.options.teacher_mode == "train")
        out = self.teacher(target["full"])
        grid = onto_crop(out["features"], target)
        similarity = self.similarity(out["features"], grid)
        label, changed = self.rectify(similarity, target)

        return similarity, label, changed, self.sample(label, out, grid)

    def similarity(self, features: Tensor, grid: Resampling) -> Tensor:
        """n(z)·n(c'_k) of features (B, D, h, w) brought to a grid (H, W): (B, K, H, W)."""
        dots, squares = resampled_products(
            features, F.normalize(self.prototypes_ema, dim=1), *grid
        )
        return dots / squares.clamp(min=1e-24).sqrt()[:, None]

    @torch.no_grad()
    def rectify(self, similarity: Tensor, target: Batch) -> tuple[Tensor, Tensor]:
        """Labels ŷ (B, h, w), ignored in padding, and the share of the other pixels at which they differ from argmax
        P_ST."""
        crop = size_of(target["weak"])
        warm = resample_labels(target["soft"], target["geometry"], crop, stride=STRIDE)
        probabilities = warm
        if self.options.rectify:
            probabilities = rectified(warm, similarity / self.options.temperature, self.known)

        best, label = probabilities.max(1)
        pseudo, plain = warm.max(1)
        shown = pseudo > 0  # in padding no class has any probability
        changed = ((label != plain) & shown).sum() / shown.sum().clamp(min=1)

        if self.options.threshold > 0:
            if self.options.threshold_on == "pseudo":
                best = pseudo
                probabilities = warm

            unsure = best < self.options.threshold * probabilities.sum(1)
            label = label.masked_fill(unsure, IGNORE)

        return label.masked_fill(~shown, IGNORE), changed

    # Weak view: segmentation loss, and the prototypes' own ----------------------------------------------------------

    def weak_terms(
        self, source: Batch, target: Batch, label: Tensor, sampled: Sampled, progress: float
    ) -> Losses:
        o = self.options
        images = target["weak"]
        mixed = label
        box = draw_box(size_of(images), o.cutmix)
        if box is not None:
            images = paste(images, source["image"], box)
            mixed = self.mixed_labels(label, source["label"], box)

        out = self.model(images)
        self.loss.count(label)
        logits = to_grid(out["logits"], size_of(label))
        ce = self.symmetric_loss(logits, mixed, o.rce, progress, out)
        first, second = self.self_label(*sampled)
        terms = {"target_sce": ce, "self_label_a": first, "self_label_b": second}
        total = ce + o.self_label * (first + second)
        if o.contrastive > 0:
            whole = size_of(target["soft"])
            terms["contrastive"] = self.contrast(
                out["features"], label, whole, mixed=box is not None
            )
            total = total + o.contrastive * terms["contrastive"]

        return {"loss": total, **terms, "bank_fill": ce.new_full((), self.features.fill)}

    def mixed_labels(self, label: Tensor, source_label: Tensor, box: Box) -> Tensor:
        if self.options.cutmix_labels == "target":
            return label
        return paste_labels(label, source_label, box)

    @torch.no_grad()
    def sample(self, label: Tensor, out: Mapping[str, Tensor], grid: Resampling) -> Sampled:
        """Pixels of the image for the bank: unit features (B, n, D), unit logits (B, n, K), labels (B, n)."""
        logits = out["logits"].index_select(1, self.known)
        if self.options.bank_labels == "first":
            return self.sample_whole(label, out["features"], logits)

        flat = label.flatten(1)
        n = min(self.options.samples, label[0].numel())
        if self.options.sampling == "uniform":
            index = uniform(flat, n)
        else:
            index = class_balanced(flat, self.distribution, n)

        index = out_of_padding(index, reached(grid.rows, grid.columns).flatten(1))

        return (
            unit_rows(out["features"], grid, index),
            unit_rows(logits, grid, index),
            flat.gather(1, index),
        )

    def sample_whole(self, label: Tensor, features: Tensor, logits: Tensor) -> Sampled:
        """The release's draw: cells of the whole image's own grid, the same in every image. The labels are not theirs:
        the crop's map is stretched over that grid, and its first n cells are taken."""
        labels = stretched(label, size_of(features)).flatten(1)
        n = min(self.options.samples, labels.shape[1])
        index = uniform(labels[:1], n).expand(len(labels), n)
        return unit_cells(features, index), unit_cells(logits, index), labels[:, :n]

    def self_label(
        self, features: Tensor, logits: Tensor, labels: Tensor
    ) -> tuple[Tensor, Tensor]:
        """L_SL from features (B, n, D), logits (B, n, K): image by image, so each sees the earlier ones in the bank."""
        prototypes = F.normalize(self.prototypes, dim=1)
        basis = (prototypes if self.options.normalise_bank else self.prototypes).detach()
        # kept up to date below, as images enter the bank
        bank = (basis @ self.features.rows.T).T
        losses: tuple[list[Tensor], list[Tensor]] = ([], [])

        for z, o, y in zip(features, logits, labels, strict=True):
            scores = z @ prototypes.T
            assigned = self.assign(bank, scores.detach()), self.assign(self.scores.rows, o)

            for terms, q in zip(losses, assigned, strict=True):
                terms.append(assignment_cross_entropy(scores, q, self.options.temperature))

            everywhere = gather_rows(z)
            write(bank, self.features.slots(len(everywhere)), everywhere @ basis.T)
            self.features.push(everywhere, gather=False)
            self.scores.push(o)
            self.bank_labels.push(y)

        return torch.stack(losses[0]).mean(), torch.stack(losses[1]).mean()

    def assign(self, bank: Tensor, scores: Tensor) -> Tensor:
        """Sinkhorn assignment (n, K) of the newest rows, together with the bank once that is full."""
        o = self.options
        marginal = None if o.marginal == "uniform" else self.class_shares()
        # a class is contiguous
        rows = torch.cat((bank.T, scores.T), 1).T if self.features.full else scores
        return sinkhorn(rows, marginal, o.epsilon, o.sinkhorn_iterations, keep=len(scores))

    def class_shares(self) -> Tensor:
        """δ of the classes that have a prototype (K,), sum 1."""
        if len(self.known) == len(self.distribution):
            return self.distribution
        shares = self.distribution[self.known]
        return shares / shares.sum()

    def contrast(self, features: Tensor, label: Tensor, whole: Size, mixed: bool) -> Tensor:
        """Student pixels against the bank; 0 (with a graph) before the bank is full, and in CutMix steps.

        `whole`: the network's grid of the whole image. With `bank_labels: first` an anchor is a cell of the student's
        own grid, and its label that of the same index in the label map of the whole image's grid, as in the release.
        """
        if mixed or not self.features.full:
            return features.sum() * 0

        if self.options.bank_labels == "first":
            labels = stretched(label, whole).flatten(1)
            cells = labels[:, : features[0, 0].numel()]
            index = uniform(cells, min(self.options.samples, cells.shape[1]))
            anchors = unit_cells(features, index)
        else:
            labels = label.flatten(1)
            index = uniform(labels, min(self.options.samples, labels.shape[1]))
            anchors = unit_rows(features, onto_grid(features, size_of(label)), index)

        bank = self.features.rows, self.bank_labels.rows, self.options.temperature
        pairs = zip(anchors, labels.gather(1, index), strict=True)

        return torch.stack([pixel_contrast(a, y, *bank) for a, y in pairs]).mean()

    # Strong view ----------------------------------------------------------------------------------------------------

    def strong_terms(self, target: Batch, similarity: Tensor) -> Losses:
        """Consistency with the teacher's similarities. Classifier and prototypes get a gradient of 0 here: under DDP
        the last part has to reach every parameter."""
        crop = size_of(target["weak"])
        with (
            nullcontext()
            if self.options.strong_statistics
            else running_statistics_kept(self.model)
        ):
            out = self.model(target["strong"])

        teacher, mask = warp_maps(similarity, target["warp"], crop, target["cutout"])
        # padding has no features, so no class is similar to any
        mask = mask & (teacher != 0).any(1)
        student = self.similarity(
            out["features"], onto_grid(out["features"], size_of(similarity))
        )
        term = consistency(student, teacher, mask, self.options.temperature)
        untouched = 0.0 * (out["logits"].sum() + self.prototypes.sum()) + self.loss.untouched()

        return {"loss": self.options.consistency * term + untouched, "consistency": term}

    @torch.no_grad()
    def after_step(self, step: int) -> None:
        statistics: Literal["averaged", "copied"] = (
            "averaged" if self.options.teacher_mode == "eval" else "copied"
        )
        move_average(self.teacher, self.model, self.options.momentum, statistics)
        self.prototypes_ema.lerp_(self.prototypes, 1 - self.options.momentum)
        super().after_step(step)


def out_of_padding(index: Tensor, shown: Tensor) -> Tensor:
    """Cells `index` (B, n); in place of those in padding, cells that show the image. shown: bool (B, N).

    The cells in padding are spread evenly over the others in their order, so that nothing more is drawn.
    """
    ends = shown.cumsum(1)
    count = ends[:, -1:]
    padding = (shown.shape[1] - count).clamp(min=1)
    rank = index - ends.gather(1, index)  # of a cell in padding among its like
    other = torch.searchsorted(ends, rank * count // padding + 1)

    return torch.where(shown.gather(1, index), index, other.clamp(max=shown.shape[1] - 1))


def unit_rows(maps: Tensor, grid: Resampling, index: Tensor) -> Tensor:
    """Cells `index` (B, n) of a grid to which maps (B, C, h, w) are brought, as rows of unit length (B, n, C)."""
    return F.normalize(resample_points(maps, *grid, index), dim=2)


def unit_cells(maps: Tensor, index: Tensor) -> Tensor:
    """Cells `index` (B, n) of the maps' own grid (B, C, h, w), as rows of unit length (B, n, C)."""
    flat = maps.flatten(2)
    rows = flat.gather(2, index[:, None].expand(-1, flat.shape[1], -1))
    return F.normalize(rows.transpose(1, 2), dim=2)
