"""How right a run's labels for unlabelled images are: `python scripts/pseudo_labels.py RUN [--at 0.95] [key=value …]`.

RUN is the folder or a checkpoint of a run of any system. The images are those of its stream without labels (--stream;
default: the first), whose labels are opened here to count right and wrong ones; without such a stream, those of
`data.val`. The network that predicts (a teacher, where there is one) sees them as its evaluation would: whole, without
augmentation and in evaluation mode, where a step labels crops.

Printed are, by threshold of confidence, how many labels it keeps and how many of these are right, of all classes and of
the tail; then of each class, at the method's own threshold or --at, its share of the truth and of the labels, their
precision and recall, and the lowest threshold at which --precision of them are right, with its recall there.
"""

import argparse
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for the other scripts, which are not installed

from common import cli, distributed
from common.config import Config, ConfigError, pick
from common.data import SegmentationDataset
from common.engine.method import method_class
from common.evaluation.loop import mirrored_classes, prediction
from common.evaluation.pseudo_labels import LabelCounts, LabelQuality, place_of
from common.evaluation.samples import chosen_images, sample_batches
from common.files import refuse_to_overwrite, write_json
from common.inference import probabilities, score_bands
from common.models import load_model
from common.models.carried import carried_config
from common.models.pretrained.containers import weight_file
from scripts.systems import system_of

THRESHOLDS = (0.0, 0.5, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99)
AT = 0.95  # where neither the method nor the command line has a threshold
VALIDATION = "val"  # the name of the images without a stream of unlabelled ones


def main() -> None:
    args = parse()
    refuse_to_overwrite(filter(None, [args.json]), args.force)
    cfg = carried_config(args.run, args.overrides)
    at = threshold_of(cfg) if args.at is None else args.at

    result = label_quality(cfg, weight_file(args.run), args.stream, at, args.precision, args.device)
    print(page(result))
    if args.json:
        path = Path(args.json)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, result)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", metavar="RUN")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="values of the run's config to change")
    parser.add_argument("--stream", metavar="NAME", help="of these images")
    parser.add_argument("--at", type=float, metavar="P", help="threshold of the table of classes")
    parser.add_argument("--precision", type=float, default=0.9, metavar="P", help="default 0.9")
    parser.add_argument("--device", help="cpu, cuda or cuda:N; default: a GPU where there is one")
    parser.add_argument("--json", metavar="FILE", help="also write the figures there")
    cli.add_force(parser)
    cli.add_quiet(parser)
    args = parser.parse_intermixed_args()

    if not 0 < args.precision <= 1:
        raise ValueError(f"--precision {args.precision:g}: give a share above 0, at most 1")
    return args


def threshold_of(cfg: Config) -> float:
    """The method's own threshold, else AT."""
    options = method_class(system_of(cfg).methods, cfg, "supervised").options_of(cfg)
    return float(getattr(options, "threshold", AT))


def label_quality(
    cfg: Config, file: Path, stream: str | None, at: float, precision: float, device: str | None = None
) -> dict[str, Any]:
    """All figures, as JSON holds them. ValueError before any work for what cannot be counted."""
    if cfg.remedies.get("pseudo_prior"):
        text = "a step adds the prior to the logits that it makes labels of, which this does not; set it to false"
        raise ConfigError(f"{cfg.name}: remedies.pseudo_prior: {text}")

    place_of(at)  # before the work: whether it is one
    name, dataset = images_of(cfg, stream)
    target = distributed.start(device)
    network = load_model(cfg.model, file).to(target)
    quality = count(network, dataset, cfg, target)
    return {
        "images": len(chosen_images(dataset, cfg.eval)),
        "stream": name,
        "at": at,
        "precision": precision,
        "thresholds": [at_threshold(quality, value, dataset.row.tail) for value in sorted({*THRESHOLDS, at})],
        "classes": of_classes(quality, dataset.row.classes, at, precision),
    }


def images_of(cfg: Config, stream: str | None) -> tuple[str, SegmentationDataset]:
    """The images to label, and what to call them."""
    without = [name for name, source in cfg.data.streams.items() if not source.labels]
    if stream is None and not without:
        return VALIDATION, SegmentationDataset(cfg.data.val)

    name = without[0] if stream is None else stream
    source = pick(cfg.data.streams, name, f"{cfg.name}: --stream")
    return name, SegmentationDataset(replace(source, labels=True))


