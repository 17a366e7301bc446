"""The training loss of a segmentation network's logits: cross-entropy with whatever remedies a config chooses.

    z' = logits slot (z, y)             BLV, logit adjustment, …: changes scores, in training only
    l  = w_y · focus( −log softmax(z')_y )
    L  = Σ l / pixels + Σ weight · set term

Without remedies it is plain cross-entropy, bit for bit.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.data import IGNORE
from common.losses.counts import Counts, RefreshedCounts, SeenCounts
from common.losses.cross_entropy import Average
from common.losses.hard_pixel import HardPixels
from common.losses.presence import thinned
from common.losses.region import RegionTerm
from common.losses.slots import (
    AdditiveRemedy,
    ClassWeightRemedy,
    FocusRemedy,
    LogitsRemedy,
    SetRemedy,
)
from common.losses.upsampled import upsampled_sum
from common.ops.resize import size_of
from common.ops.upsampled_loss import fuses, upsampled_loss


class PixelLoss(nn.Module):
    """Every method's loss of class logits; `build_loss` makes it from the section `remedies`."""

    offsets: Tensor
    weights: Tensor

    def __init__(
        self,
        counts: RefreshedCounts,
        average: Average = "valid",
        *,
        logits: LogitsRemedy | None = None,
        class_weight: ClassWeightRemedy | None = None,
        focus: FocusRemedy | HardPixels | None = None,
        sets: Sequence[SetRemedy | RegionTerm] = (),
        pseudo_prior: bool = False,
    ):
        super().__init__()
        self.counts = counts
        self.average = average
        self.logits = logits
        self.class_weight = class_weight
        self.focus = focus
        self.pseudo_prior = pseudo_prior
        self.sets = tuple(sets)
        self.trained = nn.ModuleList(term for term in sets if isinstance(term, RegionTerm))
        online = getattr(logits, "online", False)
        self.seen = SeenCounts(counts.pixels) if online else None
        current = counts.current()
        offsets = self._vector(logits, self._counts_of_logits(current))
        self.register_buffer("offsets", offsets, persistent=False)
        self.register_buffer("weights", self._vector(class_weight, current), persistent=False)
        self.register_load_state_dict_post_hook(lambda module, _: module._apply_counts())

    @staticmethod
    def _vector(remedy: Any, counts: Counts) -> Tensor | None:
        return None if remedy is None else remedy.vector(counts).float()

    def _counts_of_logits(self, current: Counts) -> Counts:
        """What the slot `logits` goes by."""
        return current if self.seen is None else self.seen.current()

    def _apply_counts(self) -> None:
        current = self.counts.current()
        if self.logits is not None:
            self.offsets.copy_(self.logits.vector(self._counts_of_logits(current)))
        if self.class_weight is not None:
            self.weights.copy_(self.class_weight.vector(current))

    def _see(self, label: Tensor) -> None:
        """Count a label, where that is what the slot `logits` goes by."""
        if self.seen is not None and self.logits is not None and self.training:
            self.seen.see(label)
            self.offsets.copy_(self.logits.vector(self.seen.current()))

    # The loss, and what it is made of --------------------------------------------------------------------------------

    def forward(
        self,
        logits: Tensor,
        label: Tensor,
        *,
        progress: float = 0.0,
        pixel_weight: Tensor | None = None,
        features: Tensor | None = None,
        small: Tensor | None = None,
    ) -> Tensor:
        """Scalar loss of logits (B, K, H, W) at the label's size and label (B, H, W), −1 where ignored.

        progress: share of the training that is over. pixel_weight: a factor for each pixel, of the label's shape.
        features: (B, D, h, w), what the classifier read, for the terms that ask for it. small: the logits (B, K, h, w)
        as the network gave them, for the terms that are `at: network`; else `logits` are.
        """
        adjusted = self.adjust(logits, label, progress)
        loss = self.mean_of(adjusted, label, progress, pixel_weight, logits)
        if not self.sets:
            return loss

        small = logits if small is None else small
        return loss + self.set_terms(
            small, label, features, large=logits, pixel_weight=pixel_weight
        )

    def upsampled(
        self,
        logits: Tensor,
        label: Tensor,
        *,
        align_corners: bool,
        progress: float = 0.0,
        pixel_weight: Tensor | None = None,
        features: Tensor | None = None,
    ) -> Tensor:
        """The same of logits (B, K, h, w) at the network's stride, enlarged to the label.

        Where it can be, it is fused, and nothing is kept at full size. Else one image is enlarged at a time, or the
        whole batch where remedies or weights of pixels ask for it. features: those of `forward`.
        """
        weighted = pixel_weight is not None and not self.fuses(logits, label, align_corners)
        if self.needs_whole_batch or weighted:
            large = F.interpolate(
                logits.float(), label.shape[-2:], mode="bilinear", align_corners=align_corners
            )
            return self(
                large,
                label,
                progress=progress,
                pixel_weight=pixel_weight,
                features=features,
                small=logits,
            )

        total = self.upsampled_total(
            logits,
            label,
            align_corners=align_corners,
            progress=progress,
            pixel_weight=pixel_weight,
        )
        loss = total / self.divisor(label)
        return loss + self.set_terms(logits, label, features) if self.sets else loss

    def enlarged(
        self,
        logits: Tensor,
        label: Tensor,
        *,
        align_corners: bool,
        progress: float = 0.0,
        features: Tensor | None = None,
    ) -> Tensor:
        """The same, for methods that enlarge a whole batch where it is not fused, in the precision of the logits."""
        if self.fuses(logits, label, align_corners):
            return self.upsampled(logits, label, align_corners=align_corners, progress=progress)

        large = F.interpolate(
            logits, label.shape[-2:], mode="bilinear", align_corners=align_corners
        )
        return self(large, label, progress=progress, features=features, small=logits)

    def upsampled_total(
        self,
        logits: Tensor,
        label: Tensor,
        *,
        align_corners: bool,
        progress: float = 0.0,
        pixel_weight: Tensor | None = None,
    ) -> Tensor:
        """Sum of the pixels' losses of logits at the network's stride, fused or one image at a time; weights of pixels
        only where it is fused."""
        if not self.fuses(logits, label, align_corners):
            total_of_image = partial(self.total, progress=progress)
            return upsampled_sum(logits, label, total_of_image, align_corners=align_corners)

        change = None
        if isinstance(self.logits, AdditiveRemedy):
            change = self.logits.change(self.offsets, progress)

        return upsampled_loss(
            logits,
            label,
            align_corners=align_corners,
            change=change,
            class_weight=self.weight(progress),
            pixel_weight=pixel_weight,
        )

    def fuses(self, logits: Tensor, label: Tensor, align_corners: bool) -> bool:
        """Whether the pixel loss of these logits is one fused operation: remedies that only add to logits and weigh
        classes, without terms over regions, on a device that has the kernels."""
        additive = self.logits is None or isinstance(self.logits, AdditiveRemedy)
        if self.focus is not None or self.sets or not additive:
            return False
        return fuses(logits, size_of(label), align_corners)

    @property
    def needs_whole_batch(self) -> bool:
        """Whether the loss can only be made of the logits of all images at label size."""
        if isinstance(self.focus, HardPixels):
            return True
        return any(term.at == "label" for term in self.sets)

    @property
    def hardest_fraction(self) -> float | None:
        """The share of pixels, the hardest, over which the loss is a mean; None where it is anything else."""
        others = (self.logits, self.class_weight, *self.sets)
        if any(remedy is not None for remedy in others):
            return None
        if not isinstance(self.focus, HardPixels) or self.focus.threshold is not None:
            return None

        return self.focus.fraction

    def total(self, logits: Tensor, label: Tensor, progress: float = 0.0) -> Tensor:
        """Sum of the pixels' losses."""
        return self.total_of(self.adjust(logits, label, progress), label, progress)

    def mean_of(
        self,
        adjusted: Tensor,
        label: Tensor,
        progress: float,
        pixel_weight: Tensor | None = None,
        logits: Tensor | None = None,
    ) -> Tensor:
        """The pixel loss of logits that `adjust` has been through. logits: those before, by which hard pixels are
        chosen; else `adjusted` are."""
        if not isinstance(self.focus, HardPixels):
            return self.total_of(adjusted, label, progress, pixel_weight) / self.divisor(label)

        losses = self.each_of(adjusted, label, progress, pixel_weight)
        changed = (
            self.logits is not None
            or pixel_weight is not None
            or self.weight(progress) is not None
        )
        by = losses
        if changed and self.focus.choose == "clean":
            plain = adjusted if logits is None else logits
            by = F.cross_entropy(
                plain.detach().float(), label.long(), ignore_index=IGNORE, reduction="none"
            )

        return self.focus.mean(losses, label != IGNORE, by)

    def total_of(
        self,
        adjusted: Tensor,
        label: Tensor,
        progress: float,
        pixel_weight: Tensor | None = None,
    ) -> Tensor:
        """The sum of `each_of`."""
        if self.focus is not None or pixel_weight is not None:
            return self.each_of(adjusted, label, progress, pixel_weight).sum()
        weight = self.weight(progress)
        return F.cross_entropy(
            adjusted, label.long(), weight, ignore_index=IGNORE, reduction="sum"
        )

    def each_of(
        self,
        adjusted: Tensor,
        label: Tensor,
        progress: float,
        pixel_weight: Tensor | None = None,
    ) -> Tensor:
        """Losses of the pixels, (B, H, W); 0 where ignored."""
        label = label.long()
        loss = F.cross_entropy(adjusted, label, ignore_index=IGNORE, reduction="none")

        if self.focus is not None and not isinstance(self.focus, HardPixels):
            loss = self.focus(loss, adjusted, label)

        weight = self.weight(progress)
        if weight is not None:
            loss = loss * weight[label.clamp(min=0)]

        return loss if pixel_weight is None else loss * pixel_weight

    def adjust(self, logits: Tensor, label: Tensor, progress: float = 0.0) -> Tensor:
        """z' (B, K, …) in float32: what any loss of these logits has to be made of."""
        if self.logits is None:
            return logits.float()

        self._see(label)
        return self.logits(logits, label, self.offsets, progress)

    def with_prior(self, logits: Tensor) -> Tensor:
        """Logits (B, K, h, w) that pseudo-labels are made of: with τ ln π added back where the config asks for it, as
        they are elsewhere."""
        return logits + self.offsets.view(-1, 1, 1) if self.pseudo_prior else logits

    def weight(self, progress: float) -> Tensor | None:
        """Class weights (K,) in force."""
        if self.class_weight is None or progress < self.class_weight.start:
            return None
        return self.weights

    def divisor(self, label: Tensor) -> Tensor | int:
        """What the sum over the pixels of a label map is divided by."""
        if self.average == "all":
            return label.numel()
        return (label != IGNORE).sum().clamp(min=1)

    def set_terms(
        self,
        logits: Tensor,
        label: Tensor,
        features: Tensor | None = None,
        *,
        large: Tensor | None = None,
        pixel_weight: Tensor | None = None,
    ) -> Tensor:
        """Σ weight · term of the network's logits (B, K, h, w) and label (B, H, W); features: those of `forward`.

        large: (B, K, H, W), for terms at label size; else `logits` have that size. pixel_weight: (B, H, W); where it is
        0, the terms see no label, and their sum is multiplied by the mean weight of the other pixels.
        """
        share: Tensor | float = 1.0
        if pixel_weight is not None:
            label = torch.where(pixel_weight > 0, label, IGNORE)
            seen = label != IGNORE
            share = (pixel_weight * seen).sum() / seen.sum().clamp(min=1)

        values = []
        for term in self.sets:
            if isinstance(term, RegionTerm):
                value = term(self._given(features), label)
            elif term.at == "network":
                value = term(logits, thinned(label, size_of(logits)))
            else:
                value = term(logits if large is None else large, label)
            values.append(term.weight * value)

        return share * torch.stack(values).sum()

    @staticmethod
    def _given(features: Tensor | None) -> Tensor:
        if features is None:
            raise ValueError(
                "region: the method gives the loss no features of the classifier's"
            )
        return features

    def untouched(self) -> Tensor | float:
        """0 that reaches every weight of the loss, for the last part of a step if it has no such term (DDP)."""
        return sum((0.0 * parameter.sum() for parameter in self.parameters()), 0.0)

    # Counts ----------------------------------------------------------------------------------------------------------

    def count(self, label: Tensor, area: Tensor | float = 1.0) -> None:
        """Remember pseudo-labels (B, …) for the next refresh; each stands for `area` pixels, see `RefreshedCounts`."""
        self.counts.count(label, area)

    def after_step(self, step: int) -> None:
        """Refresh the counts where it is time to."""
        if self.counts.after_step(step):
            self._apply_counts()
