"""Reading weight files without running what is in them.

A pickle may name tensors, what `common.pickles` rebuilds, and log buffers and config nodes of the training frameworks,
which become inert placeholders. Any other name is refused.
"""

import io
import pickle
import re
import struct
import sys
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from common.files import MANIFEST, PROJECT, damage, follow, load_array, read_artifact
from common.pickles import NUMPY, Inert, check, load, plain

ZIP = b"PK\x03\x04"  # torch files since 1.6
NUMPY_ARRAY = b"\x93NUMPY"
TORCH_LEGACY = pickle.dumps(0x1950A86A20F9469CFC6C, 2)  # first pickle of torch files before 1.6
# that number, the protocol, the machine, the value, the names of its storages
LEGACY_PICKLES = 5
WEIGHTS = "model.safetensors"

# what a file holds, and its metadata (safetensors only)
Contents = tuple[dict[str, Any], dict[str, str]]


def _inert(*args) -> Inert:
    return Inert()


def _known() -> dict[str, Any]:
    """What each name of a pickle becomes."""
    known = NUMPY | {"builtins.getattr": _inert}
    nodes = (
        "mmengine.config.config.ConfigDict",
        "mmcv.utils.config.ConfigDict",
        "addict.addict.Dict",
    )
    nodes += (
        "yacs.config.CfgNode",
        "fvcore.common.config.CfgNode",
        "detectron2.config.config.CfgNode",
    )
    objects = ("mmengine.config.config.Config", "mmcv.utils.config.Config")
    objects += ("mmengine.logging.history_buffer.HistoryBuffer",)

    return known | dict.fromkeys(nodes, OrderedDict) | dict.fromkeys(objects, Inert)


KNOWN = _known()


def weight_file(path: str | Path) -> Path:
    """The file that `path` names: itself, the weights of a checkpoint (or a link to one), or of a run's newest."""
    path = Path(path)
    if (path / "checkpoints").is_dir():
        path = path / "checkpoints" / "last"

    path = follow(path)
    return path / WEIGHTS if path.is_dir() else path


def find_weights(source: str | Path) -> Path:
    """The file or folder that `model.pretrained` names: below the working directory, below the project's own folder, or
    the one weight file of an installed package of this name. Raises FileNotFoundError."""
    for path in (Path(source), PROJECT / source):
        if path.exists():
            return path

    package = str(source).replace("-", "_")

    for folder in map(Path, sys.path):
        found = sorted((folder / package).rglob("*.pth")) if package.isidentifier() else []
        if len(found) == 1:
            return found[0]

    raise FileNotFoundError(
        f"{source}: no such weight file, and no installed package that holds one"
    )


