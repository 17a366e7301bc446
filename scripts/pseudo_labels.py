"""How right a run's labels for unlabelled images are: `python scripts/pseudo_labels.py RUN [--at 0.95] [key=value …]`.

RUN is the folder or a checkpoint of a run of any system. The images are those of its stream without labels (--stream;
default: the first), whose labels are opened here to count right and wrong ones; without such a stream, those of
`data.val`. The network that labels in a step (the teacher, where there is one) sees them as the evaluation sees its
images, in evaluation mode, where a step labels crops.

Printed are, by threshold of confidence, how many labels reach it and how many of these are right, of all classes and of
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
from safetensors import safe_open

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for the other scripts, which are not installed

from common import cli
from common.config import Config, ConfigError, pick
from common.data import SegmentationDataset
from common.engine.checkpoint import AVERAGE, MODEL
from common.engine.logging import commit
from common.engine.method import method_class
from common.engine.runtime import use_tf32
from common.evaluation.loop import mirrored_classes, prediction
from common.evaluation.pseudo_labels import BINS, LabelCounts, LabelQuality, Threshold, places_of
from common.evaluation.samples import chosen_images, sample_batches
from common.evaluation.summary import number
from common.files import refuse_to_overwrite, write_json
from common.inference import probabilities, score_bands
from common.models import load_model
from common.models.carried import carried_config
from common.models.pretrained.containers import weight_file
from scripts.rebalance import one_process
from scripts.systems import system_of
from semi_sup.consistency import ClassThresholds

THRESHOLDS = (0.0, 0.5, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99)
AT = 0.95  # where neither the method nor the command line has a threshold
TEACHER = "teacher."  # prefix of a teacher's tensors in a checkpoint
CLASS_CONFIDENCE = "thresholds.confidence"  # of UniMatch with class thresholds, in a checkpoint
CLASS_SEEN = "thresholds.seen"  # which of them are means; not in older ones
VALIDATION = "val"  # the name of the images without a stream of unlabelled ones


def main() -> None:
    args = parse()
    refuse_to_overwrite(filter(None, [args.json]), args.force)
    device = one_process(args.device)
    file = weight_file(args.run)
    cfg = carried_config(args.run, args.overrides)
    at = own_threshold(cfg, file) if args.at is None else args.at
    if args.json:
        Path(args.json).parent.mkdir(parents=True, exist_ok=True)

    result = label_quality(cfg, file, args.stream, at, args.precision, device)
    print(page(result))
    if args.json:
        write_json(Path(args.json), result)


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


def own_threshold(cfg: Config, file: Path) -> Threshold:
    """The method's own, one or (K,); else AT. ValueError for one that is finer than what is counted."""
    options = method_class(system_of(cfg).methods, cfg, "supervised").options_of(cfg)
    threshold = float(getattr(options, "threshold", AT))
    if getattr(options, "class_thresholds", None) is None:
        try:
            places_of(threshold)
        except ValueError as error:
            raise ConfigError(f"{cfg.name}: method.{error}; give another by --at") from error
        return threshold

    thresholds = ClassThresholds(cfg.model.num_classes, threshold, options.class_thresholds)
    with safe_open(file, "pt") as tensors:
        if CLASS_CONFIDENCE not in tensors.keys():  # noqa: SIM118, it is no mapping
            text = "the checkpoint holds no mean confidence of classes; set it to null, or give --at"
            raise ConfigError(f"{cfg.name}: method.class_thresholds: {text}")
        thresholds.confidence.copy_(tensors.get_tensor(CLASS_CONFIDENCE))
        there = CLASS_SEEN in tensors.keys()  # noqa: SIM118
        thresholds.seen.copy_(tensors.get_tensor(CLASS_SEEN) if there else torch.ones_like(thresholds.seen))

    of_classes = thresholds.of(torch.arange(cfg.model.num_classes)).double().numpy()
    return np.ceil(of_classes * BINS - 1e-3) / BINS


def label_quality(
    cfg: Config, file: Path, stream: str | None, at: Threshold, precision: float, device: torch.device
) -> dict[str, Any]:
    """All figures, as JSON holds them. ValueError before any work for what cannot be counted."""
    refuse_other_labels(cfg)
    places_of(at)  # whether they are thresholds
    name, dataset = images_of(cfg, stream)
    use_tf32(cfg.train, device)
    network = load_model(cfg.model, file, labelling(cfg, file)).to(device)
    quality = count(network, dataset, cfg, device)
    row = dataset.row
    values: list[Threshold] = [*THRESHOLDS] if isinstance(at, np.ndarray) else sorted({*THRESHOLDS, at})
    own = [at_threshold(quality, at, row.tail)] if isinstance(at, np.ndarray) else []

    return {
        "run": cfg.name,
        "commit": commit(),
        "images": len(chosen_images(dataset, cfg.eval)),
        "stream": name,
        "at": at.tolist() if isinstance(at, np.ndarray) else at,
        "precision": precision,
        "thresholds": [at_threshold(quality, value, row.tail) for value in values] + own,
        "classes": of_classes(quality, row.classes, at, precision),
    }


