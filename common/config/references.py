"""Where another step's files are: `run:STEP/FILE` in a config is FILE in the folder of that step's run.

The runs of a pipeline lie side by side in `output`. A run is named after its step's config file, unless the config's
`runs` gives it another name. A config that is a variant of a plain one (`stage1_blv.yaml` beside `stage1.yaml`) means
the step of its own variant where there is a config of it, else the plain step.
"""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

PREFIX = "run:"


def run_of(step: str, file: Path | None, names: Mapping[str, str]) -> str:
    """The name of a step's run, as the config `file` means it; `names` are those that differ from the steps'."""
    variant = "" if file is None else variant_of(file)
    own = f"{step}_{variant}"
    if file is not None and variant and file.with_name(f"{own}{file.suffix}").is_file():
        step = own

    return names.get(step, step)


def variant_of(file: Path) -> str:
    """What a config file's name adds to that of a plain config beside it: `blv` of `stage1_blv.yaml`."""
    words = file.stem.split("_")
    for n in range(1, len(words)):
        plain = "_".join(words[:n])
        if file.with_name(f"{plain}{file.suffix}").is_file():
            return "_".join(words[n:])

    return ""


def resolved(value: Any, folder: Callable[[str], Path]) -> Any:
    """A config, or a part of one, with each reference replaced by a path; `folder` gives that of a step's run.

    Raises ValueError for a reference without a step.
    """
    if isinstance(value, str):
        return _path(value, folder) if value.startswith(PREFIX) else value

    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {
            f.name: resolved(getattr(value, f.name), folder) for f in dataclasses.fields(value)
        }
        return dataclasses.replace(value, **fields)

    if isinstance(value, Mapping):
        return {key: resolved(item, folder) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(resolved(item, folder) for item in value)

    return value


def _path(reference: str, folder: Callable[[str], Path]) -> str:
    step, _, file = reference.removeprefix(PREFIX).partition("/")
    if not step:
        raise ValueError(f"{reference!r} names no step; write {PREFIX}STEP/FILE")
    return str(folder(step) / file)
