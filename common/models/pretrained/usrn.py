"""USRN checkpoints: `{"arch", "epoch", "state_dict", "monitor_best"}`, names behind `module.`, the best score a NumPy
scalar. The tensors carry our names; a file of the network with two branches also fills the one with one branch."""

import logging
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from common.models.pretrained.containers import state_dict, tensors

# tensors that every file has
MARKS = ("encoder.aspp.aspp1.atrous_conv.weight", "classifier.1.weight")
SUBCLASS_BRANCH = (  # what only training with subclasses uses
    "encoder.backbone.layer2_aux.",
    "encoder.backbone.layer3_aux.",
    "encoder.backbone.layer4_aux.",
    "encoder.backbone.net_aux.",  # a network of timm
    "encoder.aspp_SubCls.",
    "encoder.decoder_SubCls.",
    "classifier_SubCls.",
)


def matches(raw: Mapping[str, Any]) -> bool:
    """Whether `raw` (what a file holds) is a DeepLabV3+ of USRN, in its container or bare."""
    names = state_dict(raw)
    return all(mark in names for mark in MARKS)


def convert(raw: Mapping[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """The file's tensors; the subclass branch is left out where `model` has none, and that is logged.

    Raises ValueError where the model has a subclass branch and the file does not.
    """
    state = tensors(state_dict(raw))
    branch = [name for name in state if name.startswith(SUBCLASS_BRANCH)]
    wanted = any(name.startswith(SUBCLASS_BRANCH) for name in model.state_dict())
    if wanted and not branch:
        raise ValueError(
            "no subclass branch in the file; set model.name to deeplabv3plus, or take a USRN checkpoint"
        )

    if branch and not wanted:
        families = [
            family[:-1]
            for family in SUBCLASS_BRANCH
            if any(name.startswith(family) for name in branch)
        ]
        logging.getLogger(__name__).info(
            "USRN checkpoint: unused: %d tensors of %s", len(branch), ", ".join(families)
        )
        state = {name: tensor for name, tensor in state.items() if name not in set(branch)}

    return state
