"""What pseudo-labels were made from: a record in their folder, by which they are kept, made anew, or refused."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from common.files import read_json, write_json
from common.steps import digest_of

RECORD = "made_from.json"


def soft_labels_of(checkpoint: Path) -> dict[str, Any]:
    """The record of soft pseudo-labels by a checkpoint."""
    return {"labels": "soft", "checkpoint": digest_of(checkpoint)}


def hard_labels_of(checkpoint: Path, flip: bool) -> dict[str, Any]:
    """The record of hard pseudo-labels by a checkpoint."""
    return {"labels": "hard", "checkpoint": digest_of(checkpoint), "flip": flip}


def made_from(folder: Path, record: Mapping[str, Any]) -> bool:
    """Whether the files in `folder` say that they were made from what `record` says."""
    path = folder / RECORD
    return path.is_file() and read_json(path, "remove the folder") == record


def refuse_unknown(folder: Path) -> None:
    """ValueError where `folder` holds files that do not say what they were made from: they may be anybody's."""
    known = (folder / RECORD).is_file()
    if not known and folder.is_dir() and any(folder.iterdir()):
        raise ValueError(
            f"{folder}: its files do not say what they were made from (an earlier version's, or the release's); "
            "--force makes them anew, CHANGED=keep sh main.sh TASK uses them as they are"
        )


def renew(folder: Path, record: Mapping[str, Any]) -> None:
    """Empty `folder`, and record what it is going to hold."""
    if folder.is_dir():
        shutil.rmtree(folder)

    folder.mkdir(parents=True)
    write_json(folder / RECORD, record)
