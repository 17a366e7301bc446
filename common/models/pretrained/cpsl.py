"""CPSL (and ProDA) checkpoints: a container per network, beside prototypes, iteration and best score.

    {"ResNet101": {"model_state": …, "prototypes_ema": (C, D)}, "FCDiscriminator": {"model_state": …}, "iter": …,
     "best_iou": NumPy float64}

The discriminator is there after the warm-up alone. The tensors of the network carry our names.
"""

import logging
import re
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor, nn

from common.files import read_artifact
from common.models.pretrained.containers import (
    read,
    read_weights,
    short,
    state_dict,
    strip_module,
    tensors,
)

NETWORK = "ResNet101"
DISCRIMINATOR = "FCDiscriminator"
EXTRA_NORM = "bn_pretrain."
MARK = "layer5.conv2d_list.0.0.weight"  # a tensor that only this head has
COUNTER = "num_batches_tracked"


class Extras(NamedTuple):
    """What an official checkpoint holds beside the network."""

    prototypes: (
        Tensor | None
    )  # (C, D) float32; None where the file has none, or zeros (all stages but the first)
    discriminator: dict[str, Tensor] | None  # in the order of the file
    iteration: int | None


def matches(raw: Mapping[str, Any]) -> bool:
    """Whether `raw` (what a file holds) is such a checkpoint, or the bare state dict of its network."""
    return NETWORK in raw or MARK in _network(raw)


def convert(raw: Mapping[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """The network's tensors. Raises ValueError, naming the option, where file and model differ in the extra norm."""
    state = tensors(_network(raw))
    theirs = any(name.startswith(EXTRA_NORM) for name in state)
    ours = any(name.startswith(EXTRA_NORM) for name in model.state_dict())
    if theirs != ours:
        has, lacks = ("the file", "the model") if theirs else ("the model", "the file")
        raise ValueError(
            f"{has} has the batch norm `bn_pretrain` after the backbone, {lacks} has not; "
            f"set model.options.extra_norm={str(theirs).lower()}"
        )

    return state


def _network(raw: Mapping[str, Any]) -> dict[str, Any]:
    part = raw.get(NETWORK, raw)
    if isinstance(part, Mapping) and isinstance(part.get("model_state"), Mapping):
        return {strip_module(str(name)): value for name, value in part["model_state"].items()}
    return state_dict(part) if isinstance(part, Mapping) else {}


def has_extra_norm(path: str | Path, prefix: str | None = None) -> bool:
    """Whether a checkpoint's network has the batch norm between backbone and head: found from the names of its tensors.

    path: a file of the release, or ours, of a network or a method. prefix: the network inside a method's checkpoint;
    None: the one that predicts. Raises FileNotFoundError or ValueError.
    """
    raw, metadata = read(path)
    prefix = metadata.get("predict_prefix", "") if prefix is None else prefix
    return any(name.startswith(prefix + EXTRA_NORM) for name in _network(raw))


def read_extras(path: str | Path) -> Extras:
    """Prototypes, discriminator and iteration of an official checkpoint. Raises FileNotFoundError or ValueError."""
    raw, _ = read(path)
    return read_artifact(path, lambda _: _extras(raw))


def _extras(raw: Mapping[str, Any]) -> Extras:
    if not isinstance(raw.get(NETWORK), Mapping):
        raise ValueError(f"not a checkpoint of CPSL (no entry {NETWORK!r})")

    prototypes = raw[NETWORK].get("prototypes_ema", raw[NETWORK].get("objective_vectors"))
    prototypes = (
        prototypes.detach().float()
        if isinstance(prototypes, Tensor) and prototypes.any()
        else None
    )
    discriminator = raw.get(DISCRIMINATOR)
    iteration = raw.get("iter")
    if isinstance(discriminator, Mapping):
        discriminator = tensors(
            {strip_module(n): t for n, t in discriminator["model_state"].items()}
        )

    return Extras(
        prototypes, discriminator or None, iteration if iteration is None else int(iteration)
    )


def load_initial(
    model: nn.Module, path: str | Path, parts: Iterable[str], keys: Mapping[str, str]
) -> None:
    """Fill the modules `parts` of `model` from the weights of a classifier: ImageNet's or SimCLRv2's ResNet.

    path: a file with torchvision's names, bare or under `state_dict`. keys: regular expression → replacement, applied
    in order to the names of a file that has others. All tensors of `parts` must be there and have their shape; what
    else the file holds is left out, with a warning unless it is the classifier `fc`.
    Raises FileNotFoundError, or ValueError that says what does not fit.
    """
    state = read_weights(path)
    for pattern, replacement in keys.items():
        state = {re.sub(pattern, replacement, name): tensor for name, tensor in state.items()}

    own = {
        name: tensor
        for name, tensor in model.state_dict().items()
        if name.split(".")[0] in tuple(parts)
    }
    missing = [name for name in own if name not in state and not name.endswith(COUNTER)]
    shapes = [name for name in own if name in state and state[name].shape != own[name].shape]
    if missing or shapes:
        problem = (
            f"missing: {short(missing)}" if missing else f"of another shape: {short(shapes)}"
        )
        raise ValueError(
            f"{path}: does not fit the backbone. {problem}; the file's names begin {short(state, 2)} "
            "(model.options.pretrained_keys maps them)"
        )

    extra = [name for name in state if name not in own and not name.startswith("fc.")]
    if extra:
        warnings.warn(
            f"{path}: not part of the backbone, left out: {short(extra)}", stacklevel=2
        )

    logging.getLogger(__name__).info("%s: %d tensors of the backbone loaded", path, len(own))
    model.load_state_dict({name: state[name] for name in own if name in state}, strict=False)
