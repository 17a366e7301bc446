"""Checkpoints: safetensors weights and the training state, written so that a crash leaves the older one whole.

`checkpoints/step_00000450/` holds `model.safetensors` (the method's state dict), `state.pt` (optimisers, scaler, best
score) and `manifest.json` (sizes and checksums). The folder appears by one rename once all its bytes are on disk.
`checkpoints/best` and `checkpoints/last` are links.
"""

import json
import os
import shutil
import uuid
import warnings
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

FILES = ("model.safetensors", "state.pt")


def save(folder: Path, step: int, method: nn.Module, state: Mapping[str, Any], metadata: Mapping[str, str]) -> Path:
    """Write the checkpoint of `step` below `folder` and return its path; an OSError leaves nothing half written."""
    final = folder / f"step_{step:08d}"
    if is_whole(final):
        return final
    folder.mkdir(parents=True, exist_ok=True)
    draft = folder / f".{final.name}.{uuid.uuid4().hex[:8]}"
    draft.mkdir()
    try:
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in method.state_dict().items()}
        save_file(_unshared(tensors), draft / FILES[0], metadata={**metadata, "step": str(step)})
        torch.save({"step": step, **state}, draft / FILES[1])
        sums = {name: [(draft / name).stat().st_size, _checksum(draft / name)] for name in FILES}
        (draft / "manifest.json").write_text(json.dumps({"step": step, "files": sums}))
        for path in (*draft.iterdir(), draft):
            _sync(path)
        if final.exists():
            shutil.rmtree(final)
        os.rename(draft, final)
        _sync(folder)
    except BaseException as error:
        shutil.rmtree(draft, ignore_errors=True)
        if isinstance(error, OSError | RuntimeError) and not isinstance(error, torch.OutOfMemoryError):
            raise OSError(f"{final}: cannot write the checkpoint ({error})") from error
        raise
    link(folder, "last", final)
    return final


def _unshared(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tied tensors become copies: safetensors stores no aliases."""
    seen: set[int] = set()
    for name, tensor in tensors.items():
        if tensor.data_ptr() in seen and tensor.numel():
            tensors[name] = tensor.clone()
        seen.add(tensor.data_ptr())
    return tensors


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _checksum(path: Path) -> int:
    value = 0
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            value = zlib.crc32(block, value)
    return value


def is_whole(path: Path) -> bool:
    """Whether every file of the checkpoint has the size and checksum that were written."""
    try:
        sums = json.loads((path / "manifest.json").read_text())["files"]
        return all([(path / name).stat().st_size, _checksum(path / name)] == sums[name] for name in FILES)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def link(folder: Path, name: str, target: Path) -> None:
    """Point `folder/name` at the checkpoint `target`, in one step."""
    draft = folder / f".{name}.{uuid.uuid4().hex[:8]}"
    os.symlink(target.name, draft)
    os.replace(draft, folder / name)


def steps(folder: Path) -> list[Path]:
    """The checkpoints below `folder`, oldest first."""
    return sorted(path for path in folder.glob("step_*") if path.is_dir())


def prune(folder: Path, keep: int) -> None:
    """Remove all but the newest `keep` checkpoints and the best one, and drafts of killed runs."""
    best = (folder / "best").resolve()
    for path in steps(folder)[: -max(keep, 1)]:
        if path.resolve() != best:
            shutil.rmtree(path)
    for path in folder.glob(".step_*"):
        shutil.rmtree(path, ignore_errors=True)


def newest(folder: Path) -> Path | None:
    """The newest whole checkpoint; torn ones are skipped with a warning."""
    for path in reversed(steps(folder)):
        if is_whole(path):
            return path
        warnings.warn(f"{path}: torn or damaged, skipped; resuming from an older checkpoint", stacklevel=2)
    return None


def restore(path: Path, method: nn.Module) -> dict[str, Any]:
    """Load the method's state from `path` and return the training state.

    Raises ValueError, naming the first few keys, where the checkpoint is of another method, model or class count.
    """
    tensors, own = load_file(path / FILES[0]), method.state_dict()
    wrong = sorted(set(tensors) ^ set(own)) + sorted(
        name for name in set(tensors) & set(own) if tensors[name].shape != own[name].shape
    )
    if wrong:
        names = ", ".join(wrong[:4])
        raise ValueError(f"{path}: not a checkpoint of this config, {len(wrong)} tensors differ: {names}")
    method.load_state_dict(tensors)
    return torch.load(path / FILES[1], map_location="cpu", weights_only=True)
