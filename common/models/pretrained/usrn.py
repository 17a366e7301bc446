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

    Raises ValueError where the model has a subclass branch and the file does not, unless the model's `copy_branch`
    says that the file's one branch is the start of both.
    """
    state = tensors(state_dict(raw))
    branch = [name for name in state if name.startswith(SUBCLASS_BRANCH)]
    own = model.state_dict()
    wanted = [name for name in own if name.startswith(SUBCLASS_BRANCH)]
    if wanted and not branch:
        if not getattr(model, "copy_branch", False):
            raise ValueError(
                "no subclass branch in the file; set model.name to deeplabv3plus, take a USRN checkpoint, or set "
                "model.options.copy_branch=true to start both branches from the one"
            )
        return state | _second_branch(state, own, wanted)

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


def _second_branch(
    state: Mapping[str, Tensor], own: Mapping[str, Tensor], wanted: list[str]
) -> dict[str, Tensor]:
    """The tensors of the second branch as copies of the first; its classifier, of other classes, is the model's own."""
    first = {name: name.replace("_aux.", ".").replace("_SubCls.", ".") for name in wanted}
    return {
        name: own[name] if name.startswith("classifier_SubCls.") else state[source]
        for name, source in first.items()
    }
