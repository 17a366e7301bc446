"""USRN: Unbiased Subclass Regularization for Semi-Supervised Semantic Segmentation (CVPR 2022), and its comparisons.

Frequent classes are clustered once, before training, into subclasses of about the size of rare classes. The network
gets a second branch (own stages 2–4, ASPP, decoder, classifier; stem and first stage are shared) that learns these
subclasses. Trained on balanced labels, it leans less to frequent classes, and guards the pseudo-labels of the first:

    L = L_s + L_s_sub + L_u_sub + L_u_reg

    L_s, L_s_sub   cross-entropy of a labelled crop against its classes and its subclasses, at full size
    L_u_sub        the subclass branch on the strong view of an unlabelled crop, against its own confident answer on
                   the weak view
    L_u_reg        the class branch, against its confident answer after the entropy gate (`losses.gated_labels`):
                   where the subclass branch is not the less certain of the two, it has to agree

The unlabelled losses live at stride 8. Everything is trained from the first step with weight 1. Only the class branch
predicts. As in the release the net runs on labelled images, strong view, weak view, in this order, in training mode
all three times: each pass normalises with its own batch and moves the running statistics of batch norm. The weak pass
gives labels and no gradient, so no graph is kept of it; the labelled graph is gone before the strong one is built.

`SelfTraining` is USRN without subclasses; with its moving-average teacher it is the base of BLV's semi-supervised
experiments. The supervised baseline, whose features are clustered, is in [`baseline.py`](baseline.py). Each takes the
config's remedies: they act on the student's class logits in both terms, never on what makes pseudo-labels
(`pseudo_prior` adds the prior of logit adjustment back to that), and class frequencies are those of labels plus the
last epoch's pseudo-labels. (Subclasses are balanced already; their cross-entropy stays as it is.)
"""

from collections.abc import Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from common.config import Config, ConfigError
from common.config.bounds import NotNegative, Rate, Share
from common.engine.method import Batch, Losses, MethodContext, move_average
from common.losses.upsampled import upsampled_cross_entropy
from common.models.deeplabv3plus_usrn import DeepLabV3Plus
from common.ops.resize import size_of
from semi_sup.baseline import Baseline, BaselineConfig, Scores, usrn_network
from semi_sup.consistency import native_area
from semi_sup.losses import (
    area,
    confident_labels,
    pseudo_label_loss,
    right_and_wrong,
    share,
    unlabelled_losses,
)
from semi_sup.subclasses import chosen_counts, parents
from semi_sup.view_cells import at_cells, covers, inside, within


@dataclass(frozen=True)
class SelfTrainingConfig(BaselineConfig):
    """The `method:` section of plain self-training.

    passes: 3 runs the network on labelled images, strong and weak view one after the other, as the release does. 2 puts
    labelled images and strong view in one batch, 1 all three: batch norm then normalises over the mixture and moves its
    running statistics once a batch; both parts' graphs are held together, and with 1 the weak view's too.
    """

    unsupervised: NotNegative = 1.0  # weight of the terms on unlabelled images
    threshold: Rate = 0.75  # τ, which a pseudo-label's probability has to exceed
    # who labels the weak view: the net itself, or its moving average
    teacher: Literal["none", "ema"] = "ema"
    momentum: Share = 0.99  # of the moving average, in the end; 1 − 1/t before
    predicts: Literal["student", "teacher"] = "student"
    mask_borders: bool = True  # release: False, padding of unlabelled crops takes part
    passes: Literal[3, 2, 1] = 3


@dataclass(frozen=True)
class USRNConfig(SelfTrainingConfig):
    """The `method:` section of USRN. Defaults are the paper's; `gate` and `branch` are ablations."""

    teacher: Literal["none", "ema"] = "none"
    subclass: NotNegative = 1.0  # weight of the terms on subclasses
    gate: bool = True  # False: every confident label is kept
    branch: bool = True  # False: no subclass branch, plain self-training


