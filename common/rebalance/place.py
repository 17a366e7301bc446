"""Where a network's classifier is: the one module whose output the network's logits are."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from common.config import ConfigError, ModelConfig
from common.models import SegmentationModel, build_model

SIDE = 256  # of the image that is looked at; nothing is computed for it


def find_classifier(config: ModelConfig, where: str) -> str:
    """The name of the module that gives the logits (B, K, h, w) of features (B, D, h, w), pixel by pixel.

    ConfigError, which begins with `where`, for networks whose logits are made of more than that: several scales, a sum
    of dilated convolutions, queries, kernels that pixels refine.
    """
    found = seek_classifier(config)
    if found is None:
        raise ConfigError(
            f"{where}: model.name: {config.name!r}: its logits are not those of one 1×1 classifier, which is all that "
            "this changes after training; take logit_adjustment, which any network takes, or train with a remedy"
        )

    return found


def seek_classifier(config: ModelConfig) -> str | None:
    """As `find_classifier`; None for other networks."""
    with torch.device("meta"):
        network = build_model(replace(config, pretrained=False, checkpoint=None)).eval()
        return last_module(network, torch.empty(1, 3, SIDE, SIDE))


def last_module(network: SegmentationModel, images: Tensor) -> str | None:
    """The name of the classifier whose output is the network's, None where that is none's."""
    logits, outputs = _passed(network, images)
    return next((name for name, output in outputs.items() if output is logits), None)


def other_classifiers(config: ModelConfig) -> list[str]:
    """The names of the classifiers that take part in a prediction, without the one whose output is the network's."""
    with torch.device("meta"):
        network = build_model(replace(config, pretrained=False, checkpoint=None)).eval()
        logits, outputs = _passed(network, torch.empty(1, 3, SIDE, SIDE))

    return [name for name, output in outputs.items() if output is not logits]


@torch.no_grad()
def _passed(network: SegmentationModel, images: Tensor) -> tuple[Any, dict[str, Any]]:
    """The network's logits, and what each of its classifiers that is called gives."""
    outputs: dict[str, Any] = {}
    hooks = []
    for name, module in pointwise(network).items():

        def keep(module: nn.Module, inputs: Any, output: Any, name: str = name) -> None:
            outputs[name] = output

        hooks.append(module.register_forward_hook(keep))

    logits = network.infer(images).get("logits")
    for hook in hooks:
        hook.remove()

    return logits, outputs


def pointwise(network: SegmentationModel) -> dict[str, nn.Module]:
    """The network's classifiers by name, those that see one place of a map at a time."""
    every = dict(network.named_modules())
    found = {name: every[name] for name in network.classifiers if name in every}
    return {
        name: module
        for name, module in found.items()
        if getattr(module, "kernel_size", (1, 1)) == (1, 1)
    }
