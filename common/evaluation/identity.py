"""What an evaluation was of: the images, their labels and the settings. Scores compare where this is equal."""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

from common.config import EvalConfig

# hashes; where both sides have them, names and numbers prove nothing more
PROOF = ("files", "labels")
NAMES = ("dataset", "split", "images")
# what results without an identity may say of it
LEGACY = ("dataset", "images", "convention", "scales", "flip")


def identity(dataset: Any, indices: Sequence[int], cfg: EvalConfig) -> dict[str, Any]:
    """The identity of an evaluation of the images `indices` of `dataset`, as JSON gives it back.

    `dataset`, `split`, `images` (how many); `files`: hash of the images' names and the sizes of their label files;
    `labels`: hash of the classes and of what stored values mean; `convention`; and the keys of `eval` that change a
    score, None where the others make them void (a crop without sliding windows).
    """
    return {**identity_of_labels(dataset, indices, cfg.convention), **_settings(cfg)}


def identity_of_labels(dataset: Any, indices: Sequence[int], convention: str) -> dict[str, Any]:
    """The part of an identity that says nothing of how predictions were made."""
    return {
        "dataset": dataset.row.name,
        "split": dataset.source.split,
        "images": len(indices),
        "files": _files(dataset, indices),
        "labels": _hash(json.dumps(dataset.row.meaning)),
        "convention": convention,
    }


def _files(dataset: Any, indices: Sequence[int]) -> str:
    """Whatever folder the files lie in, and whatever their order."""
    records = [dataset.records[index] for index in indices]
    return _hash(
        "\n".join(sorted(f"{record.name} {_size(record.label)}" for record in records))
    )


def _size(path: str | os.PathLike | None) -> int:
    """Bytes of a file, −1 where there is none: opening it says so, with its name."""
    return os.stat(path).st_size if path is not None and os.path.isfile(path) else -1


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode(errors="surrogateescape")).hexdigest()[:16]


def _settings(cfg: EvalConfig) -> dict[str, Any]:
    slides = cfg.mode == "slide"
    scales = list(cfg.scales)
    return {
        "mode": cfg.mode,
        "crop": list(cfg.crop) if slides else None,
        "stride": list(cfg.stride or cfg.crop) if slides else None,
        "cut_windows": cfg.windows == "cut",
        "window_softmax": cfg.window_softmax,
        "short_edge": cfg.short_edge,
        "max_edge": cfg.max_edge,
        "scales": scales,
        "scaled_max_edge": cfg.scaled_max_edge if scales != [1.0] else None,
        "flip": cfg.flip,
        "logit_adjustment": cfg.logit_adjustment,
    }


def has_identity(result: Mapping[str, Any]) -> bool:
    """Whether an evaluation says what it was of; those of earlier versions do not."""
    return bool(result.get("identity"))


def differences(result: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """In what two evaluations differ, as far as both say; [] where their scores compare."""
    mine = _known(result)
    theirs = _known(other)
    proven = all(key in side for side in (mine, theirs) for key in PROOF)
    skipped = NAMES if proven else ()

    found = []

    for key in mine:
        if key in theirs and key not in skipped and mine[key] != theirs[key]:
            found.append(_difference(key, mine, theirs))

    return found


def other_means(
    classes: Sequence[Mapping[str, Any]], others: Sequence[Mapping[str, Any]]
) -> set[str]:
    """The means over some classes that two evaluations take over different ones: "tail", and levels of grouping.

    classes, others: their `per_class`. Groups follow the training labels, so equal evaluations may differ in them.
    """
    levels = {level for item in (*classes, *others) for level in item.get("groups", {})}
    found = {level for level in levels if _grouped(classes, level) != _grouped(others, level)}
    tails = [[item["name"] for item in side if item.get("tail")] for side in (classes, others)]
    return found | ({"tail"} if tails[0] != tails[1] else set())


def _grouped(classes: Sequence[Mapping[str, Any]], level: str) -> dict[str, str | None]:
    return {item["name"]: item.get("groups", {}).get(level) for item in classes}


def _known(result: Mapping[str, Any]) -> Mapping[str, Any]:
    known = result.get("identity") or {key: result[key] for key in LEGACY if key in result}
    # which earlier versions did not have
    return {"logit_adjustment": 0.0, "cut_windows": False, **known}


def _difference(key: str, mine: Mapping[str, Any], theirs: Mapping[str, Any]) -> str:
    if key == "files":
        return f"other images or label files: {_named(mine)} against {_named(theirs)}"
    if key == "labels":
        return f"other classes or label values: {_named(mine)} against {_named(theirs)}"
    return f"{key} {_shown(mine[key])} against {_shown(theirs[key])}"


def _named(known: Mapping[str, Any]) -> str:
    return f"{known['dataset']} {known['split']}, {known['images']} images"


def _shown(value: Any) -> str:
    return "none" if value is None else str(value)
