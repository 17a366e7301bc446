"""Checkpoints: safetensors weights and the training state, written so that a crash leaves the older one whole.

    step_00000450/   model.safetensors (the method's state dict), state.pt (optimisers, scaler) and manifest.json
    scores.json      the validation score of each step: the record of which checkpoint is the best
    last, best       links, made from the two above

A step's folder appears by one rename once all its bytes are on disk.
"""

import json
import math
import shutil
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from common.files import (
    damage,
    link,
    load_json,
    read_artifact,
    remove_drafts,
    replacing,
    seal,
    write_json,
)

WEIGHTS, STATE = FILES = ("model.safetensors", "state.pt")
SCORES = "scores.json"
# in a state dict: the network, and its averaged weights (train.ema)
MODEL, AVERAGE = "model.", "average."

COUNTED = (".counts.running", ".counts.pseudo")  # buffers of common/losses/counts.py

Scores = dict[int, float | None]  # by step; None where the score is undefined


def save(
    folder: Path,
    step: int,
    method: nn.Module,
    state: Mapping[str, Any],
    metadata: Mapping[str, str],
) -> Path:
    """Write the checkpoint of `step` below `folder` and return its path; an OSError leaves nothing half written."""
    if not folder.parent.is_dir():
        raise OSError(
            f"{folder.parent}: the run's folder is gone, the checkpoint of step {step} cannot be saved"
        )

    folder.mkdir(exist_ok=True)
    final = path_of(folder, step)

    if damage(final, FILES) is not None:
        tensors = {
            name: tensor.detach().cpu().contiguous()
            for name, tensor in method.state_dict().items()
        }
        with replacing(final) as draft:
            draft.mkdir()
            save_file(
                _unshared(tensors), draft / WEIGHTS, metadata={**metadata, "step": str(step)}
            )
            torch.save({"step": step, **state}, draft / STATE)
            seal(draft, {"step": step})

    link(folder / "last", final)

    return final


