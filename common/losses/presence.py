"""Which pixels are of which class, laid out as the losses over whole regions need it."""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from common.data import IGNORE
from common.ops.resize import Size

# where a term over regions is made: at the label's size, or at the network's stride
At = Literal["label", "network"]


def one_hot(label: Tensor, classes: int) -> tuple[Tensor, Tensor]:
    """Of a label map (B, H, W): 1[y = k], float32 (K, N) over its N pixels, and which are labelled, bool (N,)."""
    flat = label.flatten().long()
    valid = flat != IGNORE
    index = torch.arange(classes, device=label.device)
    return (flat == index[:, None]).float(), valid


def thinned(label: Tensor, size: Size) -> Tensor:
    """A label map (B, H, W) at a smaller size: the nearest pixel of each cell."""
    if label.shape[-2:] == size:
        return label.long()
    return F.interpolate(label[:, None].float(), size, mode="nearest-exact")[:, 0].long()
