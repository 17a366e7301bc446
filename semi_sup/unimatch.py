"""UniMatch: Revisiting Weak-to-Strong Consistency in Semi-Supervised Semantic Segmentation (CVPR 2023), and FixMatch.

The network's confident answer on a weak view of an unlabelled crop is the label of

    L_s1, L_s2   two strong views of that crop, each with a box of CutMix,
    L_fp         the weak view itself, half of the channels of its encoder's maps dropped:

    L = (L_x + ½·L_fp + ¼·L_s1 + ¼·L_s2) / 2

with L_x the loss of labelled crops. A pixel's label counts where its probability reaches τ; each unlabelled loss is
divided by the number of pixels that are no padding. As in the release there is no teacher, the weak view runs in
training mode beside the labelled crops, and clean and perturbed maps are decoded as one batch, so that batch norm sees
both. What is pasted comes from a second crop of the same image, whose labels the network makes in evaluation mode.

FixMatch is `views: 1` and `perturb: false`: L = (L_x + L_s1) / 2.

Beyond the paper, off unless asked for: `branch`, the subclass branch and gate of USRN ([`branch.py`](branch.py)), whose
losses join L_x and the strong views' with the weight `subclass`; `class_thresholds`, a τ for each class.
"""

import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from common.config import Config, ConfigError
from common.config.bounds import Count, NotNegative, Rate, Share
from common.engine.method import IN_PARTS, Batch, Losses, Method, MethodContext, pixel_loss
from common.losses.upsampled import upsampled_cross_entropy
from common.models import EncoderDecoder, build_network
from semi_sup import consistency
from semi_sup.baseline import refuse_second_head
from semi_sup.branch import SubclassBranch, gated_labels
from semi_sup.consistency import (
    ClassThresholds,
    Labels,
    PseudoLabels,
    confident_loss,
    in_boxes,
    native_area,
    paste,
    pseudo_labels,
)

MAJORITY = 0.5  # above it a class that reaches the threshold is the likeliest one
PERTURBED = 0.5  # weight of L_fp among the unlabelled losses; the strong views share the rest


@dataclass(frozen=True)
class ConsistencyConfig:
    """What the `method:` sections of UniMatch and UniMatch V2 share."""

    threshold: Share = 0.95  # τ, which a pseudo-label's probability has to reach; 0 keeps all
    views: Literal[1, 2] = 2  # strong views of an unlabelled crop
    supervised: NotNegative = 1.0  # weight of L_x
    unsupervised: NotNegative = 1.0  # weight of all unlabelled losses
    # momentum of each class's mean confidence, which scales its τ; None: one τ for all
    class_thresholds: Rate | None = None
    branch: bool = False  # USRN's: a second decoder for subclasses, which gates the labels
    gate: bool = True  # with `branch`; False: it is trained, and gates nothing
    subclass: NotNegative = 1.0  # weight of the losses on subclasses
    subclasses: str | tuple[Count, ...] = "rule"  # of each class, as USRN has them


@dataclass(frozen=True)
class UniMatchConfig(ConsistencyConfig):
    """The `method:` section of UniMatch. partner: what CutMix pastes, a second crop of the same image (the stream's
    `augment.partner`), as released, or the same view of the batch in opposite order."""

    perturb: bool = True  # learn from dropped channels, too
    partner: Literal["same", "batch"] = "same"


