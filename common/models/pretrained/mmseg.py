"""MMSegmentation 0.x and 1.x checkpoints: `backbone.`, `neck.`, `decode_head.`, `auxiliary_head.`.

Most modules carry the official names. For the others `NAMES` holds a function by the module's `family`:
(official names relative to the module → tensors, the module) → our names → tensors.
"""

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from common.models.pretrained.containers import state_dict, tensors
from common.models.pretrained.transformers import (
    DEEPLABV2_RULES,
    HRDA_RULES,
    KNET_RULES,
    NECK_RULES,
    mit,
    renamed,
    swin,
    vit,
)

Renaming = Callable[[Mapping[str, Tensor], nn.Module], dict[str, Tensor]]

STEM = {
    "stem.0": "conv1.0",
    "stem.1": "conv1.1",
    "stem.3": "conv1.3",
    "stem.4": "conv1.4",
    "stem.6": "conv1.6",
}
STEM["stem.7"] = "bn1"


def resnet(state: Mapping[str, Tensor], backbone: nn.Module) -> dict[str, Tensor]:
    """The deep stem is one sequence there; all else has timm's (and torchvision's) names."""
    renamed = {}
    for name, tensor in state.items():
        layer, _, leaf = name.rpartition(".")
        renamed[f"{STEM.get(layer, layer)}.{leaf}"] = tensor

    return renamed


NAMES: dict[str, Renaming] = {
    "resnet": resnet,
    "mit": mit,
    "swin": swin,
    "vit": vit,
    "mln": renamed(NECK_RULES),
    "knet": renamed(KNET_RULES),
    "deeplabv2_reduced": renamed(DEEPLABV2_RULES),
    "hrda": renamed(HRDA_RULES),
}


def matches(raw: Mapping[str, Any]) -> bool:
    """Whether `raw` (what a file holds) is a segmentor of MMSegmentation."""
    names = state_dict(raw)
    return all(
        any(name.startswith(part) for name in names) for part in ("backbone.", "decode_head.")
    )


def convert(raw: Mapping[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """The file's tensors under the names of `model`."""
    parts: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors(state_dict(raw)).items():
        part, _, inner = name.partition(".")
        parts.setdefault(part, {})[inner] = tensor

    converted = {}

    for part, state in parts.items():
        module = getattr(model, part, None)
        rename = NAMES.get(getattr(module, "family", ""))
        state = rename(state, module) if rename else state
        converted |= {f"{part}.{name}": tensor for name, tensor in state.items()}

    return converted
