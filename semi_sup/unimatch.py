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
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from common.config import Config, ConfigError
from common.config.bounds import NotNegative, Share
from common.engine.method import Batch, Losses, Method, MethodContext, pixel_loss
from common.models import EncoderDecoder, build_network
from semi_sup import consistency
from semi_sup.consistency import (
    PseudoLabels,
    confident_loss,
    in_boxes,
    paste,
    paste_labels,
    pseudo_labels,
)

PERTURBED = 0.5  # weight of L_fp among the unlabelled losses; the strong views share the rest


@dataclass(frozen=True)
class ConsistencyConfig:
    """What the `method:` sections of UniMatch and UniMatch V2 share."""

    threshold: Share = 0.95  # τ, which a pseudo-label's probability has to reach; 0 keeps all
    views: Literal[1, 2] = 2  # strong views of an unlabelled crop
    supervised: NotNegative = 1.0  # weight of L_x
    unsupervised: NotNegative = 1.0  # weight of all unlabelled losses


@dataclass(frozen=True)
class UniMatchConfig(ConsistencyConfig):
    """The `method:` section of UniMatch. partner: what CutMix pastes, a second crop of the same image (the stream's
    `augment.partner`), as released, or the same view of the batch in opposite order."""

    perturb: bool = True  # learn from dropped channels, too
    partner: Literal["same", "batch"] = "same"


class Consistency(Method):
    """A network that learns from labels and from its confident answers. Batches: `labeled` (image, label), `unlabeled`
    (weak, shown, strong1, box1, …)."""

    Options = ConsistencyConfig
    backwards = 2
    compiles = False

    def __init__(self, cfg: Config, context: MethodContext):
        super().__init__(cfg, context)
        fitting = "deeplabv3plus_unimatch or dpt"
        # An abstract class will do: it is only asked whether the network is one.
        self.model = build_network(cfg.model, EncoderDecoder, fitting, cfg.name)  # type: ignore[type-abstract]
        self.loss = pixel_loss(
            cfg.remedies, cfg, context, average="valid", pseudo_labels="pixels"
        )

    def labelled_loss(self, logits: Tensor, batch: Batch, progress: float) -> Tensor:
        """L_x of the labelled crops' logits at the network's stride."""
        label = self.model.pad_label(batch["label"])
        return self.loss.upsampled(logits, label, align_corners=True, progress=progress)

    def unlabelled_loss(self, logits: Tensor, labels: PseudoLabels, progress: float) -> Tensor:
        """The loss of logits at the network's stride against confident labels."""
        total = partial(self.loss.total, progress=progress)
        return confident_loss(logits, labels, self.options.threshold, total)

    def strong_losses(
        self, batch: Batch, weak: PseudoLabels, partner: PseudoLabels, progress: float
    ) -> list[Tensor]:
        """L_s1, L_s2 of one pass over the strong views, with what their boxes take from the partner."""
        images = []
        labels = []

        for view in range(1, self.options.views + 1):
            inside = in_boxes(batch[f"box{view}"], weak.label.shape[-2:])
            images.append(paste(batch[f"strong{view}"], self.partner_view(batch, view), inside))
            labels.append(paste_labels(weak, partner, inside))

        logits = self.strong_logits(torch.cat(images)).chunk(len(images))

        return [
            self.unlabelled_loss(z, y, progress) for z, y in zip(logits, labels, strict=True)
        ]

    def partner_view(self, batch: Batch, view: int) -> Tensor:
        """The strong view that is pasted from."""
        return batch[f"strong{view}"].flip(0)

    def strong_logits(self, images: Tensor) -> Tensor:
        """The student's logits of strong views, all first ones before all second ones."""
        return self.model.decode(self.encode(images))

    def encode(self, images: Tensor) -> tuple[Tensor, ...]:
        return self.model.encode(self.model.normalise(images))

    def strong_terms(self, losses: list[Tensor], share: float = 1.0) -> Losses:
        """The part of the step that the strong views make: `share` of the unlabelled losses."""
        mean = torch.stack(losses).mean()
        return {"loss": self.options.unsupervised * share * mean / 2, "Ls": mean}

    def count(self, weak: PseudoLabels) -> None:
        self.loss.count(weak.confident(self.options.threshold))

    def after_step(self, step: int) -> None:
        self.loss.after_step(step)


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

        labelled, weak_logits, perturbed = self.look(labeled["image"], unlabeled["weak"])
        weak = pseudo_labels(weak_logits, unlabeled["shown"])
        self.count(weak)
        supervised = self.labelled_loss(labelled, labeled, progress)
        terms = {
            "loss": o.supervised * supervised / 2,
            "Lx": supervised,
            "kept": weak.kept(o.threshold),
        }
        if perturbed is not None:
            loss = self.unlabelled_loss(perturbed, weak, progress)
            terms |= {
                "loss": terms["loss"] + o.unsupervised * PERTURBED * loss / 2,
                "Lfp": loss,
            }

        del labelled, perturbed  # so that their graph is gone before the next one is built
        yield terms

        losses = self.strong_losses(unlabeled, weak, partner or weak.flip(), progress)
        yield self.strong_terms(losses, 1 - PERTURBED if o.perturb else 1.0)

    @torch.no_grad()
    def label_partner(self, batch: Batch) -> PseudoLabels:
        """Labels of the second crop, by the network in evaluation mode."""
        if "partner_weak" not in batch:
            raise ConfigError(
                "data.streams.unlabeled.augment.partner: method.partner is 'same', which pastes from a second crop; "
                "set it to true, or method.partner=batch"
            )

        training = self.model.training
        self.model.eval()
        logits = self.model.decode(self.encode(batch["partner_weak"]))
        self.model.train(training)

        return pseudo_labels(logits, batch["partner_shown"])

    def partner_view(self, batch: Batch, view: int) -> Tensor:
        if self.options.partner == "batch":
            return super().partner_view(batch, view)
        return batch[f"partner_strong{view}"]

    def look(self, images: Tensor, weak: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Logits of labelled crops, of weak views, and of weak views with dropped channels, of one pass."""
        if images.shape[1:] != weak.shape[1:]:
            raise ValueError(
                "data.streams: UniMatch runs labelled and unlabelled crops as one batch; give one `crop`"
            )

        count = len(images)
        maps = self.encode(torch.cat((images, weak)))
        if not self.options.perturb:
            clean = self.model.decode(maps)
            return clean[:count], clean[count:], None

        dropped = consistency.channel_dropout(maps)
        clean, perturbed = self.model.decode(
            tuple(map(torch.cat, zip(maps, dropped, strict=True)))
        ).chunk(2)

        return clean[:count], clean[count:], perturbed[count:]
