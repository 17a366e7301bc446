"""Supervised training with the labelled images alone: what semi-supervised methods are compared with.

On USRN's network its features are what is clustered for the subclasses; on UniMatch's networks it is the baseline of
that. A config of another method becomes it by `method.name=baseline` (`semi_sup/config.py`), where the network has a
second head by `model.options.auxiliary=false`, too.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

from common.config import Config, ConfigError
from common.config.bounds import Count, NotNegative
from common.engine.method import Batch, Losses, Method, MethodContext, pixel_loss
from common.losses.build import Taken
from common.losses.counts import PseudoUnit
from common.models import EncoderDecoder, build_network
from common.models.deeplabv3plus_usrn import DeepLabV3Plus

OF_USRN = ("deeplabv3plus", "usrn")  # USRN's networks, of one and of two branches


@dataclass(frozen=True)
class BaselineConfig:
    """The `method:` section of the supervised baseline."""

    # of each class: a preset's name, numbers, or by the labelled pixels
    subclasses: str | tuple[Count, ...] = "rule"
    supervised: NotNegative = 1.0  # weight of the terms on labelled images


class Scores(NamedTuple):
    """Logits of the classes (B, C, h, w) and, where there is a branch for them, of the subclasses (B, K, h, w); of
    labelled crops the features (B, D, h, w) that the class logits were made of."""

    classes: Tensor
    subclasses: Tensor | None
    features: Tensor | None = None

    @classmethod
    def of(cls, out: Mapping[str, Any], prefix: str = "") -> "Scores":
        """Those of a network's output; prefix: "pooled_" for images whose features were pooled."""
        features = None if prefix else out["embedding"]
        return cls(out[f"{prefix}logits"], out.get(f"{prefix}sub_logits"), features)

    def split(self, sizes: list[int]) -> list["Scores"]:
        classes = self.classes.split(sizes)
        subclasses = (
            [None] * len(sizes) if self.subclasses is None else self.subclasses.split(sizes)
        )
        return [Scores(*pair) for pair in zip(classes, subclasses, strict=True)]


def usrn_network(cfg: Config, fitting: str) -> DeepLabV3Plus:
    """The network of the config. fitting: "usrn", of two branches, or "deeplabv3plus"; ConfigError for another."""
    model = build_network(cfg.model, DeepLabV3Plus, fitting, cfg.name)
    if model.dual != (fitting == "usrn"):
        raise ConfigError(
            f"{cfg.name}: model.name: {cfg.model.name!r} does not fit the method; set it to {fitting}"
        )
    return model


def refuse_second_head(model: EncoderDecoder, name: str) -> None:
    """ConfigError for a network with a head that only a method for it would train."""
    if model.heads != ("decode",):
        raise ConfigError(
            f"{name}: model.options.auxiliary: the method trains no second head; set it to false"
        )


class Baseline(Method):
    """Supervised training. Batches: `labeled` (image, label)."""

    Options = BaselineConfig
    options: BaselineConfig
    model: DeepLabV3Plus | EncoderDecoder
    pseudo_labels: PseudoUnit | None = None  # how they join the class counts of remedies
    records = True

    def __init__(self, cfg: Config, context: MethodContext):
        super().__init__(cfg, context)
        self.model = self.make_model(cfg)
        facts = {
            "pseudo_labels": self.pseudo_labels,
            "full_size": self.takes(cfg).full_size,
            "features": self.model.embedding_channels,
            "labels_itself": self.pseudo_labels is not None,
        }
        self.loss = pixel_loss(cfg.remedies, cfg, context, average="valid", **facts)

    @classmethod
    def takes(cls, cfg: Config) -> Taken:
        """What methods on the same network take: on USRN's no logits of a whole batch at label size."""
        return Taken(full_size=cfg.model.name not in OF_USRN)

    def make_model(self, cfg: Config) -> DeepLabV3Plus | EncoderDecoder:
        """The network of the config. ConfigError for one that the method cannot train."""
        if cfg.model.name in OF_USRN:
            return usrn_network(cfg, "deeplabv3plus")

        fitting = "deeplabv3plus, deeplabv3plus_unimatch, deeplabv3plus_u2pl or dpt"
        # An abstract class will do: it is only asked whether the network is one.
        model = build_network(cfg.model, EncoderDecoder, fitting, cfg.name)  # type: ignore[type-abstract]
        refuse_second_head(model, cfg.name)
        return model

    def forward(self, streams: Mapping[str, Batch], step: int) -> Iterator[Losses]:
        batch = streams["labeled"]
        yield self.labelled_terms(self.classify(batch["image"]), batch, step / self.steps)

    def classify(self, images: Tensor) -> Scores:
        """One pass of the network; scores at its stride."""
        return Scores.of(self.model(images))

    def labelled_terms(self, scores: Scores, batch: Batch, progress: float) -> Losses:
        """L_s of the labelled crops."""
        label = self.model.pad_label(batch["label"])
        loss = self.loss.upsampled(
            scores.classes,
            label,
            align_corners=self.model.align_corners,
            progress=progress,
            features=scores.features,
        )
        return {"loss": self.options.supervised * loss, "Ls": loss}

    def after_step(self, step: int) -> None:
        self.loss.after_step(step)
