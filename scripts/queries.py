"""Where Mask2Former loses a class: `python scripts/queries.py RUN [--images N] [--json FILE]`.

RUN is a folder of a run, or of a test (RUN/test/NAME). Of every validation image and every class that it shows, the one
query is taken whose mask fits the class's pixels best, and means over images tell what becomes of it:

    mask      IoU of that mask with the class's pixels: low where no query has the shape
    named     share of images in which the class is its likeliest: low where it is taken for another (`taken for`)
    object    its probability of having any class: low where it is found and named, but overruled by "no object"
    votes     the class's probabilities, "no object" left out, added up over all queries: 1 is one sure query
    found     IoU of the class in the labels that are predicted, where all queries are added up

A query that shows only one of several objects of a class has a low IoU, too; compare with rows that do well.
"""

import argparse
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from common import cli, console, distributed
from common.config import Config, load_config
from common.data import IGNORE, SegmentationDataset
from common.engine.runtime import use_tf32
from common.evaluation import network_input
from common.evaluation.samples import chosen_images
from common.files import read_json, refuse_to_overwrite, write_json
from common.models import load_model
from common.models.mask2former.model import Mask2Former, class_probabilities
from common.models.pretrained.containers import weight_file

TOGETHER = 16  # masks that are held at an image's size


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", metavar="RUN")
    parser.add_argument("--images", type=int, metavar="N", help="of the whole set; default: every one")
    parser.add_argument("--json", metavar="FILE", help="write the numbers, too")
    parser.add_argument("--device", help="cpu, cuda or cuda:N; default: a GPU where there is one")
    cli.add_force(parser)
    cli.add_quiet(parser)
    args = parser.parse_args()

    refuse_to_overwrite(list(filter(None, [args.json])), args.force)
    cfg, checkpoint = opened(Path(args.run), args.images)
    dataset = SegmentationDataset(cfg.data.val)
    device = distributed.start(args.device)
    use_tf32(cfg.train, device)
    model = load_model(cfg.model, checkpoint).to(device).eval()
    if not isinstance(model, Mask2Former):
        raise ValueError(f"{args.run}: its network, {cfg.model.name}, has no queries")

    tallies = [Tally() for _ in dataset.row.classes]
    for index in console.bar(chosen_images(dataset, cfg.eval), what="images"):
        sample = dataset.load(index)
        image = network_input(sample["image"], cfg.eval)[None].to(device)
        label = torch.from_numpy(sample["label"]).to(device)
        for best in best_queries(model, image, label):
            tallies[best.klass].add(best)

    rows = rows_of(tallies, dataset.row.classes)
    print(table(rows))
    if args.json:
        write_json(Path(args.json), {"checkpoint": str(checkpoint), "classes": rows})


def opened(run: Path, images: int | None) -> tuple[Config, str | Path]:
    """Config and checkpoint of a run or test. ValueError where it is evaluated in another way than is looked at."""
    config = run / "config.yaml"
    if not config.is_file():
        raise ValueError(f"{config}: not there; give the folder of a run or a test")

    words = [] if images is None else [f"eval.max_images={images}"]
    cfg = load_config(config, words)
    if cfg.eval.mode != "whole":
        raise ValueError(f"{config}: eval.mode: {cfg.eval.mode}; queries are those of whole images")

    evaluation = run / "evaluation.json"
    tested = read_json(evaluation).get("checkpoint") if evaluation.is_file() else None
    return cfg, weight_file(tested or run)


# One image ----------------------------------------------------------------------------------------------------------


class Best(NamedTuple):
    """The query whose mask fits a class best. mask, found: IoU. named: its likeliest class. votes: of all queries."""

    klass: int
    mask: float
    named: int
    object: float
    votes: float
    found: float


