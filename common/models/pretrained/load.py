"""`load_weights`: any checkpoint that fits, into a whole model."""

import warnings
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn

from common.models.pretrained import cpsl, detectron2, mmseg, usrn
from common.models.pretrained.containers import read, short, state_dict, tensors

# Each reader has matches(raw) -> bool and convert(raw, model) -> {our name: tensor}; the first that matches is taken.
READERS = (mmseg, cpsl, usrn, detectron2)


def load_weights(
    model: nn.Module, path: str | Path, *, reset_classifier: bool = False, prefix: str | None = None
) -> None:
    """Fill `model` from `path`, recognised by content: our safetensors files and checkpoint folders (of a method, too:
    the network that predicts), MMSegmentation 0.x/1.x, and what the other readers know.

    Every tensor must be there and have its shape. `reset_classifier` keeps the model's own classifier where the file
    was trained on another number of classes. `prefix` names another network of a method's checkpoint, e.g. "teacher.".
    Raises FileNotFoundError, or ValueError that says what does not fit.
    """
    raw, metadata = read(path)
    try:
        raw = _predicting(raw, metadata.get("predict_prefix", "") if prefix is None else prefix)
        reader = None if _ours(raw, model) else next((reader for reader in READERS if reader.matches(raw)), None)
        state = tensors(state_dict(raw)) if reader is None else reader.convert(raw, model)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    state = _fit(state, model, path, reset_classifier)
    model.load_state_dict(state, strict=False)


def _predicting(raw: Mapping, prefix: str) -> Mapping:
    """What a file holds; of a method's checkpoint, the network that predicts, whose names begin with `prefix`."""
    return {n.removeprefix(prefix): value for n, value in raw.items() if n.startswith(prefix)} if prefix else raw


def _ours(raw: Mapping, model: nn.Module) -> bool:
    """Whether a file has the model's own names, and no others."""
    return all(name.endswith(COUNTER) for name in state_dict(raw).keys() ^ model.state_dict().keys())


COUNTER = "num_batches_tracked"  # absent from old files, and of no use where BN has a momentum


def _fit(state: dict[str, Tensor], model: nn.Module, path: str | Path, reset_classifier: bool) -> dict[str, Tensor]:
    """`state` without classifiers of another size; ValueError where anything else does not fit `model`."""
    own = model.state_dict()
    missing = [name for name in own if name not in state and not name.endswith(COUNTER)]
    extra = [name for name in state if name not in own]
    other = [name for name in state if name in own and state[name].shape != own[name].shape]
    heads = [name for name in other if _is_classifier(name, model)]
    if missing or extra or len(heads) < len(other):
        shapes = [f"{n} {tuple(state[n].shape)} for {tuple(own[n].shape)}" for n in other if n not in heads]
        parts = (("missing", missing), ("not in the model", extra), ("of another shape", shapes))
        lists = "; ".join(f"{title}: {short(names)}" for title, names in parts if names)
        raise ValueError(f"{path}: does not fit this model. {lists}")
    if not heads:
        return state
    theirs = model.num_classes + state[heads[0]].shape[0] - own[heads[0]].shape[0]
    if not reset_classifier:
        raise ValueError(
            f"{path}: trained on {theirs} classes, the model has {model.num_classes}; set model.num_classes, or "
            "reset_classifier to start with a new classifier"
        )
    warnings.warn(f"{path}: classifier of {theirs} classes left out ({short(heads)})", stacklevel=3)
    return {name: tensor for name, tensor in state.items() if name not in heads}


def _is_classifier(name: str, model: nn.Module) -> bool:
    return any(name == head or name.startswith(f"{head}.") for head in getattr(model, "classifiers", ()))