def count(network: torch.nn.Module, dataset: SegmentationDataset, cfg: Config, device: torch.device) -> LabelQuality:
    """Look at every image once."""
    counts = LabelCounts(cfg.model.num_classes, device)
    chosen = chosen_images(dataset, cfg.eval)
    mirrored = mirrored_classes(dataset.row)

    with prediction(network, chosen) as bar:
        for samples in sample_batches(dataset, chosen, cfg.eval):
            for sample in samples:
                image, label = sample["image"].to(device), sample["label"].to(device)
                bands = score_bands(network, image[None], cfg.eval, tuple(label.shape), mirrored)
                for rows, scores in bands:
                    confidence, predicted = probabilities(network, cfg.eval, scores).max(1)
                    counts.update(predicted, confidence, label[None, slice(*rows)])
            bar.update(len(samples))

    return counts.quality()


def at_threshold(quality: LabelQuality, threshold: float, tail: tuple[int, ...]) -> dict[str, float | None]:
    """What a threshold keeps, in shares. The tail's are those of its predicted classes; recall is a mean over it."""
    classes = list(tail)
    recall = quality.recall(threshold)[classes]
    figures = {
        "threshold": threshold,
        "kept": quality.kept(threshold),
        "right": quality.accuracy(threshold),
        "tail_labels": float(np.nansum(quality.shares(threshold)[classes])),
        "tail_right": quality.accuracy(threshold, classes),
        "tail_recall": float(np.nanmean(recall)) if np.isfinite(recall).any() else np.nan,
    }
    return {key: number(value) for key, value in figures.items()}


def of_classes(quality: LabelQuality, classes: tuple[str, ...], at: float, precision: float) -> list[dict[str, Any]]:
    """One row a class."""
    threshold, there = quality.threshold_for(precision)
    columns = {
        "truth": quality.truth / max(quality.truth.sum(), 1),
        "labels": quality.shares(at),
        "precision": quality.precision(at),
        "recall": quality.recall(at),
        "threshold": threshold,
        "recall_there": there,
    }
    return [
        {"name": name, **{key: number(float(values[k])) for key, values in columns.items()}}
        for k, name in enumerate(classes)
    ]


def number(value: float) -> float | None:
    return value if np.isfinite(value) else None


# As text ------------------------------------------------------------------------------------------------------------


def page(result: Mapping[str, Any]) -> str:
    """The figures as text, in percent."""
    what = "validation images" if result["stream"] == VALIDATION else f"images of the stream {result['stream']!r}"
    classes = sorted(result["classes"], key=lambda item: item["truth"])
    goal = f"{100 * result['precision']:g} % from"
    columns = {"truth": "truth", "labels": "labels", "precision": "prec.", "recall": "recall"}
    wide = max(len(item["name"]) for item in classes)

    lines = [f"{result['images']} {what}, in percent of pixels whose truth is known", ""]
    lines += ["threshold     kept    right  |  of the tail: labels    right  mean recall"]
    for item in result["thresholds"]:
        own = "  ".join(cell(item[key]) for key in ("kept", "right"))
        tail = "  ".join(cell(item[key]) for key in ("tail_labels", "tail_right", "tail_recall"))
        lines.append(f"{item['threshold']:>9g}  {own}  |             {tail}")

    lines += ["", f"at {result['at']:g}:"]
    titles = "  ".join(f"{title:>7}" for title in columns.values())
    lines.append(f"{'class':<{wide}}  {titles}  {goal:>9}  {'recall':>7}")
    for item in classes:
        cells = "  ".join(cell(item[key]) for key in columns)
        found = "never" if item["threshold"] is None else f"{item['threshold']:.3f}"
        lines.append(f"{item['name']:<{wide}}  {cells}  {found:>9}  {cell(item['recall_there'])}")

    return "\n".join(lines)


def cell(share: float | None) -> str:
    return f"{'–':>7}" if share is None else f"{100 * share:>7.2f}"


if __name__ == "__main__":
    cli.run(main)
