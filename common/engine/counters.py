"""The counters of batch norm: torch adds one in every call of every layer, here all are counted once a step."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

COUNTER = "num_batches_tracked"


class BatchCounters:
    """`num_batches_tracked` of a method's norms.

    A norm with a momentum never reads its counter, yet each count is a kernel that the GPU is started for, one a layer
    and pass. So counters are taken out of the norms while a step runs, and then one is added to all of them together:
    they count steps, whatever the number of passes in one. Only what learns counts; `move_average` gives a teacher the
    student's counters, or leaves them as they were. Norms without momentum and SyncBatchNorm need theirs and keep them.
    """

    def __init__(self, method: nn.Module):
        self.norms = [module for module in method.modules() if _is_countable(module)]
        learning = [part for part in method.children() if _learns(part)]
        inside = {id(module) for part in learning for module in part.modules()}
        self.learning = {id(norm) for norm in self.norms if id(norm) in inside}

    @contextmanager
    def held(self) -> Iterator[None]:
        """Around the passes of one step, which moves running statistics and leaves the counters to us."""
        counters: list[Tensor] = []
        for norm in self.norms:
            counters.append(norm._buffers[COUNTER])  # type: ignore[arg-type]
            # as __setattr__ does, which takes longer than the kernel that is saved
            norm._buffers[COUNTER] = None

        try:
            yield
        finally:
            for norm, counter in zip(self.norms, counters, strict=True):
                norm._buffers[COUNTER] = counter

        moved = [
            counter
            for norm, counter in zip(self.norms, counters, strict=True)
            if norm.training and id(norm) in self.learning
        ]
        if moved:
            torch._foreach_add_(moved, 1)


def _is_countable(module: nn.Module) -> bool:
    return (
        isinstance(module, _NormBase)
        and not isinstance(module, nn.SyncBatchNorm)
        and module.momentum is not None
        and module.num_batches_tracked is not None
    )


def _learns(module: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters())