class SelfTraining(Baseline):
    """Labels plus the network's own confident labels. Batches: `labeled` (image, label), `unlabeled` (weak, strong,
    geometry)."""

    Options = SelfTrainingConfig
    options: SelfTrainingConfig
    model: DeepLabV3Plus
    pseudo_labels = "pixels"

    def __init__(self, cfg: Config, context: MethodContext):
        super().__init__(cfg, context)
        o = self.options
        self.teacher = (
            deepcopy(self.model).requires_grad_(False) if o.teacher == "ema" else None
        )
        if (
            self.teacher is None
            and o.predicts == "teacher"
            or self.teacher is not None
            and o.passes == 1
        ):
            wrong = (
                "predicts: teacher needs teacher: ema"
                if o.passes > 1
                else "passes: 1 runs no teacher"
            )
            raise ConfigError(f"{cfg.name}: method: {wrong}")

        self.predict_prefix = "teacher." if o.predicts == "teacher" else "model."
        self.backwards = 2 if o.passes == 3 else 1

    @property
    def branches(self) -> bool:
        """Whether the network has a subclass branch."""
        return False

    def make_model(self, cfg: Config) -> DeepLabV3Plus:
        return usrn_network(cfg, "usrn" if self.branches else "deeplabv3plus")

    def classify(self, images: Tensor) -> Scores:
        return Scores.of(self.model(images, subclasses=self.branches))

    # One step ---------------------------------------------------------------------------------------------------

    def forward(self, streams: Mapping[str, Batch], step: int) -> Iterator[Losses]:
        """The labelled part, then the unlabelled one; back-propagated one by one if their passes are."""
        labeled = streams["labeled"]
        unlabeled = streams["unlabeled"]
        progress = step / self.steps
        if self.options.passes == 3:
            yield self.labelled_terms(self.classify(labeled["image"]), labeled, progress)
            strong = self.classify_cells(self.model, unlabeled["strong"])
            weak = self.label(unlabeled["weak"])
            terms = self.unlabelled_terms(strong, weak, unlabeled, progress)
            yield {**terms, "loss": terms["loss"] + self.loss.untouched()}

            return

        labelled, strong, weak = self.classify_jointly(labeled["image"], unlabeled)
        first = self.labelled_terms(labelled, labeled, progress)
        second = self.unlabelled_terms(strong, weak, unlabeled, progress)
        yield {**first, **second, "loss": first["loss"] + second["loss"]}

    def classify_cells(self, net: nn.Module, images: Tensor) -> Scores:
        """One pass of a network; scores at stride 8, of pooled features."""
        return Scores.of(net(images, subclasses=self.branches, pooled=len(images)), "pooled_")

    @torch.no_grad()
    def label(self, images: Tensor) -> Scores:
        """Scores of the weak view at stride 8, by the teacher if there is one."""
        return self.classify_cells(
            self.model if self.teacher is None else self.teacher.eval(), images
        )

    def classify_jointly(
        self, images: Tensor, unlabeled: Batch
    ) -> tuple[Scores, Scores, Scores]:
        """Scores of labelled images, strong and weak view, of one batch (or of two, the weak view apart)."""
        views = [unlabeled["strong"]]
        if self.options.passes == 1:
            views.append(unlabeled["weak"])

        if any(view.shape[1:] != images.shape[1:] for view in views):
            raise ValueError(
                "method.passes: one batch of labelled and unlabelled crops needs crops of one size"
            )

        sizes = [len(view) for view in views]
        out = self.model(
            torch.cat([images, *views]), subclasses=self.branches, pooled=sum(sizes)
        )
        strong, *rest = Scores.of(out, "pooled_").split(sizes)

        return Scores.of(out), strong, rest[0] if rest else self.label(unlabeled["weak"])

    def unlabelled_terms(
        self, strong: Scores, weak: Scores, batch: Batch, progress: float
    ) -> Losses:
        """The loss of the strong view against confident labels of the weak one."""
        valid = self.valid(batch, strong.classes)
        logits = self.loss.with_prior(weak.classes.detach())
        label = confident_labels(logits, self.options.threshold, valid)
        pixels = area(label, valid)
        loss = pseudo_label_loss(
            strong.classes, label, pixels, partial(self.loss.total, progress=progress)
        )
        self.count(label, batch)
        terms = {"Lu": loss, "kept": share(label, pixels)}
        if "label" in batch:
            terms |= self.checked({"kept": label}, batch, pixels)

        return {"loss": self.options.unsupervised * loss, **terms}

    def checked(
        self, labels: Mapping[str, Tensor], batch: Batch, pixels: Tensor | int
    ) -> Losses:
        """Of pseudo-labels (B, h, w) by name the shares that are right and wrong by the stream's own labels, which are
        looked at for this alone."""
        truth = at_cells(self.model.pad_label(batch["label"]))
        terms = {}
        for name, label in labels.items():
            terms[f"{name}_right"], terms[f"{name}_wrong"] = right_and_wrong(
                label, truth, pixels
            )

        return terms

    def valid(self, batch: Batch, logits: Tensor) -> Tensor | None:
        """Which cells of the logits' grid count, bool (B, h, w): those that show the image; None: all.

        Without `mask_borders` the crop's own padding counts too. The network's padding, to a multiple of 8, never does.
        """
        crop = size_of(batch["weak"])
        grid = size_of(logits)
        if self.options.mask_borders:
            return inside(batch["geometry"], crop, grid)
        if covers(crop, grid):
            return None

        return within(crop, grid, len(logits), logits.device)

    def count(self, label: Tensor, batch: Batch) -> None:
        """Count pseudo-labels of the cells (B, h, w), for remedies."""
        if not self.loss.counts.every:
            return

        shown = self.valid(batch, label[:, None])
        if shown is None:
            shown = torch.ones_like(label, dtype=torch.bool)
        self.loss.count(label, native_area(batch, shown))

    def after_step(self, step: int) -> None:
        super().after_step(step)
        if self.teacher is not None:
            move_average(
                self.teacher, self.model, min(1 - 1 / (step + 1), self.options.momentum)
            )