def read(path: str | Path) -> Contents:
    """What a weight file holds, and its metadata (safetensors only; else empty).

    Reads what `weight_file` finds: safetensors, files of torch.save and plain pickles, told apart by content.
    Raises FileNotFoundError, or ValueError for a damaged file or one that would run code.
    """
    path = weight_file(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such weight file")

    if path.name == WEIGHTS and (path.parent / MANIFEST).is_file():
        problem = damage(path.parent, [WEIGHTS])
        if problem is not None:
            raise ValueError(f"{problem}; damaged file")

    return read_artifact(path, _parse)


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a weight file by name, out of whatever holds them. Raises as `read` and `tensors` do."""
    raw, _ = read(path)
    return read_artifact(path, lambda _: tensors(state_dict(raw)))


def read_metadata(path: str | Path) -> dict[str, str]:
    """What a checkpoint of ours says of itself (the file that `weight_file` finds); {} for files of other kinds."""
    file = weight_file(path)
    if file.suffix != ".safetensors":
        return {}
    return read_artifact(file, _metadata)


def _metadata(file: Path) -> dict[str, str]:
    with safe_open(file, framework="pt") as opened:
        return dict(opened.metadata() or {})


def load_tensor(path: Path) -> Tensor:
    """The one tensor in a file of torch.save, or array in one of numpy.save; real and finite.

    For `read_artifact`: raises whatever a damaged file makes the readers raise, ValueError for other content.
    """
    with path.open("rb") as file:
        numpy = file.read(len(NUMPY_ARRAY)) == NUMPY_ARRAY

    value = load_array(path) if numpy else _load(path)[0]
    return tensors({"the value": value})["the value"].detach()


def _parse(path: Path) -> Contents:
    raw, metadata = _load(path)
    if not isinstance(raw, Mapping):
        raise ValueError(f"holds a {type(raw).__name__}, not a dict of weights")
    return raw, metadata


def _load(path: Path) -> tuple[Any, dict[str, str]]:
    reader = _reader(path)
    try:
        return reader(path)
    except (pickle.UnpicklingError, RuntimeError, ValueError) as error:
        raise ValueError(_explain(str(error))) from error


def _reader(path: Path) -> Callable[[Path], Contents]:
    with path.open("rb") as file:
        start = file.read(32)

    if start[8:9] == b"{" and struct.unpack("<Q", start[:8])[0] < path.stat().st_size:
        return _read_safetensors
    if start.startswith(ZIP):
        return _read_torch
    if start.startswith(TORCH_LEGACY):
        return _read_torch_legacy
    if start.startswith(b"\x80"):
        return _read_pickle

    raise ValueError("neither safetensors nor a file of torch.save nor a pickle")


def _explain(reason: str) -> str:
    refused = re.search(r"(?:GLOBAL|the name) (\S+)", reason)
    if refused:
        return (
            f"names {refused[1]}, which is neither a tensor nor a plain value, and loading it would run code; "
            "refused. Save the weights alone (a dict of tensors, or safetensors) where you trust the file"
        )
    return f"damaged file ({' '.join(reason.split())[:200]})"


def _read_safetensors(path: Path) -> Contents:
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, dict(
            file.metadata() or {}
        )  # noqa: SIM118


def _read_torch(path: Path) -> Contents:
    _check_zip(path)
    return _load_torch(path, mmap=True), {}


def _read_torch_legacy(path: Path) -> Contents:
    with path.open("rb") as file:
        for _ in range(LEGACY_PICKLES):
            check(file, path.stat().st_size)
    return _load_torch(path, mmap=False), {}


def _load_torch(path: Path, mmap: bool) -> Any:
    with torch.serialization.safe_globals([(value, name) for name, value in KNOWN.items()]):
        return plain(torch.load(path, map_location="cpu", weights_only=True, mmap=mmap))


def _read_pickle(path: Path) -> Contents:
    """Plain pickles, such as detectron2's .pkl."""
    return plain(load(path.read_bytes(), KNOWN)), {}


def _check_zip(path: Path) -> None:
    """Raise ValueError for a file of torch.save whose checksums, which torch does not look at, or whose pickle is bad.

    `torch.serialization.set_crc32_options(False)` writes files without checksums: the member `version` shows it.
    """
    with zipfile.ZipFile(path) as archive:
        versions = [name for name in archive.namelist() if name.endswith("/version")]
        if not versions or not _sound(archive, versions[0]):
            return

        damaged = archive.testzip()
        if damaged is not None:
            raise ValueError(f"the checksum of {damaged} differs")

        for name in archive.namelist():
            if name.endswith("/data.pkl"):
                data = archive.read(name)
                check(io.BytesIO(data), len(data))


def _sound(archive: zipfile.ZipFile, name: str) -> bool:
    """Whether the checksum of a member is that of its bytes."""
    try:
        archive.read(name)
    except zipfile.BadZipFile:
        return False

    return True


def state_dict(raw: Mapping[str, Any]) -> dict[str, Any]:
    """The weights of an unpickled file: under `state_dict` or `model`, or the dict itself; without `module.`."""
    inner = next(
        (raw[key] for key in ("state_dict", "model") if isinstance(raw.get(key), Mapping)), raw
    )
    return {strip_module(str(name)): value for name, value in inner.items()}


def strip_module(name: str) -> str:
    """`name` without the leading `module.` that each data-parallel wrapper adds."""
    while name.startswith("module."):
        name = name.removeprefix("module.")
    return name


def tensors(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """Arrays as tensors. Raises ValueError for what is neither, and for values that are not real and finite."""
    wrong = [name for name, value in state.items() if not _is_numeric(value)]
    if wrong:
        raise ValueError(
            f"not a dict of weights: {short(wrong)} of {type(state[wrong[0]]).__name__} is no tensor"
        )

    found = {
        name: value if isinstance(value, Tensor) else _tensor(value)
        for name, value in state.items()
    }
    unreal = [
        name
        for name, value in found.items()
        if value.is_complex() or not value.isfinite().all()
    ]
    if unreal:
        raise ValueError(f"weights that are not real and finite: {short(unreal)}")

    return found


def _is_numeric(value: Any) -> bool:
    return isinstance(value, Tensor) or (
        isinstance(value, np.ndarray | np.generic) and value.dtype.kind in "biufc"
    )


def _tensor(array: np.ndarray | np.generic) -> Tensor:
    return torch.from_numpy(np.array(array, array.dtype.newbyteorder("=")))


def short(names: Iterable[str], limit: int = 4) -> str:
    """The first few names."""
    names = list(names)
    return ", ".join(names[:limit]) + (
        f" … ({len(names)} in all)" if len(names) > limit else ""
    )
