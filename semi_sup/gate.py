"""What USRN's gate takes, at any threshold: `python gate.py saved/RUN/checkpoints/last`, of a run whose stream of
unlabelled images has labels (`data.streams.unlabeled.labels=true`).

The trained network labels weak views of the unlabelled images as it does in a step, in training mode. A table says of
each threshold the share of all cells that are confident, where the subclass branch is not the less certain one, where
its winner's class is another, and where both hold and the gate therefore takes the label; and the share of right ones
among confident and taken labels. Writes it to `gate.json` in the run's folder.
"""

import argparse
from collections.abc import Iterator, Mapping, Sequence
from math import ceil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common import cli
from common.config import Config, ConfigError
from common.data import IGNORE
from common.data.statistics import placeholder
from common.data.streams import collate, make_streams
from common.engine import MethodContext
from common.engine.checkpoint import restore
from common.files import write_json
from common.models.carried import carried_config
from semi_sup.config import build_method
from semi_sup.losses import entropy_of
from semi_sup.usrn import USRN
from semi_sup.view_cells import at_cells

THRESHOLDS = (0.2, 0.3, 0.4, 0.5, 0.6, 0.75, 0.9)
FILE = "gate.json"
COLUMNS = ("confident", "surer", "differs", "taken", "confident_right", "taken_right")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", help="a run's checkpoint: saved/RUN/checkpoints/last")
    args = parser.parse_args()
    path = Path(args.checkpoint)

    cells = seen(path)
    found = [shares(cells, threshold) for threshold in THRESHOLDS]
    print(table(found))
    write_json(path.parent.parent / FILE, found)


def seen(path: Path) -> dict[str, Tensor]:
    """What a checkpoint's branches say of the cells (N,) of one weak view of each unlabelled image, and the truth."""
    cfg = carried_config(path)
    method = build_method(cfg, MethodContext(placeholder(cfg.model.num_classes)))
    if not isinstance(method, USRN) or not method.branches:
        raise ConfigError(
            f"{cfg.name}: method.name: {cfg.method.get('name')!r} is not USRN with its branch, the one whose gate is "
            "looked at here; take a run of usrn"
        )
    if not cfg.data.streams["unlabeled"].labels:
        raise ConfigError(
            f"{cfg.name}: data.streams.unlabeled.labels: is false; train with true"
        )

    restore(path, method)
    torch.manual_seed(cfg.seed)
    parts = [look(method.train(), batch) for batch in batches(cfg)]
    return {key: torch.cat([part[key] for part in parts]) for key in parts[0]}


def batches(cfg: Config) -> Iterator[dict[str, Any]]:
    """The unlabelled images once, in batches as in a step."""
    stream = make_streams(cfg.data, cfg.seed)["unlabeled"]
    for step in range(ceil(len(stream.dataset) / stream.batch_size)):
        yield collate([stream.sample(draw) for draw in stream.draws(step, 0, 1)])


@torch.no_grad()
def look(method: USRN, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What the branches say of the cells of a batch whose truth is known."""
    weak = method.label(batch["weak"])
    p = weak.classes.float().softmax(1)
    q = weak.subclasses.float().softmax(1)
    confidence, label = p.max(1)
    parent = method.parents[q.argmax(1)]
    truth = at_cells(method.model.pad_label(batch["label"]))

    known = truth != IGNORE
    valid = method.valid(batch, weak.classes)
    if valid is not None:
        known = known & valid

    cells = {
        "confidence": confidence,
        "of_parent": p.gather(1, parent[:, None])[:, 0],
        "surer": entropy_of(q) <= entropy_of(p),
        "differs": parent != label,
        "right": label == truth,
    }
    return {key: value[known] for key, value in cells.items()}


def shares(cells: Mapping[str, Tensor], threshold: float) -> dict[str, float | None]:
    """What a threshold leaves of the cells, as shares of all; `_right` are shares of those. None: there are none.

    A label is taken where the branch is not the less certain and the class of its winner, which alone may become the
    label, is not confident.
    """
    confident = cells["confidence"] > threshold
    taken = confident & cells["surer"] & (cells["of_parent"] <= threshold)
    groups = {
        "confident": confident,
        "surer": confident & cells["surer"],
        "differs": confident & cells["differs"],
        "taken": taken,
    }
    found: dict[str, float | None] = {"threshold": threshold}
    found |= {key: float(group.float().mean()) for key, group in groups.items()}
    for key in ("confident", "taken"):
        right = cells["right"][groups[key]]
        found[f"{key}_right"] = float(right.float().mean()) if len(right) else None

    return found


def table(found: Sequence[Mapping[str, float | None]]) -> str:
    """The shares in percent, a threshold a line."""
    lines = ["  ".join(["threshold", *COLUMNS])]
    for row in found:
        cells = [_percent(row[key]).rjust(len(key)) for key in COLUMNS]
        lines.append("  ".join([f"{row['threshold']:9.2f}", *cells]))

    return "\n".join(lines)


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.1f}"


if __name__ == "__main__":
    cli.run(main)