def _unshared(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tied tensors become copies: safetensors stores no aliases."""
    seen: set[int] = set()
    for name, tensor in tensors.items():
        if tensor.data_ptr() in seen and tensor.numel():
            tensors[name] = tensor.clone()
        seen.add(tensor.data_ptr())

    return tensors


def path_of(folder: Path, step: int) -> Path:
    return folder / f"step_{step:08d}"


def steps(folder: Path) -> list[Path]:
    """The checkpoints below `folder`, oldest first."""
    return sorted(path for path in folder.glob("step_*") if path.is_dir())


def prune(folder: Path, keep: int, best: int | None, until: int) -> None:
    """Remove all but the newest `keep` checkpoints and that of step `best`, and what killed runs left unfinished.

    until: the step that the run is at. Later checkpoints are damaged ones that it went on before: they take nobody's
    place, and stay until the run replaces them.
    """
    spared = None if best is None else path_of(folder, best)
    own = [path for path in steps(folder) if path <= path_of(folder, until)]
    for path in own[: -max(keep, 1)]:
        if path != spared:
            shutil.rmtree(path)

    remove_drafts(folder)


def refuse_earlier(run: Path) -> None:
    """Raise ValueError where the folder of a new run holds an earlier one: nothing of it is overwritten."""
    earlier = steps(run / "checkpoints")
    if earlier:
        raise ValueError(
            f"{run}: holds an earlier run, up to {earlier[-1].name}; add --resume to continue it, "
            "give this run another `name`, or remove the folder"
        )


def newest(folder: Path) -> Path | None:
    """The newest whole checkpoint, None where there is none at all; damaged ones are skipped with a warning.

    Raises ValueError where all are damaged: to begin at step 0 would overwrite what may still be saved by hand.
    """
    found = steps(folder)
    for path in reversed(found):
        problem = damage(path, FILES)
        if problem is None:
            return path
        warnings.warn(f"{path}: torn or damaged, skipped ({problem})", stacklevel=2)

    if found:
        names = ", ".join(path.name for path in found)
        raise ValueError(
            f"{folder}: no checkpoint to resume from, all are damaged: {names}; put back a copy of one, or remove "
            f"{folder.parent} to start anew"
        )

    return None


def restore(path: Path, method: nn.Module) -> dict[str, Any]:
    """Load the method's state from `path` and return the training state.

    Where the method averages its weights and the checkpoint does not, the average begins at the checkpoint's weights.
    Counts of pseudo-labels that only one of them has, since remedies came or went, begin at 0 or are left out. Raises
    ValueError, naming the first few keys, where the checkpoint is of another method, model or class count.
    """
    tensors = read_artifact(path / WEIGHTS, load_file)
    own = method.state_dict()
    if not any(name.startswith(AVERAGE) for name in tensors):
        averaged = [name for name in own if name.startswith(AVERAGE)]
        sources = {name: MODEL + name.removeprefix(AVERAGE) for name in averaged}
        tensors |= {
            name: tensors[source] for name, source in sources.items() if source in tensors
        }

    tensors = {
        **{name: own[name] for name in own if name.endswith(COUNTED)},
        **{n: t for n, t in tensors.items() if n in own or not n.endswith(COUNTED)},
    }
    state = read_artifact(path / STATE, _load_state)

    wrong = sorted(set(tensors) ^ set(own)) + sorted(
        name for name in set(tensors) & set(own) if tensors[name].shape != own[name].shape
    )
    if wrong:
        names = ", ".join(wrong[:4])
        raise ValueError(
            f"{path}: not a checkpoint of this config, {len(wrong)} tensors differ: {names}"
        )

    method.load_state_dict(tensors)

    return state


def _load_state(path: Path) -> dict[str, Any]:
    return torch.load(path, map_location="cpu", weights_only=True)


# Scores and links ---------------------------------------------------------------------------------------------------


def best_step(scores: Scores) -> int | None:
    """The step of the highest score, the first one of several; None where none is defined."""
    defined = {step: score for step, score in sorted(scores.items()) if score is not None}
    return max(defined, key=lambda step: defined[step], default=None)


def evaluations_since_best(scores: Scores) -> int:
    """How many evaluations came after the best one; all of them where no score is defined."""
    best = best_step(scores)
    return sum(best is None or step > best for step in scores)


def write_scores(folder: Path, scores: Scores, metric: str) -> None:
    """Record the scores, which are of `metric` (`eval.best`)."""
    steps = {str(step): score for step, score in scores.items()}
    write_json(folder / SCORES, {"metric": metric, "scores": steps})


def read_scores(folder: Path, until: int, metric: str) -> Scores:
    """The scores of the steps up to `until`; later ones come again. Raises ValueError for a damaged file.

    Where those on record are of another metric, `eval.best` having been changed, the run's log has them.
    """

    def parse(path: Path) -> tuple[str, Scores]:
        record = load_json(path)
        found = record.get("scores", record)  # earlier files have the scores alone
        scores = {int(step): score for step, score in found.items()}
        wrong = [score for score in scores.values() if not (score is None or is_score(score))]
        if wrong:
            raise ValueError(f"{wrong[0]!r} is no score")

        return record.get("metric", metric), scores

    path = folder / SCORES
    if not path.exists():
        return {}

    recorded, scores = read_artifact(
        path, parse, "remove it to choose the best checkpoint among later ones"
    )
    if recorded != metric:
        scores = _logged(folder.parent / "log.jsonl", metric, scores)

    return {step: score for step, score in scores.items() if step <= until}


def _logged(log: Path, metric: str, steps: Iterable[int]) -> Scores:
    """The scores of another metric at these steps, of a run's log; None where it does not say."""
    scores: Scores = dict.fromkeys(steps)
    for line in log.read_text(encoding="utf-8").splitlines() if log.is_file() else ():
        try:
            record = json.loads(line)
        except ValueError:  # a kill has torn it
            continue
        if record.get("kind") == "eval" and record["step"] in scores:
            score = record.get(metric)
            scores[record["step"]] = score if is_score(score) else None

    return scores


def is_score(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def link_best(folder: Path, scores: Scores) -> None:
    """Point `best` at the checkpoint with the highest score, if it is still there; no score, no `best`."""
    step = best_step(scores)
    if step is None:
        (folder / "best").unlink(missing_ok=True)
    elif path_of(folder, step).is_dir():
        link(folder / "best", path_of(folder, step))
