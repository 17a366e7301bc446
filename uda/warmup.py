"""The start of CPSL: source training with output-space adversarial alignment (AdaptSegNet style), or source only.

    network        CE of the source + λ · GAN(D(softmax(target logits)), "source")
    discriminator  GAN(D(softmax(source logits)), "source") + GAN(D(softmax(target logits)), "target")

One backward of the joint loss: D's weights are constants in the network's term and the network's output is detached in
D's, which gives the alternating update exactly.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from common.config import Config
from common.config.bounds import NotNegative, Width
from common.engine.method import Batch, Losses, MethodContext
from uda.base import Stage
from uda.discriminator import SOURCE, TARGET, Discriminator, adversarial_loss


@dataclass(frozen=True)
class WarmUpConfig:
    """The `method:` section of the warm-up. `adversarial: 0` trains on the source alone, without a discriminator."""

    adversarial: NotNegative = 0.01  # λ
    gan: Literal["LS", "Vanilla"] = "LS"  # least squares, or cross-entropy
    discriminator_lr: NotNegative = 1e-4
    discriminator_width: Width = 64
    head_lr_mult: NotNegative = 10.0
    # release: its optimiser lists each backbone tensor three times
    backbone_lr_mult: NotNegative = 3.0


class WarmUp(Stage):
    """Batches: `source` (image, label), and `target` (image) unless `adversarial` is 0."""

    Options = WarmUpConfig
    options: WarmUpConfig
    pseudo_labels = None

    def __init__(self, cfg: Config, context: MethodContext):
        super().__init__(cfg, context)
        self.discriminator = None
        if self.options.adversarial > 0:
            self.discriminator = Discriminator(
                cfg.model.num_classes, self.options.discriminator_width
            )

    def parameter_groups(self) -> list[dict[str, Any]]:
        groups = super().parameter_groups()
        if self.discriminator is None:
            return groups

        adversary = {
            "params": list(self.discriminator.parameters()),
            "name": "discriminator",
            "optimizer": "adam",
        }
        return [
            *groups,
            {
                **adversary,
                "lr": self.options.discriminator_lr,
                "betas": (0.9, 0.99),
                "weight_decay": 0.0,
            },
        ]

    def forward(self, streams: Mapping[str, Batch], step: int) -> Losses:
        source = streams["source"]
        progress = step / self.steps
        if self.discriminator is None:
            return self.source_terms(source, progress)

        logits, out = self.look(source["image"])
        facts = {"features": out["features"], "small": out["logits"]}
        ce = self.loss(logits, source["label"], progress=progress, **facts)
        target = self.upsampled(streams["target"]["image"]).softmax(1)
        gan = self.options.gan

        generator_loss = adversarial_loss(self.discriminator.constant(target), SOURCE, gan)
        on_source = adversarial_loss(
            self.discriminator(logits.detach().softmax(1)), SOURCE, gan
        )
        on_target = adversarial_loss(self.discriminator(target.detach()), TARGET, gan)
        discriminator_loss = on_source + on_target

        loss = ce + self.options.adversarial * generator_loss + discriminator_loss

        return {
            "loss": loss,
            "source_ce": ce,
            "adversarial": generator_loss,
            "discriminator": discriminator_loss,
        }
