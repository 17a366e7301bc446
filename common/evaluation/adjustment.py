"""Logit adjustment after training: where the class counts of a trained network come from."""

import json
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from common.config import Config, ConfigError, typed
from common.files import load_json, read_artifact
from common.losses.logit_adjustment import LogitAdjustment, post_hoc_offsets
from common.models.pretrained.containers import read_metadata

IN_TRAINING = ("logit_adjustment", "balanced_softmax")
COUNTS = "class_pixels"  # in a checkpoint's metadata, and in a run's statistics.json


def offsets_of(
    cfg: Config, checkpoint: str | Path | None = None, pixels: Sequence[int] | None = None
) -> Tensor | None:
    """What `eval.logit_adjustment` adds to the logits, float32 (K,); None where it is 0.

    pixels: (K,), of each class in the training labels; without, those that the checkpoint tells, else the run's
    statistics.json. ConfigError where nothing tells them, or they are of other classes.
    """
    tau = cfg.eval.logit_adjustment
    if not tau:
        return None

    where = f"{cfg.name}: eval.logit_adjustment: {tau:g}"
    trained = adjusted_by(cfg.remedies, tau, where)
    if trained and tau > 0:
        warnings.warn(
            f"{where}: remedies.logits {trained} has adjusted the network in training: both add up",
            stacklevel=2,
        )

    if pixels is None:
        pixels = _of_checkpoint(checkpoint) or _of_run(cfg.folder / "statistics.json")

    if pixels is None:
        raise ConfigError(
            f"{where}: neither the checkpoint nor {cfg.folder / 'statistics.json'} tells the pixels of each class in "
            "the training labels; give a checkpoint of a run, or set it to 0"
        )

    if len(pixels) != cfg.model.num_classes:
        text = f"the training labels were counted by {len(pixels)} classes, the network has {cfg.model.num_classes}"
        raise ConfigError(
            f"{where}: {text}; give the checkpoint of a run on these classes, or set it to 0"
        )

    return post_hoc_offsets(pixels, tau)


def adjusted_by(remedies: Mapping[str, Any], tau: float, where: str) -> str | None:
    """The remedy that adjusted the logits that predict in training, None where none did.

    τ < 0 adds the prior of the pixels back: ConfigError, which begins with `where`, where none has been left out; more
    than was left out is warned of.
    """
    found = _in_training(remedies)
    if tau >= 0:
        return None if found is None else found[0]

    if found is None:
        text = "adds back a prior that only logit_adjustment or balanced_softmax in training leaves out"
        raise ConfigError(f"{where}: {text}; give 0 or more")

    name, left_out = found
    if left_out.of != "pixels":
        text = (
            f"adds back the prior of pixels, and remedies.logits left out that of {left_out.of}"
        )
        raise ConfigError(f"{where}: {text}; give 0 or more")
    if -tau > left_out.tau:
        text = f"adds back more of the prior than the {left_out.tau:g} that training left out"
        warnings.warn(f"{where}: {text}", stacklevel=3)

    return name


def _in_training(remedies: Mapping[str, Any]) -> tuple[str, LogitAdjustment] | None:
    """Name and options of what left a prior out of the head that predicts."""
    heads = remedies.get("heads", ("decode",))
    logits = remedies.get("logits")
    options = dict(logits) if isinstance(logits, Mapping) else {}
    name = options.pop("name", None)
    if name not in IN_TRAINING or not isinstance(heads, list | tuple) or "decode" not in heads:
        return None

    left_out = typed(LogitAdjustment, options, "remedies.logits")
    return (name, left_out) if left_out.tau > 0 else None


def _of_checkpoint(path: str | Path | None) -> list[int] | None:
    stored = None if path is None else read_metadata(path).get(COUNTS)
    return (
        None if stored is None else read_artifact(path, lambda _: _counts(json.loads(stored)))
    )


def _of_run(path: Path) -> list[int] | None:
    return read_artifact(path, _stored) if path.is_file() else None


def _stored(path: Path) -> list[int]:
    return _counts(load_json(path)[COUNTS])


def _counts(value: list[int]) -> list[int]:
    if not value or not all(isinstance(n, int) and n >= 0 for n in value) or not any(value):
        raise ValueError(f"{COUNTS}: expected a pixel count for each class")
    return value
