"""HRDA (Hoyer et al., ECCV 2022): DAFormer at full resolution, on a network of two scales.

Each cross-entropy of the student becomes

    (1 − λ_d) · CE of the fused logits + λ_d · CE of the detail crop's

with a detail crop of its own. The feature distance holds the context. The teacher slides its detail crops over all of
the image.
"""

from dataclasses import dataclass

from torch import Tensor

from common.config.bounds import Share, Side
from common.engine.method import Losses
from common.models.hrda import HRDANetwork
from common.ops.resize import size_of
from uda.daformer import DAFormer, DAFormerConfig, View
from uda.mic import MIC, MICConfig


@dataclass(frozen=True)
class HRDAConfig(DAFormerConfig):
    """The `method:` section of HRDA: DAFormer's keys and the weight of the detail."""

    detail_weight: Share = 0.1  # λ_d


class HRDA(DAFormer):
    """Batches as in `daformer.DAFormer`."""

    Options = HRDAConfig
    Network = HRDANetwork
    model: HRDANetwork
    fitting = "hrda"

    def student(
        self, view: View, progress: float, weight: Tensor | None = None
    ) -> tuple[Losses, Tensor]:
        box = self.model.draw_box(size_of(view.image))
        out = self.model.segment_crop(view.image, box)
        fused = self.cross_entropy(out["logits"], view.label, progress, weight)

        label = box.of(view.label)
        detail = self.cross_entropy(
            out["detail"], label, progress, None if weight is None else box.of(weight)
        )
        share = self.options.detail_weight
        losses = {"ce": (1 - share) * fused + share * detail, "fused": fused, "detail": detail}

        return losses, out["features"][self.options.feature_distance.stage]

    def seen_by_backbone(self, image: Tensor) -> Tensor:
        return self.model.context(image)


@dataclass(frozen=True)
class MICHRDAConfig(MICConfig, HRDAConfig):
    """The `method:` section of MIC on HRDA."""

    mask_block: Side = 64


class MICHRDA(MIC, HRDA):
    """MIC on HRDA."""

    Options = MICHRDAConfig