@torch.no_grad()
def best_queries(model: Mask2Former, image: Tensor, label: Tensor) -> Iterator[Best]:
    """One of every class that `label` (H, W) shows. image: (1, 3, h, w) in 0–255."""
    known = (label != IGNORE).flatten()
    truth = label.flatten()[known].long()
    present = truth.unique()
    if not len(present):
        return

    shown = (truth == present[:, None]).float()  # (P, N)
    out = model(image)
    fit = torch.cat(
        [
            iou(masks.flatten(1)[:, known] > 0.5, shown)
            for masks in masks_of(model, out["pred_masks"], image, label.shape)
        ]
    )
    predicted = model.predict(image, tuple(label.shape)).argmax(1).flatten()[known]
    found = iou(predicted == present[:, None], shown).diagonal()

    mask, query = fit.max(0)
    logits = out["pred_logits"][0].float()
    named = logits[:, : model.num_classes].argmax(1)[query]
    objects = objectness(logits, model.num_classes)[query]
    votes = class_probabilities(logits, model.num_classes).sum(0)[present]
    columns = (present, mask, named, objects, votes, found)
    yield from map(Best._make, zip(*(column.tolist() for column in columns), strict=True))


def masks_of(model: Mask2Former, masks: Tensor, image: Tensor, size: Sequence[int]) -> Iterator[Tensor]:
    """The masks (1, Q, h, w) of an image as probabilities (q, H, W) at `size`, some at a time."""
    for some in masks.split(TOGETHER, 1):
        # scores whose classes are the queries themselves
        each = torch.eye(some.shape[1], device=some.device)[None]
        yield model.scores_of({"probability": each, "pred_masks": some}, image, tuple(size))[0]


def iou(regions: Tensor, shown: Tensor) -> Tensor:
    """IoU (R, P) of regions (R, N) with the pixels of classes (P, N)."""
    regions = regions.float()
    common = regions @ shown.T
    return common / (regions.sum(1, keepdim=True) + shown.sum(1) - common)


def objectness(logits: Tensor, classes: int) -> Tensor:
    """Probability (Q,) that a query has any class, of logits (Q, K + 1), or (Q, K + 2) of Seesaw's head."""
    if logits.shape[1] == classes + 1:
        return 1 - logits.softmax(1)[:, -1]
    return logits[:, classes:].softmax(1)[:, 0]


# All images ---------------------------------------------------------------------------------------------------------


@dataclass
class Tally:
    """Sums over the images that show a class."""

    images: int = 0
    mask: float = 0.0
    object: float = 0.0
    votes: float = 0.0
    found: float = 0.0
    named: Counter[int] = field(default_factory=Counter)

    def add(self, best: Best) -> None:
        self.images += 1
        self.mask += best.mask
        self.object += best.object
        self.votes += best.votes
        self.found += best.found
        self.named[best.named] += 1


def rows_of(tallies: Sequence[Tally], classes: Sequence[str]) -> list[dict[str, Any]]:
    """Means over the images of each class that one of them shows."""
    rows = []
    for k, tally in enumerate(tallies):
        if tally.images:
            others = Counter({c: n for c, n in tally.named.items() if c != k})
            rows.append(
                {
                    "class": classes[k],
                    "images": tally.images,
                    "mask": tally.mask / tally.images,
                    "named": tally.named[k] / tally.images,
                    "taken_for": {classes[c]: n / tally.images for c, n in others.most_common(3)},
                    "object": tally.object / tally.images,
                    "votes": tally.votes / tally.images,
                    "found": tally.found / tally.images,
                }
            )

    return rows


def table(rows: Sequence[dict[str, Any]]) -> str:
    """A line a class, in percent; votes are a number."""
    wide = max([len(row["class"]) for row in rows], default=0)
    lines = [f"{'':<{wide}}  images    mask   named  object   found   votes  taken for"]
    for row in rows:
        others = ", ".join(f"{name} {100 * n:.0f}" for name, n in row["taken_for"].items())
        numbers = "".join(f"{100 * row[key]:8.1f}" for key in ("mask", "named", "object", "found"))
        numbers += f"{row['votes']:8.2f}"
        lines.append(f"{row['class']:<{wide}}  {row['images']:6d}{numbers}  {others}".rstrip())

    return "\n".join(lines)


if __name__ == "__main__":
    cli.run(main)