class Consistency(Method):
    """A network that learns from labels and from its confident answers. Batches: `labeled` (image, label; with `branch`
    sub_label), `unlabeled` (weak, shown, strong1, box1, …)."""

    Options = ConsistencyConfig
    backwards = 2
    uncompiled = IN_PARTS

    def __init__(self, cfg: Config, context: MethodContext):
        super().__init__(cfg, context)
        fitting = "deeplabv3plus_unimatch or dpt"
        # An abstract class will do: it is only asked whether the network is one.
        self.model = build_network(cfg.model, EncoderDecoder, fitting, cfg.name)  # type: ignore[type-abstract]
        refuse_second_head(self.model, cfg.name)
        self.loss = pixel_loss(
            cfg.remedies,
            cfg,
            context,
            average="valid",
            pseudo_labels="pixels",
            features=self.model.embedding_channels,
            labels_itself=True,
        )

        o = self.options
        say_ignored(cfg, o)
        self.branch = SubclassBranch(cfg, o.subclasses) if o.branch else None
        self.thresholds = None
        if o.class_thresholds is not None:
            self.thresholds = ClassThresholds(
                cfg.model.num_classes, o.threshold, o.class_thresholds
            )

    # Labelled crops -------------------------------------------------------------------------------------------------

    def labelled_terms(
        self,
        logits: Tensor,
        embedding: Tensor,
        sub_logits: Tensor | None,
        batch: Batch,
        progress: float,
    ) -> Losses:
        """L_x of the labelled crops' logits at the network's stride, and that of the subclasses. embedding: what the
        logits are made of (B, D, h, w)."""
        label = self.model.pad_label(batch["label"])
        loss = self.loss.upsampled(
            logits, label, align_corners=True, progress=progress, features=embedding
        )
        terms = {"loss": self.options.supervised * loss / 2, "Lx": loss}
        if sub_logits is None:
            return terms

        sub_label = self.model.pad_label(batch["sub_label"])
        sub = upsampled_cross_entropy(sub_logits, sub_label, align_corners=True)
        weight = self.options.supervised * self.options.subclass / 2

        return {**terms, "loss": terms["loss"] + weight * sub, "Lx_sub": sub}

    # Pseudo-labels --------------------------------------------------------------------------------------------------

    def judged(self, logits: Tensor, sub_logits: Tensor | None, shown: Tensor) -> Labels:
        """The labels that logits at the network's stride give, gated by those of the subclasses where there are any."""
        logits = self.loss.with_prior(logits)
        if sub_logits is None or self.branch is None:
            return Labels(pseudo_labels(logits, shown))

        gate = self.options.gate
        return Labels(*gated_labels(logits, sub_logits, self.branch.parents, shown, gate))

    def threshold(self, labels: PseudoLabels) -> float | Tensor:
        """The confidence that a label of the classes has to reach."""
        return (
            self.options.threshold
            if self.thresholds is None
            else self.thresholds.of(labels.label)
        )

    def count(self, weak: Labels, logits: Tensor, batch: Batch) -> Losses:
        """Count the labels of the batch's weak view, for remedies and thresholds. Returns what is logged of them: the
        share that is kept, and the share that the gate took away or changed."""
        labels = weak.classes
        free = labels
        if self.branch is not None:
            free = pseudo_labels(self.loss.with_prior(logits), labels.shown)
        if self.thresholds is not None:
            # not by what the gate makes of them, whose confidence is that of a class which was not the likeliest
            self.thresholds.update(free)

        threshold = self.threshold(labels)
        confident = labels.confident(threshold)
        if self.loss.counts.every:
            self.loss.count(confident, native_area(batch, labels.shown))
        terms = {"kept": labels.kept(threshold)}
        if self.branch is None:
            return terms

        vetoed = free.confident(self.threshold(free)) != confident
        return {**terms, "vetoed": vetoed.sum() / labels.shown.sum().clamp(min=1)}

    def unlabelled_loss(self, logits: Tensor, labels: PseudoLabels, progress: float) -> Tensor:
        """The loss of logits at the network's stride against confident labels."""
        total = partial(self.loss.upsampled_total, align_corners=True, progress=progress)
        return confident_loss(logits, labels, self.threshold(labels), total)

    # Strong views ---------------------------------------------------------------------------------------------------

    def strong_terms(
        self, batch: Batch, weak: Labels, partner: Labels, progress: float, share: float = 1.0
    ) -> Losses:
        """The part of the step that one pass over the strong views makes: `share` of the unlabelled losses."""
        images, labels = self.mixed(batch, weak, partner)
        maps = self.strong_maps(torch.cat(images))
        logits = self.model.decode(maps).chunk(len(images))
        weight = self.options.unsupervised * share / 2

        losses = [
            self.unlabelled_loss(z, y.classes, progress)
            for z, y in zip(logits, labels, strict=True)
        ]
        mean = torch.stack(losses).mean()
        terms = {"loss": weight * mean + self.loss.untouched(), "Ls": mean}
        if self.branch is None:
            return terms

        sub_logits = self.branch(maps).chunk(len(images))
        losses = [
            confident_loss(z, y.subclasses, self.options.threshold)
            for z, y in zip(sub_logits, labels, strict=True)
            if y.subclasses is not None
        ]
        sub = torch.stack(losses).mean()
        loss = terms["loss"] + weight * self.options.subclass * sub

        return {**terms, "loss": loss, "Ls_sub": sub}

    def mixed(
        self, batch: Batch, weak: Labels, partner: Labels
    ) -> tuple[list[Tensor], list[Labels]]:
        """The strong views and their labels, with what their boxes take from the partner."""
        images = []
        labels = []

        for view in range(1, self.options.views + 1):
            inside = in_boxes(batch[f"box{view}"], weak.classes.label.shape[-2:])
            images.append(paste(batch[f"strong{view}"], self.partner_view(batch, view), inside))
            labels.append(weak.pasted(partner, inside))

        return images, labels

    def partner_view(self, batch: Batch, view: int) -> Tensor:
        """The strong view that is pasted from."""
        return batch[f"strong{view}"].flip(0)

    def strong_maps(self, images: Tensor) -> tuple[Tensor, ...]:
        """The student's maps of strong views, all first ones before all second ones."""
        return self.encode(images)

    def encode(self, images: Tensor) -> tuple[Tensor, ...]:
        return self.model.encode(self.model.normalise(images))

    def after_step(self, step: int) -> None:
        self.loss.after_step(step)
        if self.thresholds is not None:
            self.thresholds.after_step()