def refuse_other_labels(cfg: Config) -> None:
    """ConfigError where a step makes its labels of more than a network's answer."""
    elsewhere = method_class(system_of(cfg).methods, cfg, "supervised").labels_from
    if elsewhere:
        raise ConfigError(f"{cfg.name}: method.name: {cfg.method.get('name')} takes its labels from {elsewhere}")

    options = method_class(system_of(cfg).methods, cfg, "supervised").options_of(cfg)
    if getattr(options, "branch", False) and getattr(options, "gate", False):
        text = (
            "a step's labels are those that the branch lets through, which are not made here; set it to false to see "
        )
        raise ConfigError(f"{cfg.name}: method.gate: true: {text}those before the gate")

    if cfg.remedies.get("pseudo_prior"):
        text = "a step adds the prior to the logits that it makes labels of, which this does not; set it to false"
        raise ConfigError(f"{cfg.name}: remedies.pseudo_prior: {text}")
    if cfg.eval.logit_adjustment:
        text = "it changes predictions, and no label of a step; set it to 0"
        raise ConfigError(f"{cfg.name}: eval.logit_adjustment: {cfg.eval.logit_adjustment:g}: {text}")


def labelling(cfg: Config, file: Path) -> str | None:
    """The prefix of the network that labels in a step: a teacher, else the one that is trained. None, the one that
    predicts, in a run whose steps label nothing."""
    with safe_open(file, "pt") as tensors:
        prefixes = {name.partition(".")[0] + "." for name in tensors.keys()}  # noqa: SIM118
    if TEACHER in prefixes:
        return TEACHER

    labels = any(not source.labels for source in cfg.data.streams.values())
    return MODEL if labels and AVERAGE in prefixes else None


def images_of(cfg: Config, stream: str | None) -> tuple[str, SegmentationDataset]:
    """The images to label, and what to call them."""
    without = [name for name, source in cfg.data.streams.items() if not source.labels]
    if stream is None and not without:
        return VALIDATION, SegmentationDataset(cfg.data.val)

    name = without[0] if stream is None else stream
    source = pick(cfg.data.streams, name, f"{cfg.name}: --stream")
    dataset = SegmentationDataset(replace(source, labels=True, maps={}))
    known, wanted = dataset.row.num_classes, cfg.model.num_classes
    if known != wanted:
        text = f"data set {dataset.row.name!r} has {known} classes, the network {wanted}"
        raise ConfigError(f"{cfg.name}: data.streams.{name}: {text}; make them equal")

    return name, dataset


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


def at_threshold(quality: LabelQuality, threshold: Threshold, tail: tuple[int, ...]) -> dict[str, Any]:
    """What a threshold keeps, in shares. The tail's are those of its predicted classes; recall is a mean over it.
    `threshold` is None for one of each class."""
    classes = list(tail)
    recall = quality.recall(threshold)[classes]
    figures = {
        "threshold": np.nan if isinstance(threshold, np.ndarray) else threshold,
        "kept": quality.kept(threshold),
        "right": quality.accuracy(threshold),
        "tail_labels": float(quality.shares(threshold)[classes].sum()) if classes else np.nan,
        "tail_right": quality.accuracy(threshold, classes),
        "tail_recall": float(np.nanmean(recall)) if np.isfinite(recall).any() else np.nan,
    }
    return {key: number(value) for key, value in figures.items()}


def of_classes(
    quality: LabelQuality, classes: tuple[str, ...], at: Threshold, precision: float
) -> list[dict[str, Any]]:
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
        threshold = "of class" if item["threshold"] is None else f"{item['threshold']:g}"
        lines.append(f"{threshold:>9}  {own}  |             {tail}")

    lines += ["", *at_of(result)]
    titles = "  ".join(f"{title:>7}" for title in columns.values())
    lines.append(f"{'class':<{wide}}  {titles}  {goal:>9}  {'recall':>7}")
    for item in classes:
        cells = "  ".join(cell(item[key]) for key in columns)
        found = "never" if item["threshold"] is None else f"{item['threshold']:.3f}"
        lines.append(f"{item['name']:<{wide}}  {cells}  {found:>9}  {cell(item['recall_there'])}")

    return "\n".join(lines)


def at_of(result: Mapping[str, Any]) -> list[str]:
    """The threshold of the table of classes, in words."""
    at = result["at"]
    if not isinstance(at, list):
        return [f"at {at:g}:"]

    each = (f"{item['name']} {value:g}" for item, value in zip(result["classes"], at, strict=True))
    return [f"at each class's own threshold: {', '.join(each)}"]


def cell(share: float | None) -> str:
    return f"{'–':>7}" if share is None else f"{100 * share:>7.2f}"


if __name__ == "__main__":
    cli.run(main)
