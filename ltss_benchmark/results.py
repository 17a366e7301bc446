"""What an evaluation leaves: the benchmark's sections of scores, its line of six group values, masks on request."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from common import distributed
from common.evaluation import summarise
from common.files import replacing, write_json
from ltss_benchmark.rle import encode_labels

Groups = Mapping[str, Sequence[str]] | None
LEVELS = ("image", "pixel")
LETTERS = {"rare": "r", "common": "c", "frequent": "f"}
OTHER = {"ltss": "detectron2", "detectron2": "ltss"}  # the convention that is shown beside


def is_long_tailed(convention: str) -> bool:
    """The balanced sets are scored as detectron2 scores them today, and have no groups."""
    return convention != "detectron2"


def sections(result: Mapping[str, Any]) -> dict[str, Any]:
    """`sem_seg`, and of a long-tailed set `Test` and `LTSS`, in percent; None where a value is undefined."""
    means = {"mIoU": "miou", "fwIoU": "fwiou", "mACC": "macc", "pACC": "aacc"}
    overall = {name: percent(result[key]) for name, key in means.items()}
    each = {f"IoU-{item['name']}": percent(item["iou"]) for item in result["per_class"]}
    each |= {f"ACC-{item['name']}": percent(item["acc"]) for item in result["per_class"]}
    found: dict[str, Any] = {"sem_seg": overall | each}
    if is_long_tailed(result["convention"]):
        found |= {"Test": overall, "LTSS": group_values(result)}

    return found


def group_values(result: Mapping[str, Any]) -> dict[str, float | None]:
    """`mIoU-image@r` … `mIoU-pixel@f` in the official order, in percent."""
    groups = result["groups"]
    return {
        f"mIoU-{level}@{letter}": percent(groups[level][group])
        for level in LEVELS
        if level in groups
        for group, letter in LETTERS.items()
    }


def percent(value: float | None) -> float | None:
    return None if value is None else 100 * value


def inference_folder(run: Path, augmented: bool) -> Path:
    return run / ("inference_TTA" if augmented else "inference")


def file_name(convention: str, kind: str) -> str:
    """`kind` is evaluation or predictions."""
    return f"{'lt_' if is_long_tailed(convention) else ''}sem_seg_{kind}.json"


def write_results(
    run: Path, result: Mapping[str, Any], row: Any, groups: Groups, augmented: bool = False
) -> None:
    """The file of scores below the run's folder, by rank 0; scores of the other convention stand in it too."""
    if distributed.rank() != 0:
        return

    suffix = "_TTA" if augmented else ""
    convention = result["convention"]
    other = summarise(np.array(result["confusion"]), row, OTHER.get(convention, "ltss"), groups)
    tree: dict[str, Any] = {"dataset": row.name, "convention": convention, "unit": "percent"}
    tree |= {f"{name}{suffix}": values for name, values in sections(result).items()}
    tree |= {key: result[key] for key in ("images", "checkpoint", "step") if key in result}
    tree["other"] = {"convention": other["convention"], **sections(other)}
    path = inference_folder(run, augmented) / file_name(convention, "evaluation")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, tree)
    print(f"scores written to {path}")


def print_groups(result: Mapping[str, Any]) -> None:
    """The line that the release logs: mIoU and the six group values."""
    if distributed.rank() != 0 or not is_long_tailed(result["convention"]):
        return
    values = {"mIoU": percent(result["miou"]), **group_values(result)}
    print(
        "  ".join(
            f"{name} {'-' if value is None else f'{value:.2f}'}"
            for name, value in values.items()
        )
    )


class Predictions:
    """COCO's list of predicted masks: one entry per image and predicted class; `category_id` is the train id.

    Every rank writes the images it predicts to a file of its own; `close` joins them in order of rank.
    """

    def __init__(self, path: Path):
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self.file = self._part(distributed.rank()).open("w")

    def __call__(self, name: str, label: Tensor) -> None:
        """Add an image's predicted classes (H, W)."""
        label = label.cpu().numpy()
        for k, counts in encode_labels(label).items():
            mask = {"size": list(label.shape), "counts": counts}
            self.file.write(
                json.dumps({"file_name": name, "category_id": k, "segmentation": mask}) + "\n"
            )

    def close(self) -> None:
        self.file.close()
        distributed.barrier()
        if distributed.rank() != 0:
            return

        parts = [self._part(rank) for rank in range(distributed.world_size())]
        lines = (line.rstrip("\n") for part in parts for line in part.open())

        with replacing(self.path) as draft, draft.open("w") as out:
            out.write("[")
            for number, line in enumerate(lines):
                out.write((",\n" if number else "") + line)

            out.write("]\n")

        for part in parts:
            part.unlink()

    def _part(self, rank: int) -> Path:
        return self.path.with_name(f"{self.path.stem}.{rank}.part")
