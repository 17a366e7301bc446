"""What a run gets wrong: `python scripts/errors.py RUN [--output DIR] [--worst N] [--classes NAME …]`.

RUN is the folder of a run, of a test (RUN/test/NAME), or what scripts/score.py left. Writes to RUN/errors, or DIR:

    confusion.csv, confusion.png   the whole confusion matrix: pixels, and shares of the true classes
    images.csv                     scores of every image, and IoU of each class in it
    worst/ID_CLASS.png             image, truth, prediction and errors where the class has its lowest IoU

The last two need per_image.npz (evaluate with eval.per_image=true). The sheets show predictions of --predictions DIR,
as `--save-predictions` writes them; without it those images alone are predicted again, by the run's checkpoint.
"""

import argparse
import re
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from common import cli, console, distributed
from common.config import Config, load_config, nearest
from common.data import SegmentationDataset
from common.engine.runtime import use_tf32
from common.evaluation import mirrored_classes, network_input
from common.evaluation.adjustment import offsets_of
from common.evaluation.errors import words, worst_images, write_confusion, write_image_scores
from common.evaluation.per_image import FILE, Matrices, read_per_image
from common.evaluation.score_files import pair_dataset, read_pair
from common.files import read_json, refuse_to_overwrite
from common.inference import predict_labels
from common.metrics import confusion_matrix
from common.models import load_model
from common.report.sheets import Row, confusion_picture, worst_sheet

Predict = Callable[[int, dict[str, Any]], np.ndarray]
TOLERATED = 0.01  # share of an image's pixels that another machine may predict otherwise


def main() -> None:
    args = parse()
    run = Path(args.run)
    out = Path(args.output or run / "errors")
    result = read_json(run / "evaluation.json", "has the run ended?")
    classes = [item["name"] for item in result["per_class"]]
    shown = chosen(args.classes, classes)

    files = [out / name for name in ("confusion.csv", "confusion.png", "images.csv")]
    refuse_to_overwrite(files, args.force)
    kept = read_per_image(run / FILE) if (run / FILE).is_file() else None
    worst = {k: worst_images(kept.matrices, k, args.worst) for k in shown} if kept else {}
    pictures = Pictures(args, run, result, kept) if any(worst.values()) else None

    out.mkdir(parents=True, exist_ok=True)
    matrix = np.array(result["confusion"])
    write_confusion(files[0], matrix, classes)
    confusion_picture(matrix, classes).save(files[1])
    print(f"the confusion matrix is in {files[0]} and {files[1]}")
    if kept is None:
        print(f"no {FILE} in {run}: evaluate with eval.per_image=true for scores and sheets of images")
        return

    write_image_scores(files[2], kept, classes, result["convention"])
    print(f"scores of {len(kept.names)} images are in {files[2]}")
    if pictures is not None:
        write_sheets(out / "worst", worst, kept, classes, pictures)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", metavar="RUN")
    parser.add_argument("--output", metavar="DIR", help="default: RUN/errors")
    parser.add_argument("--worst", type=int, default=4, metavar="N", help="images of a class (default 4; 0: no sheets)")
    parser.add_argument("--classes", nargs="+", metavar="NAME", help="sheets of these alone")
    parser.add_argument("--predictions", metavar="DIR", help="PNG files, in place of the run's network")
    parser.add_argument("--config", metavar="FILE", help="whose validation images these are; default: RUN/config.yaml")
    parser.add_argument("--device", help="cpu, cuda or cuda:N; default: a GPU where there is one")
    cli.add_force(parser)
    cli.add_quiet(parser)
    args = parser.parse_args()
    if args.worst < 0:
        raise ValueError(f"--worst {args.worst}: give 0 or more")
    return args


def chosen(names: Sequence[str] | None, classes: Sequence[str]) -> list[int]:
    """The ids of classes by name; of all without names."""
    for name in names or ():
        if name not in classes:
            raise ValueError(f"--classes {name!r} is no class of the run; {nearest(name, classes)}")
    return [k for k, name in enumerate(classes) if names is None or name in names]


