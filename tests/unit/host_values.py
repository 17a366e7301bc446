"""What a step on a GPU would wait for: values of the host that become tensors where they are used."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class HostValues(TorchDispatchMode):
    """Counts `torch.tensor`, `as_tensor` and `new_tensor` of numbers and lists, each a copy that the host waits for.

    `full`, `new_full` and operators on a tensor and a number are none: kernels take a number as their argument.
    """

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        self.count += operator is torch.ops.aten.lift_fresh.default
        return operator(*args, **(kwargs or {}))
