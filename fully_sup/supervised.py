"""Supervised segmentation: a loss for each output of the network, cross-entropy with the config's remedies."""

import operator
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import reduce
from typing import cast

from torch import nn

from common.config import Config, ConfigError, pick, typed
from common.config.bounds import NotNegative
from common.engine.method import Batch, Losses, Method, MethodContext, make_method, pixel_loss
from common.losses.build import Remedies, Taken
from common.losses.cross_entropy import Average
from common.losses.pixel_loss import PixelLoss
from common.models import build_model

# A head's logits in the network's output. Those of a cascade (`stages`) are trained one by one.
HEADS = {
    "decode": lambda out: out.get("stages") or [out["logits"]],
    "aux": lambda out: out["aux"],
}
FEATURED = "decode"  # the head whose loss is given the features of its classifier


@dataclass(frozen=True)
class HeadConfig:
    """A head of the network in the loss."""

    weight: NotNegative = 1.0


@dataclass(frozen=True)
class SupervisedConfig:
    """The `method:` section."""

    heads: Mapping[str, HeadConfig] = field(default_factory=lambda: {"decode": HeadConfig()})
    average: Average = "all"  # MMSegmentation 0.x divides by all pixels, ignored ones included


class Supervised(Method):
    """loss = Σ_heads weight · loss(upsampled logits, label). Batches: `labeled` (image, label).

    `decode` is every stage of a cascade, `aux` the auxiliary heads. Remedies act on the heads that `remedies.heads`
    lists, `decode` by default; the others keep cross-entropy.
    """

    Options = SupervisedConfig
    options: SupervisedConfig
    records = True

    def __init__(self, cfg: Config, context: MethodContext):
        super().__init__(cfg, context)
        where = f"{cfg.name}: method.heads"

        for name in self.options.heads:
            pick(HEADS, name, where)

        self.model = build_model(cfg.model)
        self.model.check_heads(self.options.heads, where)
        remedied = self._remedied_heads(cfg)
        self.losses = nn.ModuleDict()

        for name in self.options.heads:
            section = cfg.remedies if name in remedied else {}
            features = self.model.embedding_channels if name == FEATURED else None
            self.losses[name] = pixel_loss(
                section,
                cfg,
                context,
                average=self.options.average,
                features=features,
                several_heads=True,
            )

    @classmethod
    def takes(cls, cfg: Config) -> Taken:
        """Features where remedies act on the head that gives them alone."""
        remedies = typed(Remedies, cfg.remedies, f"{cfg.name}: remedies")
        return Taken(features=set(remedies.heads) <= {FEATURED})

    def _remedied_heads(self, cfg: Config) -> tuple[str, ...]:
        """The heads that remedies act on. ConfigError for one that is not trained."""
        remedied = tuple(cfg.remedies.get("heads", ("decode",)))
        for name in remedied:
            if name not in self.options.heads:
                known = ", ".join(self.options.heads)
                raise ConfigError(
                    f"{cfg.name}: remedies.heads: {name!r} is no head of method.heads ({known})"
                )

        if not remedied:
            raise ConfigError(
                f"{cfg.name}: remedies.heads: names no head, so nothing would act; remove it"
            )

        return remedied

    def forward(self, streams: Mapping[str, Batch], step: int) -> Losses:
        batch = streams["labeled"]
        label = self.model.pad_label(batch["label"])
        out = self.model(batch["image"], batch.get("extent"))

        terms: Losses = {}

        for name, module in self.losses.items():
            loss = cast(PixelLoss, module)
            outputs = HEADS[name](out)
            facts = {"progress": step / self.steps, "features": out.get("embedding")}
            for i, logits in enumerate(outputs):
                key = name if len(outputs) == 1 else f"{name}{i}"
                value = loss.enlarged(
                    logits, label, align_corners=self.model.align_corners, **facts
                )
                terms[key] = self.options.heads[name].weight * value

        return {"loss": reduce(operator.add, terms.values())} | terms


METHODS: dict[str, type[Method]] = {"supervised": Supervised}


def build_method(cfg: Config, context: MethodContext) -> Method:
    """The method that `method.name` names; supervised training where it names none."""
    return make_method(METHODS, cfg, context, default="supervised")
