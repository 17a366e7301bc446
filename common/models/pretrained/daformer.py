"""Checkpoints of DAFormer, HRDA and MIC: MMSegmentation's with several networks inside.

`model.` holds the student, `ema_model.` its teacher and `imnet_model.` the frozen ImageNet network; published files
hold the student alone.
"""

from collections.abc import Mapping
from typing import Any

from common.models.pretrained.containers import strip_module

STUDENT = "model."
# ours → theirs
PREFIXES = {STUDENT: STUDENT, "teacher.": "ema_model.", "imagenet.": "imnet_model."}


def matches(raw: Mapping[str, Any]) -> bool:
    """Whether `raw` (what a file holds) is a checkpoint of these releases."""
    state = raw.get("state_dict")
    if not isinstance(state, Mapping):
        return False

    names = [strip_module(str(name)) for name in state]
    return all(
        any(name.startswith(STUDENT + part) for name in names)
        for part in ("backbone.", "decode_head.")
    )


def network(raw: Mapping[str, Any], prefix: str | None = None) -> dict[str, Any]:
    """One network of the file, as MMSegmentation's files hold theirs. ValueError where the file has none such.

    prefix: of the network in a checkpoint of ours; None: the student.
    """
    theirs = PREFIXES.get(prefix or STUDENT, prefix)
    state = {strip_module(str(name)): value for name, value in raw["state_dict"].items()}
    chosen = {
        name.removeprefix(theirs): value
        for name, value in state.items()
        if name.startswith(theirs)
    }
    if not chosen:
        raise ValueError(
            f"holds no network {theirs.rstrip('.')}; published files hold the student alone"
        )

    return {"state_dict": chosen}
