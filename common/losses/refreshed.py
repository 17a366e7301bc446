"""Class counts for BLV where most labels are the network's own: labelled pixels plus recent pseudo-labels."""

from collections.abc import Mapping
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from common.config import ConfigError, shown
from common.data import IGNORE
from common.losses.blv import BLVLoss, blv_options

Unit = Literal["pixels", "shares"]


class RefreshedBLV(nn.Module):
    """A BLV loss whose counts q are its own until the first refresh, then its own plus those of pseudo-labels.

    `count` adds the pseudo-labels of all ranks to a running sum; `refresh` puts it in force and starts a new one
    (BLV's supplement: frequencies of unlabelled data are estimated by pseudo-labels and refreshed). The counts are
    part of the state dict, so a resumed run has the same weights.

    unit: how pseudo-labels are added. `pixels`: as many as were counted, where they come from the same data as the
    labels and a refresh follows a whole pass over them (semi-supervised). `shares`: their class shares times the
    number of labelled pixels, so that two domains weigh alike (domain adaptation; the paper does not say how they are
    weighed, and as pixels the few of some steps would vanish beside the source's).
    """

    def __init__(self, blv: BLVLoss, unit: Unit = "pixels"):
        super().__init__()
        self.blv, self.unit = blv, unit
        self.register_buffer("labelled", blv.counts.clone(), persistent=False)
        self.register_buffer("running", torch.zeros_like(self.labelled))
        self.register_buffer("pseudo", torch.zeros_like(self.labelled))
        self.register_load_state_dict_post_hook(lambda module, _: module._apply_counts())

    @torch.no_grad()
    def count(self, label: Tensor, area: float = 1.0) -> None:
        """Add pseudo-labels (any shape, −1 ignored), each for `area` pixels, on all ranks the same."""
        classes = label.reshape(-1).long() + 1
        counts = self.running.new_zeros(len(self.running) + 1)
        counts.index_add_(0, classes, torch.ones_like(classes, dtype=counts.dtype))
        if dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(counts)
        self.running += counts[1:] * area

    @torch.no_grad()
    def refresh(self) -> None:
        """Use what was counted since the last refresh."""
        self.pseudo.copy_(self.running)
        self.running.zero_()
        self._apply_counts()

    def _apply_counts(self) -> None:
        pseudo = self.pseudo
        if self.unit == "shares":
            pseudo = pseudo * (self.labelled.sum() / pseudo.sum().clamp(min=1))
        self.blv.set_counts(self.labelled + pseudo)


class StudentLogits(nn.Module):
    """A student's class logits on their way into a loss: as they are, or with BLV's noise.

    blv: the config's BLV options, and `refresh`: after that many steps pseudo-labels count beside labels (0: never);
    None: no noise. counts: (K,) labelled pixels of each class, which only BLV needs. where: begins a ConfigError.
    pseudo_labels: how the method's pseudo-labels count (see `RefreshedBLV`); None: it makes none, so `refresh` would
    do nothing and is an error.
    """

    def __init__(self, blv: Mapping[str, Any] | None, counts: Any, where: str, pseudo_labels: Unit | None = "pixels"):
        super().__init__()
        self.blv, self.refreshed, self.every = None, None, 0
        if blv is None:
            return
        options = dict(blv)
        self.every = options.pop("refresh", 0)
        if type(self.every) is not int or self.every < 0:
            raise ConfigError(f"{where}.refresh: {shown(self.every)} is not a number of steps")
        if self.every and pseudo_labels is None:
            raise ConfigError(f"{where}.refresh: {self.every}, but this method makes no pseudo-labels; remove the key")
        self.blv = BLVLoss(blv_options(options, where), counts)
        if self.every:
            self.refreshed = RefreshedBLV(self.blv, pseudo_labels)

    def perturb(self, logits: Tensor, progress: float) -> Tensor:
        """Logits (B, K, H, W) with noise; `progress`: share of the training that is over."""
        return logits if self.blv is None else self.blv.perturb(logits, progress)

    def averaged(self, loss: Tensor, label: Tensor) -> Tensor:
        """`loss`, a mean over the pixels of `label` that are not ignored, as the mean that BLV's `average` asks for."""
        if self.blv is None or self.blv.average == "valid":
            return loss
        return loss * (label != IGNORE).float().mean()

    def count(self, label: Tensor, area: float = 1.0) -> None:
        """Remember pseudo-labels for the next refresh; each stands for `area` pixels."""
        if self.refreshed is not None:
            self.refreshed.count(label, area)

    def after_step(self, step: int) -> None:
        if self.refreshed is not None and (step + 1) % self.every == 0:
            self.refreshed.refresh()