class USRN(SelfTraining):
    """The paper. Batches: `labeled` (image, label, sub_label), `unlabeled` (weak, strong, geometry)."""

    Options = USRNConfig
    options: USRNConfig
    parents: Tensor

    def __init__(self, cfg: Config, context: MethodContext):
        super().__init__(cfg, context)
        if self.branches:
            numbers = chosen_counts(
                self.options.subclasses,
                cfg.model.num_classes,
                f"{cfg.name}: method: subclasses",
            )
            if sum(numbers) != self.model.subclasses:
                raise ConfigError(
                    f"{cfg.name}: model.options.subclasses: {self.model.subclasses} for {sum(numbers)} subclasses of "
                    "method.subclasses; make them equal"
                )
            self.register_buffer("parents", parents(numbers), persistent=False)

    @property
    def branches(self) -> bool:
        return self.options.branch

    def labelled_terms(self, scores: Scores, batch: Batch, progress: float) -> Losses:
        """L_s + L_s_sub."""
        terms = super().labelled_terms(scores, batch, progress)
        if scores.subclasses is None:
            return terms

        label = self.model.pad_label(batch["sub_label"])
        loss = upsampled_cross_entropy(
            scores.subclasses, label, align_corners=self.model.align_corners
        )
        weight = self.options.supervised * self.options.subclass

        return {**terms, "loss": terms["loss"] + weight * loss, "Ls_sub": loss}

    def unlabelled_terms(
        self, strong: Scores, weak: Scores, batch: Batch, progress: float
    ) -> Losses:
        """L_u_reg + L_u_sub."""
        o = self.options
        if strong.subclasses is None or weak.subclasses is None:
            return super().unlabelled_terms(strong, weak, batch, progress)

        found = unlabelled_losses(
            strong.classes,
            strong.subclasses,
            self.loss.with_prior(weak.classes),
            weak.subclasses,
            self.parents,
            o.threshold,
            gate=o.gate,
            valid=self.valid(batch, strong.classes),
            total=partial(self.loss.total, progress=progress),
        )
        self.count(found.label, batch)
        loss = o.unsupervised * (found.classes + o.subclass * found.subclasses)
        terms = {
            "Lu_sub": found.subclasses,
            "Lu_reg": found.classes,
            "kept": found.kept,
            "vetoed": found.vetoed,
            "surer": found.surer,
        }
        if "label" in batch:
            labels = {"kept": found.label, "vetoed": found.taken}
            terms |= self.checked(labels, batch, found.pixels)

        return {"loss": loss, **terms}
