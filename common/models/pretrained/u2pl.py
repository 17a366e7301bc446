"""U2PL checkpoints: names of its DeepLabV3+ behind `module.`, in a container or bare."""

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from common.models.pretrained.containers import state_dict, tensors

MARK = "decoder.aspp.conv2.0.weight"
NORM = {"0": "conv", "1": "norm"}

RENAMED = (  # their names → ours, the first that matches
    (r"encoder\.", lambda m: "backbone."),
    (r"decoder\.low_conv\.([01])\.", lambda m: f"lateral.{NORM[m[1]]}."),
    (r"decoder\.aspp\.conv1\.([12])\.", lambda m: f"aspp.pool.{NORM[str(int(m[1]) - 1)]}."),
    (
        r"decoder\.aspp\.conv([2-5])\.([01])\.",
        lambda m: f"aspp.branches.{int(m[1]) - 2}.{NORM[m[2]]}.",
    ),
    (r"decoder\.head\.([01])\.", lambda m: f"aspp.project.{NORM[m[1]]}."),
    (
        r"decoder\.classifier\.([0145])\.",
        lambda m: f"fuse.{int(m[1]) // 4}.{NORM[str(int(m[1]) % 4)]}.",
    ),
    (r"decoder\.classifier\.8\.", lambda m: "predictor."),
    (r"auxor\.aux\.([01])\.", lambda m: f"auxiliary_head.0.{NORM[m[1]]}."),
    (r"auxor\.aux\.4\.", lambda m: "auxiliary_head.1."),
)
UNUSED = "decoder.representation."  # what its contrastive loss alone reads
JOINT = "aspp.project.conv.weight"


def matches(raw: Mapping[str, Any]) -> bool:
    """Whether `raw` (what a file holds) is a network of U2PL, in its container or bare."""
    return MARK in state_dict(raw)


def convert(raw: Mapping[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """The file's tensors under our names. Its ASPP has the pooled branch first, ours last. The auxiliary head of a file
    is left out where `model` has none."""
    state = tensors(state_dict(raw))
    found = {
        ours(name): tensor for name, tensor in state.items() if not name.startswith(UNUSED)
    }
    if getattr(model, "auxiliary_head", None) is None:
        found = {k: v for k, v in found.items() if not k.startswith("auxiliary_head.")}

    weight = found.get(JOINT)
    if weight is not None:
        found[JOINT] = torch.roll(weight, -len(weight), 1)

    return found


def ours(name: str) -> str:
    """Our name of the release's tensor `name`."""
    for pattern, rename in RENAMED:
        match = re.match(pattern, name)
        if match:
            return rename(match) + name[match.end() :]

    return name
