"""UniMatch checkpoints: `{"model", "optimizer", "epoch", "previous_best"}`, names behind `module.`, the best score a
NumPy scalar; V2 adds `model_ema`, the moving average whose scores its tables show, which is what is read."""

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from common.models.pretrained.containers import state_dict, tensors

EMA = "model_ema"
# of V1's DeepLabV3+, of V2's DPT head
MARKS = ("head.b0.0.weight", "head.scratch.layer1_rn.weight")
NORM = {"0": "conv", "1": "norm"}
LEVEL = {"1": "level", "2": "refine"}

RENAMED = (  # their names → ours, the first that matches
    (r"head\.b([0-3])\.([01])\.", lambda m: f"aspp.branches.{m[1]}.{NORM[m[2]]}."),
    (r"head\.b4\.gap\.([12])\.", lambda m: f"aspp.pool.{NORM[str(int(m[1]) - 1)]}."),
    (r"head\.project\.([01])\.", lambda m: f"aspp.project.{NORM[m[1]]}."),
    (r"reduce\.([01])\.", lambda m: f"lateral.{NORM[m[1]]}."),
    (r"fuse\.([0134])\.", lambda m: f"fuse.{int(m[1]) // 3}.{NORM[str(int(m[1]) % 3)]}."),
    (r"classifier\.", lambda m: "predictor."),
    (r"head\.projects\.", lambda m: "decode_head.projects."),
    (r"head\.resize_layers\.", lambda m: "decode_head.resizes."),
    (r"head\.scratch\.layer([1-4])_rn\.", lambda m: f"decode_head.narrow.{int(m[1]) - 1}."),
    (
        r"head\.scratch\.refinenet([1-4])\.out_conv\.",
        lambda m: f"decode_head.fusions.{int(m[1]) - 1}.project.",
    ),
    (
        r"head\.scratch\.refinenet([1-4])\.resConfUnit([12])\.",
        lambda m: f"decode_head.fusions.{int(m[1]) - 1}.{LEVEL[m[2]]}.",
    ),
    (r"head\.scratch\.output_conv\.0\.", lambda m: "decode_head.conv_out."),
    (r"head\.scratch\.output_conv\.2\.", lambda m: "decode_head.conv_seg."),
)
# by the release's forward pass, too
UNUSED = ("backbone.mask_token", "head.scratch.refinenet4.resConfUnit1.")


def matches(raw: Mapping[str, Any]) -> bool:
    """Whether `raw` (what a file holds) is a network of UniMatch or UniMatch V2, in its container or bare."""
    names = _network(raw)
    return any(mark in names for mark in MARKS)


def convert(raw: Mapping[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """The file's tensors under our names; V2's moving average where the file holds both networks."""
    state = tensors(_network(raw))
    return {ours(name): tensor for name, tensor in state.items() if not name.startswith(UNUSED)}


def ours(name: str) -> str:
    """Our name of the release's tensor `name`."""
    for pattern, rename in RENAMED:
        match = re.match(pattern, name)
        if match:
            return rename(match) + name[match.end() :]

    return name


def _network(raw: Mapping[str, Any]) -> dict[str, Any]:
    average = raw.get(EMA)
    return state_dict({"model": average} if isinstance(average, Mapping) else raw)
