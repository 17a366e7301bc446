"""Class counts for BLV where most labels are the network's own: labelled pixels plus recent pseudo-labels."""

import torch
import torch.distributed as dist
from torch import Tensor, nn

from common.losses.blv import BLVLoss


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
