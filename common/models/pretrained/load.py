"""`load_weights`: any checkpoint that fits, into a whole model."""

import warnings
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn

from common.models.pretrained import cpsl, daformer, detectron2, mmseg, u2pl, unimatch, usrn
from common.models.pretrained.containers import read, short, state_dict, tensors
from common.models.pretrained.timm import fits_backbone

# Each reader has matches(raw) -> bool and convert(raw, model) -> {our name: tensor}; the first that matches is taken.
READERS = (mmseg, cpsl, usrn, unimatch, u2pl, detectron2)


def load_weights(
    model: nn.Module,
    path: str | Path,
    *,
    reset_classifier: bool | None = False,
    prefix: str | None = None,
) -> None:
    """Fill `model` from `path`, recognised by content: our safetensors files and checkpoint folders (of a method, too:
    the network that predicts), MMSegmentation 0.x/1.x, a network of DAFormer's files, and what the other readers know.

    Every tensor must be there and have its shape. `reset_classifier` keeps the model's own classifier where the file
    was trained on another number of classes; None is False where nothing is trained, so that nobody is advised to set
    it. `prefix` names another network of a method's checkpoint, e.g. "teacher.".
    Raises FileNotFoundError, or ValueError that says what does not fit.
    """
    raw, metadata = read(path)
    try:
        if daformer.matches(raw):
            raw = daformer.network(raw, prefix)
        else:
            raw = _predicting(
                raw, metadata.get("predict_prefix", "") if prefix is None else prefix
            )

        reader = (
            None
            if _ours(raw, model)
            else next((reader for reader in READERS if reader.matches(raw)), None)
        )
        state = tensors(state_dict(raw)) if reader is None else reader.convert(raw, model)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error

    state = _fit(state, model, path, reset_classifier)
    model.load_state_dict(state, strict=False)


def _predicting(raw: Mapping, prefix: str) -> Mapping:
    """What a file holds; of a method's checkpoint, the network whose names begin with `prefix`. ValueError where it has
    none."""
    if not prefix:
        return raw

    network = {
        n.removeprefix(prefix): value for n, value in raw.items() if n.startswith(prefix)
    }
    if not network:
        raise ValueError(f"has no network {prefix.rstrip('.')!r}")

    return network


def _ours(raw: Mapping, model: nn.Module) -> bool:
    """Whether a file has the model's own names, and no others."""
    return all(
        name.endswith(COUNTER) for name in state_dict(raw).keys() ^ model.state_dict().keys()
    )


COUNTER = "num_batches_tracked"  # absent from old files, and of no use where BN has a momentum


def _fit(
    state: dict[str, Tensor], model: nn.Module, path: str | Path, reset_classifier: bool | None
) -> dict[str, Tensor]:
    """`state` without classifiers of another size; ValueError where anything else does not fit `model`."""
    own = model.state_dict()
    missing = [name for name in own if name not in state and not name.endswith(COUNTER)]
    extra = [name for name in state if name not in own and not name.endswith(COUNTER)]
    other = [name for name in state if name in own and state[name].shape != own[name].shape]
    heads = [name for name in other if _is_classifier(name, model)]
    if missing or extra or len(heads) < len(other):
        shapes = [
            f"{n} {tuple(state[n].shape)} for {tuple(own[n].shape)}"
            for n in other
            if n not in heads
        ]
        parts = (
            ("missing", missing),
            ("not in the model", extra),
            ("of another shape", shapes),
        )
        lists = "; ".join(f"{title}: {short(names)}" for title, names in parts if names)
        raise ValueError(f"{path}: does not fit this model. {lists}{_advice(state, model)}")

    if not heads:
        return state

    difference, fix = _classifiers(model, state[heads[0]].shape[0] - own[heads[0]].shape[0])
    if not reset_classifier:
        other = (
            ""
            if reset_classifier is None
            else ", or model.reset_classifier=true to train a new classifier"
        )
        raise ValueError(f"{path}: {difference}; set {fix}{other}")

    warnings.warn(
        f"{path}: {difference}; its classifier is left out ({short(heads)})", stacklevel=3
    )

    return {name: tensor for name, tensor in state.items() if name not in heads}


def _advice(state: dict[str, Tensor], model: nn.Module) -> str:
    """What to do with a file that holds the model's backbone and nothing else of it; for others nothing."""
    backbone = getattr(model, "backbone", None)
    rest = [n for n in model.state_dict() if not n.startswith("backbone.")]
    if (
        not isinstance(backbone, nn.Module)
        or not state.keys().isdisjoint(rest)
        or not fits_backbone(state, backbone)
    ):
        return ""

    return "; it holds the backbone alone: name it in model.pretrained, not in model.checkpoint"


def _classifiers(model: nn.Module, rows: int) -> tuple[str, str]:
    """What a file was trained on whose classifier has `rows` outputs more than the model's, and the option to set."""
    theirs = model.num_classes + rows
    ours = model.num_classes
    other = {("softmax", 1): "seesaw", ("seesaw", -1): "softmax"}.get(
        (getattr(model, "class_head", None), rows)
    )
    if other is None:
        return f"trained on {theirs} classes, the model has {ours}", "model.num_classes"

    difference = f"trained on {ours} classes with class_head {other}, or on {theirs} with {model.class_head}"

    return difference, f"model.options.class_head={other}, or model.num_classes={theirs}"


def _is_classifier(name: str, model: nn.Module) -> bool:
    return any(
        name == head or name.startswith(f"{head}.")
        for head in getattr(model, "classifiers", ())
    )
