"""A network that no step changes, and that no checkpoint holds: it is made anew from the file it comes from."""

from typing import Any

from torch import Tensor, nn


class Frozen(nn.Module):
    """`net` in evaluation mode whatever the mode of the modules around it, without gradients, without a state."""

    def __init__(self, net: nn.Module):
        super().__init__()
        self.net = net.requires_grad_(False).eval()
        self.register_load_state_dict_pre_hook(_keep)

    def forward(self, *inputs: Tensor) -> Any:
        return self.net(*inputs)

    def train(self, mode: bool = True) -> "Frozen":
        return super().train(False)

    def state_dict(
        self, *args: Any, destination: dict[str, Any] | None = None, **options: Any
    ) -> dict[str, Any]:
        """Nothing: the state that was given, as it was."""
        return {} if destination is None else destination


def _keep(module: Frozen, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """A state dict says nothing of the network, which is no fault of it: it keeps its tensors."""
    state.update(
        {f"{prefix}net.{name}": tensor for name, tensor in module.net.state_dict().items()}
    )