def write_sheets(
    folder: Path, worst: dict[int, list[int]], kept: Matrices, classes: Sequence[str], pictures: "Pictures"
) -> None:
    """`<id>_<class>.png` of every class that some image shows."""
    folder.mkdir(parents=True, exist_ok=True)
    written = 0

    for k, places in console.bar(worst.items(), what="drawing"):
        if places:
            rows = [pictures.row(place, words(kept.matrices[place], k, classes)) for place in places]
            title = f"{classes[k]}: lowest IoU first; image, truth, prediction, errors (yellow: at this class)"
            sheet = worst_sheet(title, rows, pictures.dataset.row.palette, k)
            name = re.sub(r"[^\w-]+", "_", classes[k])
            sheet.save(folder / f"{k:03d}_{name}.png")
            written += 1

    print(f"the worst images of {written} classes are in {folder}")


class Pictures:
    """Images with truth and prediction, by their place in per_image.npz; each is predicted once."""

    def __init__(self, args: argparse.Namespace, run: Path, result: dict[str, Any], kept: Matrices):
        config = Path(args.config or run / "config.yaml")
        if not config.is_file():
            raise ValueError(f"{config}: not there, so the images are not known; give --config FILE, or --worst 0")

        self.kept = kept
        self.cfg = load_config(config)
        self.dataset = SegmentationDataset(self.cfg.data.val)
        self.index = {record.name: i for i, record in enumerate(self.dataset.records)}
        missing = [name for name in kept.names if name not in self.index]
        if missing:
            raise ValueError(f"{config}: its validation set has no image {missing[0]!r}, which {run / FILE} names")

        predictions = args.predictions or result.get("predictions")
        if predictions:
            self.predict = from_files(predictions, self.dataset, self.cfg)
        else:
            checkpoint = result.get("checkpoint", run)
            self.predict = from_network(self.cfg, self.dataset, checkpoint, distributed.start(args.device))
        self.known: dict[int, tuple[np.ndarray, np.ndarray, np.ndarray]] = {}

    def row(self, place: int, text: str) -> Row:
        """One image of a sheet."""
        name = self.kept.names[place]
        if place not in self.known:
            sample = self.dataset.load(self.index[name])
            pred = self.predict(self.index[name], sample)
            self._compare(place, pred, sample["label"])
            self.known[place] = sample["image"], sample["label"], pred

        return Row(name, text, *self.known[place])

    def _compare(self, place: int, pred: np.ndarray, truth: np.ndarray) -> None:
        """Warn where a prediction is not the one that was scored."""
        stored = self.kept.matrices[place]
        pair = (torch.from_numpy(array.astype(np.int64)) for array in (pred, truth))
        other = confusion_matrix(*pair, len(stored)).numpy()
        if np.abs(other - stored).sum() > 2 * TOLERATED * max(stored.sum(), 1):
            name = self.kept.names[place]
            warnings.warn(f"{name}: the prediction shown is not the one that was scored", stacklevel=2)


def from_files(folder: str, dataset: SegmentationDataset, cfg: Config) -> Predict:
    """Predictions in PNG files."""
    pairs = pair_dataset(folder, dataset, cfg.eval)
    records = {record.name: record for record in pairs.records}

    def predict(index: int, sample: dict[str, Any]) -> np.ndarray:
        return read_pair(dataset.row, records[dataset.records[index].name], "saved")[0]

    return predict


def from_network(cfg: Config, dataset: SegmentationDataset, checkpoint: str | Path, device: torch.device) -> Predict:
    """Predictions of the network that a checkpoint holds."""
    use_tf32(cfg.train, device)
    model = load_model(cfg.model, checkpoint).to(device)
    offsets = offsets_of(cfg, checkpoint)

    @torch.no_grad()
    def predict(index: int, sample: dict[str, Any]) -> np.ndarray:
        image = network_input(sample["image"], cfg.eval)[None].to(device)
        size = sample["label"].shape
        label = predict_labels(model, image, cfg.eval, size, mirrored_classes(dataset.row), offsets)
        return label[0].cpu().numpy()

    return predict


if __name__ == "__main__":
    cli.run(main)
