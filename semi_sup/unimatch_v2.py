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
from semi_sup.consistency import Labels
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
        self.teacher_branch = (
            None if self.branch is None else deepcopy(self.branch).requires_grad_(False)
        )
        self.predict_prefix = "teacher." if self.options.predicts == "teacher" else "model."

    def forward(self, streams: Mapping[str, Batch], step: int) -> Iterator[Losses]:
        """The labelled crops, then the strong views."""
        progress = step / self.steps
        labeled = streams["labeled"]
        unlabeled = streams["unlabeled"]
        weak, logged = self.label(unlabeled)

        maps = self.encode(labeled["image"])
        sub_logits = None if self.branch is None else self.branch(maps)
        embedding = self.model.embed(maps)
        logits = self.model.classify(embedding)
        terms = self.labelled_terms(logits, embedding, sub_logits, labeled, progress)
        # so that their graph is gone before the next one is built
        del maps, embedding, logits, sub_logits
        yield terms | logged

        yield self.strong_terms(unlabeled, weak, weak.flip(), progress)

    @torch.no_grad()
    def label(self, batch: Batch) -> tuple[Labels, Losses]:
        """The teacher's labels of the weak view, and what is logged of them."""
        net = self.teacher.eval()
        maps = net.encode(net.normalise(batch["weak"]))
        logits = net.decode(maps)
        branch = self.teacher_branch
        labels = self.judged(
            logits, None if branch is None else branch.eval()(maps), batch["shown"]
        )

        return labels, self.count(labels, logits, batch)

    def strong_maps(self, images: Tensor) -> tuple[Tensor, ...]:
        maps = self.encode(images)
        if self.options.complementary:
            first = maps[0]
            masks = consistency.complementary_masks(len(first) // 2, first.shape[1], first)
            maps = tuple(x * masks for x in maps)

        return maps

    def after_step(self, step: int) -> None:
        super().after_step(step)
        momentum = min(1 - 1 / (step + 1), self.options.momentum)
        move_average(self.teacher, self.model, momentum)
        if self.branch is not None and self.teacher_branch is not None:
            move_average(self.teacher_branch, self.branch, momentum)
