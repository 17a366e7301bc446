"""Class counts for BLV where most labels are the network's own: labelled pixels plus recent pseudo-labels."""

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from common.losses.blv import BLVLoss, blv_options


class RefreshedBLV(nn.Module):
    """A BLV loss whose counts q are the labelled ones until the first refresh, then labelled + pseudo-labelled.

    `count` adds the pseudo-labels of all ranks to a running sum; `refresh` puts it in force and starts a new one
    (BLV's supplement: frequencies of unlabelled data are estimated by pseudo-labels and refreshed). The counts are
    part of the state dict, so a resumed run has the same weights.
    """

    def __init__(self, blv: BLVLoss, labelled: Tensor):
        """labelled: (K,) pixels of each class in the labelled set."""
        super().__init__()
        self.blv = blv
        labelled = torch.as_tensor(labelled, dtype=torch.float64)
        self.register_buffer("labelled", labelled, persistent=False)
        self.register_buffer("running", torch.zeros_like(labelled))
        self.register_buffer("pseudo", torch.zeros_like(labelled))
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
        self.blv.set_counts(self.labelled + self.pseudo)


class StudentLogits(nn.Module):
    """A student's class logits on their way into a loss: as they are, or with BLV's noise.

    blv: the config's BLV options, and `refresh`: after that many steps pseudo-labels count beside labels (0: never);
    None: no noise. counts: (K,) labelled pixels of each class, which only BLV needs. where: begins a ConfigError.
    """

    def __init__(self, blv: Mapping[str, Any] | None, counts: Any, where: str):
        super().__init__()
        self.blv, self.refreshed, self.every = None, None, 0
        if blv is None:
            return
        options = dict(blv)
        self.every = options.pop("refresh", 0)
        self.blv = BLVLoss(blv_options(options, where), counts)
        if self.every:
            self.refreshed = RefreshedBLV(self.blv, torch.as_tensor(counts))

    def perturb(self, logits: Tensor, progress: float) -> Tensor:
        """Logits (B, K, H, W) with noise; `progress`: share of the training that is over."""
        return logits if self.blv is None else self.blv.perturb(logits, progress)

    def count(self, label: Tensor, area: float = 1.0) -> None:
        """Remember pseudo-labels for the next refresh; each stands for `area` pixels."""
        if self.refreshed is not None:
            self.refreshed.count(label, area)

    def after_step(self, step: int) -> None:
        if self.refreshed is not None and (step + 1) % self.every == 0:
            self.refreshed.refresh()
