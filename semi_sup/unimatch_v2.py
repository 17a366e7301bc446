"""UniMatch V2: Pushing the Limit of Semi-Supervised Semantic Segmentation (Yang et al., 2024), and its FixMatch.

A moving average of the network labels a weak view of an unlabelled crop. The network learns two strong views of it,
each with a box of CutMix from the batch in opposite order, and with complementary halves of the channels of its
encoder's maps:

    L = (L_x + ½·(L_s1 + L_s2)) / 2

Every level of the encoder has the same mask; half of the pairs are left whole. FixMatch is `views: 1` and
`complementary: false`: L = (L_x + L_s1) / 2.
"""

from collections.abc import Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from common.config import Config, ConfigError
from common.config.bounds import Share
from common.engine.method import Batch, Losses, MethodContext, move_average
from semi_sup import consistency
from semi_sup.consistency import PseudoLabels, pseudo_labels
from semi_sup.unimatch import Consistency, ConsistencyConfig


@dataclass(frozen=True)
class UniMatchV2Config(ConsistencyConfig):
    """The `method:` section of UniMatch V2. The paper's tables show the teacher."""

    complementary: bool = True  # drop channels of the two strong views
    momentum: Share = 0.996  # of the moving average, in the end; 1 − 1/t before
    predicts: Literal["student", "teacher"] = "teacher"

    def __post_init__(self):
        if self.complementary and self.views < 2:
            raise ValueError("complementary: true needs views: 2; set it to false for FixMatch")


class UniMatchV2(Consistency):
    """The paper. Batches: `labeled` (image, label), `unlabeled` (weak, shown, strong1, box1, …)."""

    Options = UniMatchV2Config

    def __init__(self, cfg: Config, context: MethodContext):
        super().__init__(cfg, context)
        if (
            self.options.complementary
            and len({*getattr(self.model.backbone, "channels", ())}) != 1
        ):
            raise ConfigError(
                f"{cfg.name}: method.complementary: {cfg.model.name!r} has maps of several widths, which no one mask "
                "fits; set model.name to dpt, or it to false"
            )

        self.teacher = deepcopy(self.model).requires_grad_(False)
        self.predict_prefix = "teacher." if self.options.predicts == "teacher" else "model."

    def forward(self, streams: Mapping[str, Batch], step: int) -> Iterator[Losses]:
        """The labelled crops, then the strong views."""
        o = self.options
        progress = step / self.steps
        labeled = streams["labeled"]
        unlabeled = streams["unlabeled"]
        weak = self.label(unlabeled)
        self.count(weak)

        loss = self.labelled_loss(
            self.model.decode(self.encode(labeled["image"])), labeled, progress
        )
        yield {"loss": o.supervised * loss / 2, "Lx": loss, "kept": weak.kept(o.threshold)}

        yield self.strong_terms(self.strong_losses(unlabeled, weak, weak.flip(), progress))

    @torch.no_grad()
    def label(self, batch: Batch) -> PseudoLabels:
        """The teacher's labels of the weak view."""
        net = self.teacher.eval()
        return pseudo_labels(
            net.decode(net.encode(net.normalise(batch["weak"]))), batch["shown"]
        )

    def strong_logits(self, images: Tensor) -> Tensor:
        maps = self.encode(images)
        if self.options.complementary:
            first = maps[0]
            masks = consistency.complementary_masks(len(first) // 2, first.shape[1], first)
            maps = tuple(x * masks for x in maps)

        return self.model.decode(maps)

    def after_step(self, step: int) -> None:
        super().after_step(step)
        move_average(self.teacher, self.model, min(1 - 1 / (step + 1), self.options.momentum))