def say_ignored(cfg: Config, options: ConsistencyConfig) -> None:
    """Warn of what the section `method` sets in vain."""
    where = f"{cfg.name}: method"
    given = [key for key in ("gate", "subclass", "subclasses") if key in cfg.method]
    if given and not options.branch:
        text = f"{where}: {', '.join(given)}: ignored where branch is false"
        warnings.warn(text, stacklevel=4)
    if options.class_thresholds is not None and options.threshold == 0:
        text = f"{where}.class_thresholds: parts of method.threshold, which is 0: it changes nothing"
        warnings.warn(text, stacklevel=4)
    if options.branch and options.gate and options.threshold <= MAJORITY:
        text = (
            f"{where}.gate: with method.threshold: {options.threshold:g} a class that is not the likeliest can reach "
            f"it, so the gate changes labels where USRN's takes them away; set threshold above {MAJORITY:g}, or gate: "
            "false"
        )
        warnings.warn(text, stacklevel=4)


class UniMatch(Consistency):
    """The paper. With `partner: same` the unlabelled batch holds `partner_weak`, `partner_shown`, `partner_strong1`, …,
    too."""

    Options = UniMatchConfig

    def forward(self, streams: Mapping[str, Batch], step: int) -> Iterator[Losses]:
        """Labelled crops, weak and perturbed views; then the strong views."""
        o = self.options
        progress = step / self.steps
        labeled = streams["labeled"]
        unlabeled = streams["unlabeled"]
        partner = self.label_partner(unlabeled) if o.partner == "same" else None

        seen = self.look(labeled["image"], unlabeled["weak"])
        weak = self.judged(seen.weak, seen.weak_sub, unlabeled["shown"])
        logged = self.count(weak, seen.weak, unlabeled)
        terms = self.labelled_terms(
            seen.labelled, seen.embedding, seen.labelled_sub, labeled, progress
        )
        if seen.perturbed is not None:
            loss = self.unlabelled_loss(seen.perturbed, weak.classes, progress)
            together = terms["loss"] + o.unsupervised * PERTURBED * loss / 2
            terms |= {"loss": together, "Lfp": loss}

        del seen  # so that its graph is gone before the next one is built
        yield terms | logged

        share = 1 - PERTURBED if o.perturb else 1.0
        yield self.strong_terms(unlabeled, weak, partner or weak.flip(), progress, share)

    @torch.no_grad()
    def label_partner(self, batch: Batch) -> Labels:
        """Labels of the second crop, by the network in evaluation mode."""
        if "partner_weak" not in batch:
            raise ConfigError(
                "data.streams.unlabeled.augment.partner: method.partner is 'same', which pastes from a second crop; "
                "set it to true, or method.partner=batch"
            )

        training = self.model.training
        self.eval()
        maps = self.encode(batch["partner_weak"])
        sub_logits = None if self.branch is None else self.branch(maps)
        labels = self.judged(self.model.decode(maps), sub_logits, batch["partner_shown"])
        self.train(training)
        # made without a gradient: the passes that need one must not find these casts of the weights
        torch.clear_autocast_cache()

        return labels

    def partner_view(self, batch: Batch, view: int) -> Tensor:
        if self.options.partner == "batch":
            return super().partner_view(batch, view)
        return batch[f"partner_strong{view}"]

    def look(self, images: Tensor, weak: Tensor) -> "Seen":
        """One pass over labelled crops and weak views, these with dropped channels, too."""
        if images.shape[1:] != weak.shape[1:]:
            raise ValueError(
                "data.streams: UniMatch runs labelled and unlabelled crops as one batch; give one `crop`"
            )

        count = len(images)
        maps = self.encode(torch.cat((images, weak)))
        perturbed = None
        if self.options.perturb:
            dropped = consistency.channel_dropout(maps)
            both = tuple(map(torch.cat, zip(maps, dropped, strict=True)))
            embedding = self.model.embed(both)
            logits, perturbed = self.model.classify(embedding).chunk(2)
            perturbed = perturbed[count:]
        else:
            embedding = self.model.embed(maps)
            logits = self.model.classify(embedding)

        seen = Seen(logits[:count], embedding[:count], logits[count:], perturbed)
        if self.branch is None:
            return seen

        sub_logits = self.branch(maps)
        return seen._replace(
            labelled_sub=sub_logits[:count], weak_sub=sub_logits[count:].detach()
        )


class Seen(NamedTuple):
    """Logits of labelled crops, with what they are made of, weak views, and weak views with dropped channels; of the
    subclasses, where there is a branch for them."""

    labelled: Tensor
    embedding: Tensor
    weak: Tensor
    perturbed: Tensor | None
    labelled_sub: Tensor | None = None
    weak_sub: Tensor | None = None
