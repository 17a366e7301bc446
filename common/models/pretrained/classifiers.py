"""Weights of timm's classifiers for a network that is built from them, checked to the last tensor."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from common.lazy import Lazy
from common.models.pretrained.containers import find_weights, read_weights
from common.models.pretrained.timm import check_host

timm = Lazy("timm")

COUNTER = "num_batches_tracked"


def classifier_weights(
    name: str, source: bool | str, options: Mapping[str, Any]
) -> dict[str, Tensor]:
    """The tensors of timm's model `name`, made with `options`, under timm's names.

    source: True, timm's own from the hub; or what `find_weights` finds: a file with weights of the classifier, for any
    number of classes, under timm's names, in timm's order, or in a form that timm itself converts.
    Raises ValueError for weights that cannot be had, or lack a tensor, or have one too many or of another shape.
    """
    if source is True:
        return _fetched(name, options)

    path = find_weights(str(source))
    state = _in_order(read_weights(path), name)

    problems = []

    for classes in _possible_classes(name, state):
        # With the number of classes that the weights claim to have, timm takes them to the last tensor or not at all.
        overlay = {"state_dict": dict(state), "num_classes": classes}
        try:
            return _loaded(name, {**options, "num_classes": classes}, overlay)
        except Exception as error:  # whatever the conversion of a foreign file runs into
            problems.append(error)

    raise ValueError(
        f"{path}: does not fit timm:{name} ({_reason(problems[0])})"
    ) from problems[0]


def _fetched(name: str, options: Mapping[str, Any]) -> dict[str, Tensor]:
    try:
        check_host(name)
        return _loaded(name, options, {})
    except Exception as error:  # whatever the download library of the day raises
        raise ValueError(
            f"model.pretrained: cannot fetch timm:{name} ({_reason(error)}); without network, set it to a file with "
            "these weights, or to false"
        ) from error


def _loaded(
    name: str, options: Mapping[str, Any], overlay: Mapping[str, Any]
) -> dict[str, Tensor]:
    return timm.create_model(
        name, pretrained=True, pretrained_cfg_overlay=dict(overlay), **options
    ).state_dict()


def _possible_classes(name: str, state: Mapping[str, Tensor]) -> list[int]:
    """How many classes the classifier may have: as its tensor says, as timm's own, or none (a backbone alone)."""
    config = timm.get_pretrained_cfg(name) or timm.models.PretrainedCfg()
    classifier = config.classifier if isinstance(config.classifier, str) else ""
    weight = state.get(f"{classifier}.weight")
    found = [] if weight is None else [len(weight)]

    return list(dict.fromkeys([*found, config.num_classes, 0]))


def _in_order(state: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    """`state` under timm's names where it has all tensors of the classifier in timm's order and shapes."""
    with torch.device("meta"):
        own = timm.create_model(name).state_dict()

    theirs = {key: value for key, value in state.items() if not key.endswith(COUNTER)}
    ours = {key: value for key, value in own.items() if not key.endswith(COUNTER)}
    if theirs.keys() == ours.keys():
        return state

    shapes = [value.shape for value in theirs.values()]
    if shapes != [value.shape for value in ours.values()]:
        return state
    return dict(zip(ours, theirs.values(), strict=True))


def _reason(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}"[:300]
