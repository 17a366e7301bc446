"""Reading weight files without running what is in them.

A pickle may name tensors, what `common.pickles` rebuilds, and log buffers and config nodes of the training frameworks,
which become inert placeholders. Any other name is refused.
"""

import pickle
import re
import struct
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from common.pickles import NUMPY, Inert, load, plain

TORCH_LEGACY = pickle.dumps(0x1950A86A20F9469CFC6C, 2)  # first pickle of torch files before 1.6
WEIGHTS = "model.safetensors"


def _inert(*args) -> Inert:
    return Inert()


def _known() -> dict[str, Any]:
    """What each name of a pickle becomes."""
    known = NUMPY | {"builtins.getattr": _inert}
    nodes = ("mmengine.config.config.ConfigDict", "mmcv.utils.config.ConfigDict", "addict.addict.Dict")
    nodes += ("yacs.config.CfgNode", "fvcore.common.config.CfgNode", "detectron2.config.config.CfgNode")
    objects = ("mmengine.config.config.Config", "mmcv.utils.config.Config")
    objects += ("mmengine.logging.history_buffer.HistoryBuffer",)
    return known | dict.fromkeys(nodes, OrderedDict) | dict.fromkeys(objects, Inert)


KNOWN = _known()


def read(path: str | Path) -> tuple[dict[str, Any], dict[str, str]]:
    """What a weight file holds, and its metadata (safetensors only; else empty).

    Reads a checkpoint folder (its model.safetensors), safetensors, files of torch.save and plain pickles, told apart
    by content. Raises FileNotFoundError, or ValueError for a damaged file or one that would run code.
    """
    path = Path(path)
    path = path / WEIGHTS if path.is_dir() else path
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such weight file")
    with path.open("rb") as file:
        start = file.read(32)
    try:
        if start[8:9] == b"{" and struct.unpack("<Q", start[:8])[0] < path.stat().st_size:
            return _read_safetensors(path)
        if start.startswith((b"PK\x03\x04", TORCH_LEGACY)):
            raw = _read_torch(path, mmap=start.startswith(b"PK"))
        elif start.startswith(b"\x80"):
            raw = _read_pickle(path)
        else:
            raise ValueError(f"{path}: neither safetensors nor a file of torch.save nor a pickle")
    except (pickle.UnpicklingError, SafetensorError, EOFError, RuntimeError, struct.error) as error:
        raise ValueError(_explain(path, str(error))) from error
    except (TypeError, AttributeError, KeyError, IndexError, UnicodeError) as error:  # how broken pickles end
        raise ValueError(f"{path}: damaged file ({error})") from error
    if not isinstance(raw, Mapping):
        raise ValueError(f"{path}: holds a {type(raw).__name__}, not a dict of weights")
    return plain(raw), {}


def _explain(path: Path, reason: str) -> str:
    refused = re.search(r"(?:GLOBAL|the name) (\S+)", reason)
    if refused:
        return (
            f"{path}: names {refused[1]}, which is neither a tensor nor a plain value, and loading it would run code; "
            "refused. Save the weights alone (a dict of tensors, or safetensors) where you trust the file"
        )
    return f"{path}: damaged file ({' '.join(reason.split())[:200]})"


def _read_safetensors(path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118


def _read_torch(path: Path, mmap: bool) -> Any:
    with torch.serialization.safe_globals([(value, name) for name, value in KNOWN.items()]):
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)


def _read_pickle(path: Path) -> Any:
    """Plain pickles, such as detectron2's .pkl."""
    with path.open("rb") as file:
        return load(file, KNOWN)


def state_dict(raw: Mapping[str, Any]) -> dict[str, Any]:
    """The weights of an unpickled file: under `state_dict` or `model`, or the dict itself; without `module.`."""
    inner = next((raw[key] for key in ("state_dict", "model") if isinstance(raw.get(key), Mapping)), raw)
    return {strip_module(str(name)): value for name, value in inner.items()}


def strip_module(name: str) -> str:
    """`name` without the leading `module.` that each data-parallel wrapper adds."""
    while name.startswith("module."):
        name = name.removeprefix("module.")
    return name


def tensors(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """Arrays as tensors. Raises ValueError for what is neither."""
    wrong = [name for name, value in state.items() if not isinstance(value, Tensor | np.ndarray | np.generic)]
    if wrong:
        raise ValueError(f"not a dict of weights: {short(wrong)} of {type(state[wrong[0]]).__name__} is no tensor")
    return {
        name: value if isinstance(value, Tensor) else torch.from_numpy(np.array(value, value.dtype.newbyteorder("=")))
        for name, value in state.items()
    }


def short(names: Iterable[str], limit: int = 4) -> str:
    """The first few names."""
    names = list(names)
    return ", ".join(names[:limit]) + (f" … ({len(names)} in all)" if len(names) > limit else "")
