"""Which remedies would do anything on a config's training data: python scripts/remedies.py CONFIG [key=value …].

Nothing is trained. Printed are, of every class, its images and pixels, how large it is on the network's own grid at the
size at which the config evaluates, and what class weights, logit adjustment and samplers would give it; then, of every
remedy by name, how much it would change with its default options, and which would change nothing. docs/remedies.md says
what each of them does.
"""

import argparse
import math
import sys
import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for the other scripts, which are not installed

from common import cli
from common.config import Config, ConfigError, EvalConfig, load_config, typed
from common.data import SegmentationDataset, Statistics, class_statistics
from common.data.decoding import opened, read_bytes
from common.data.orders import SamplerConfig, images_of_classes, make_order, rare_class_probabilities
from common.data.statistics import repeat_factors
from common.engine.method import method_class
from common.files import refuse_to_overwrite, write_json
from common.inference import edge_size
from common.losses.build import LOSSES, LossContext, Taken, build_loss
from common.losses.counts import Counts
from common.losses.pixel_loss import PixelLoss
from common.models import SegmentationModel, build_model
from common.models.cosine import SCALE, cosine_scale
from common.ops.resize import Size
from scripts.systems import system_of

LOOKED_AT = 64  # labels that are opened for the width of the classes
SIDE = 256  # of the image that tells the network's stride
INERT = 1e-3  # relative: what differs by less is the same for all classes
THRESHOLDS = {"image": 0.001, "pixel": 0.05}  # of repeat factors: the default, and one that acts on dense labels


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cli.add_words(parser)
    parser.add_argument("--stream", help="whose labels are counted (default: the first with labels)")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--cache", metavar="DIR", help="keep the counts there")
    parser.add_argument("--json", metavar="FILE", help="also write the figures there")
    cli.add_force(parser)
    cli.add_quiet(parser)
    args = cli.parse(parser)
    refuse_to_overwrite(filter(None, [args.json]), args.force)

    cfg = load_config(args.config, args.overrides)
    taken = method_class(system_of(cfg).methods, cfg, "supervised").takes(cfg)
    name = cli.labelled_stream(cfg, args.stream)
    dataset = SegmentationDataset(cfg.data.streams[name])
    statistics = class_statistics(dataset, args.workers, args.cache)
    result = describe(cfg, name, dataset, statistics, taken)
    print(page(result))
    if args.json:
        path = Path(args.json)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, result)


def describe(
    cfg: Config, stream: str, dataset: SegmentationDataset, statistics: Statistics, taken: Taken
) -> dict[str, Any]:
    """All figures, as JSON holds them. taken: by the config's method."""
    if not statistics.pixel_count.any():
        raise ConfigError(f"{cfg.name}: data.streams.{stream}: no training label shows a class; correct the labels")
    counts = taken.counted(Counts.from_statistics(statistics))
    losses = {name: of_loss(name, counts) for name, row in LOSSES.items() if row.slot in ("logits", "class_weight")}
    samplers = of_samplers(cfg, stream, statistics)
    seen = sampled_counts(cfg, stream, dataset, statistics)
    model = unweighted(cfg)
    stride = stride_of(model)
    facts = facts_of(cfg, model, taken)

    return {
        "stream": stream,
        "images": statistics.num_images,
        "stride": stride,
        "evaluated_at": in_words(cfg.eval),
        "classes": classes_of(dataset, statistics, resized(dataset, cfg.eval) / stride, losses, samplers),
        "losses": {name: {"slot": LOSSES[name].slot, "span": span(values)} for name, values in losses.items()},
        "by": "images" if taken.by_images else "pixels",
        "refused": {name: why for name in LOSSES if (why := refusal(name, counts, taken, facts))},
        "anywhere": [name for name, row in LOSSES.items() if row.slot in ("focus", "sets")],
        "repeat_factor": samplers["repeat_factor"],
        "shares": counts.prior().tolist(),
        "sampled": None if seen is None else taken.counted(seen).prior().tolist(),
    }


def facts_of(cfg: Config, model: SegmentationModel, taken: Taken) -> dict[str, Any]:
    """What the network and the method tell a loss: fields of LossContext."""
    return {
        "cosine": cosine_scale(cfg.model),
        "features": model.embedding_channels if taken.features else None,
        "full_size": taken.full_size,
    }


def made(name: str, counts: Counts, facts: Mapping[str, Any]) -> PixelLoss:
    """The loss of one remedy with its default options. facts: fields of LossContext."""
    slot, remedy = LOSSES[name].slot, {"name": name}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that a remedy changes nothing is said by the page
        return build_loss({slot: [remedy] if slot == "sets" else remedy}, LossContext(counts, **facts))


def refusal(name: str, counts: Counts, taken: Taken, facts: Mapping[str, Any]) -> str:
    """Why a remedy, with its default options, cannot be had with the config's method or network; empty where it can."""
    slot = LOSSES[name].slot
    if slot in taken.refused:
        return taken.refused[slot]

    try:
        made(name, counts, facts)
    except ConfigError as error:
        return str(error)
    return ""


def of_loss(name: str, counts: Counts) -> list[float]:
    """The vector (K,) that a remedy makes of the counts: offsets or margins, or weights."""
    loss = made(name, counts, {"cosine": SCALE})  # as if the network had the classifier that it needs
    if LOSSES[name].slot == "class_weight":
        return loss.weights.tolist()
    amplitude = getattr(loss.logits, "amplitude", 1.0)  # of noise: what it reaches, not its mean
    return (amplitude * loss.offsets).tolist()


def span(values: list[float]) -> float:
    """How far the classes are treated apart: 0 where all are treated alike."""
    return max(values) - min(values)


def of_samplers(cfg: Config, stream: str, statistics: Statistics) -> dict[str, Any]:
    """Of rare_class by the stream's own options: probabilities (K,), images that stand for a class (K,). Of
    repeat_factor by level: threshold, lowest, mean and highest factor."""
    sampler = typed(SamplerConfig, cfg.data.streams[stream].sampler, f"data.streams.{stream}.sampler")
    factors = {}
    for level, threshold in THRESHOLDS.items():
        found = repeat_factors(statistics, threshold, level)
        figures = {"lowest": found.min(), "mean": found.mean(), "highest": found.max()}
        factors[level] = {"threshold": threshold, **{key: float(value) for key, value in figures.items()}}

    return {
        "rare_class": rare_class_probabilities(statistics.pixel_count, sampler.temperature).tolist(),
        "enough": [len(images) for images in images_of_classes(statistics, sampler)],
        "repeat_factor": factors,
    }


def sampled_counts(cfg: Config, stream: str, dataset: SegmentationDataset, statistics: Statistics) -> Counts | None:
    """Counts as the stream's own sampler is expected to show whole images; None where that refuses the labels."""
    sampler = typed(SamplerConfig, cfg.data.streams[stream].sampler, f"data.streams.{stream}.sampler")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that a sampler changes nothing is said by the page
            order = make_order(sampler, dataset, cfg.seed, stream, statistics=statistics)
    except ValueError:
        return None

    return Counts.from_statistics(statistics, order.shares(len(dataset)))


def classes_of(
    dataset: SegmentationDataset,
    statistics: Statistics,
    grid: np.ndarray,
    losses: dict[str, list[float]],
    samplers: dict[str, Any],
) -> list[dict[str, Any]]:
    """One row a class. `cells`: its median area in an image that shows it, `width`: its median horizontal run, both on
    the network's grid; None where no label that was looked at shows it. grid: (N, 2), cells of that grid to a pixel of
    each label, along its height and width."""
    total = statistics.pixel_count.sum()
    widths = run_widths(dataset, grid[:, 1])
    areas = grid.prod(1)
    rows = []
    for k, name in enumerate(dataset.row.classes):
        shown = statistics.presence[:, k]
        rows.append(
            {
                "name": name,
                "images": int(statistics.image_count[k]),
                "share": float(statistics.pixel_count[k] / total),
                "cells": float(np.median((statistics.pixels[:, k] * areas)[shown])) if shown.any() else None,
                "width": widths.get(k),
                "losses": {remedy: values[k] for remedy, values in losses.items()},
                "rare_class": samplers["rare_class"][k],
                "enough": samplers["enough"][k],
            }
        )
    return rows


def resized(dataset: SegmentationDataset, cfg: EvalConfig) -> np.ndarray:
    """Sides of the network's input over those of each label (N, 2), height and width, where images of the labels' sizes
    are evaluated at the largest of the config's scales."""
    if cfg.short_edge is None:
        return np.full((len(dataset), 2), max(cfg.scales))

    found = []
    for record in dataset.records:
        with opened(read_bytes(record.label, "label")) as image:
            size = (image.height, image.width)
        found.append(np.divide(input_size(size, cfg), size))
    return np.array(found)


def input_size(size: Size, cfg: EvalConfig) -> Size:
    """Height and width of the largest input that the network is given of an image (H, W) where `short_edge` is set."""
    longest = cfg.max_edge or math.inf
    once = edge_size(size, cfg.short_edge, longest)
    if not cfg.flip and tuple(cfg.scales) == (1.0,):
        return once

    scale = max(cfg.scales)
    return edge_size(once, cfg.short_edge * scale, cfg.scaled_max_edge or longest * scale)


def in_words(cfg: EvalConfig) -> str:
    """The size of `input_size`, as the legend has it."""
    scale = max(cfg.scales)
    if cfg.short_edge is None:
        size = "their own size" if scale == 1 else f"{scale:g} times their size"
    else:
        size = f"a shorter side of {cfg.short_edge * scale:g} pixels"
        size += ", less where the longer one has a limit" if cfg.max_edge or cfg.scaled_max_edge else ""

    several = len(set(cfg.scales)) > 1
    return f"{size} (the largest of eval.scales)" if several else size


def run_widths(dataset: SegmentationDataset, cells: np.ndarray) -> dict[int, float]:
    """Class → the median length of its horizontal runs in at most LOOKED_AT labels, evenly spread. cells: (N,), those
    of the network's grid to a pixel of each label."""
    chosen = np.unique(np.linspace(0, len(dataset) - 1, min(len(dataset), LOOKED_AT)).astype(int))
    found = [(classes, lengths * cells[i]) for i in chosen for classes, lengths in [runs(dataset.label(i))]]
    classes, lengths = (np.concatenate(part) for part in zip(*found, strict=True))
    return {int(k): float(np.median(lengths[classes == k])) for k in np.unique(classes) if k >= 0}


def runs(label: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Class and length of every horizontal run of a label (H, W)."""
    begins = np.ones(label.shape, bool)
    begins[:, 1:] = label[:, 1:] != label[:, :-1]
    starts = np.flatnonzero(begins)
    return label.ravel()[starts], np.diff(np.append(starts, label.size))


def unweighted(cfg: Config) -> SegmentationModel:
    """The network without any weights: nothing is computed with it."""
    with torch.device("meta"):
        return build_model(replace(cfg.model, pretrained=False, checkpoint=None)).eval()


def stride_of(model: SegmentationModel) -> float:
    """Pixels of a network's input for one of its output, along a side."""
    with torch.device("meta"):
        out = model(torch.empty(1, 3, SIDE, SIDE))
    maps = out["logits"] if "logits" in out else out["pred_masks"]
    return SIDE / maps.shape[-1]


# As text ------------------------------------------------------------------------------------------------------------

COLUMNS = ("inverse", "sqrt", "median_frequency", "effective_number", "logit_adjustment", "blv")


def page(result: dict[str, Any]) -> str:
    """The figures as text."""
    lines = [
        f"stream {result['stream']!r}: {result['images']} images; the network's output has stride {result['stride']:g}",
        "",
        *class_table(result["classes"]),
        "",
        "cells, width: median area and median horizontal run on the network's grid; a width below 1 is hard to show",
        f"both at the size at which the config evaluates: images at {result['evaluated_at']}",
        "enough: images that rare_class sampling would show for the class, P: its probability to be drawn",
        f"weights and offsets of the loss's remedies go by the {result['by']} of each class",
        "",
        *verdicts(result),
    ]
    return "\n".join(lines)


def class_table(classes: list[dict[str, Any]]) -> list[str]:
    """One line a class, the rarest first."""
    wide = max(len(item["name"]) for item in classes)
    figures = f"{'images':>6}  {'share %':>8}  {'cells':>9}  {'width':>6}"
    remedies = "".join(f"  {name:>16}" for name in COLUMNS)
    lines = [f"{'class':<{wide}}  {figures}{remedies}  {'enough':>6}  {'P':>5}"]
    for item in sorted(classes, key=lambda item: item["share"]):
        cells = "".join(f"  {item['losses'][name]:>16.3f}" for name in COLUMNS)
        sizes = [f"{'–':>9}" if item["cells"] is None else f"{item['cells']:>9.1f}"]
        sizes += [f"{'–':>6}" if item["width"] is None else f"{item['width']:>6.2f}"]
        lines.append(
            f"{item['name']:<{wide}}  {item['images']:>6}  {100 * item['share']:>8.3f}  {'  '.join(sizes)}{cells}"
            f"  {item['enough']:>6}  {item['rare_class']:>5.3f}"
        )
    return lines


def verdicts(result: dict[str, Any]) -> list[str]:
    """One line a remedy: what it would change."""
    found = {}
    for name, item in result["losses"].items():
        what = "offsets or margins" if item["slot"] == "logits" else "weights"
        acts = f"{what} that differ by up to {item['span']:.3g}"
        inert = "changes nothing: all classes are treated alike"
        found[f"{item['slot']} {name}"] = acts if item["span"] > INERT else inert
        if name in result["refused"]:
            found[f"{item['slot']} {name}"] += f"; refused: {result['refused'][name]}"

    for level, item in result["repeat_factor"].items():
        low, mean, high = (item[key] for key in ("lowest", "mean", "highest"))
        acts = f"factors {low:.2f} to {high:.2f}, mean {mean:.2f}"
        name = f"sampler repeat_factor, {level} {item['threshold']:g}"
        found[name] = acts if high - low > INERT else "changes nothing: all factors are equal"

    found["counts of: sampled"] = _of_sampled_counts(result)
    found["sampler rare_class"] = _of_rare_class(result)
    shown = sum(item["images"] > 0 for item in result["classes"])
    found["sampler class_uniform"] = f"each of {shown} classes in one crop in {2 * shown}"
    for name in result["anywhere"]:
        refused = result["refused"].get(name)
        found[f"{LOSSES[name].slot} {name}"] = f"refused: {refused}" if refused else "acts on any data"

    wide = max(map(len, found))
    return [f"{name:<{wide}}  {text}" for name, text in found.items()]


def _of_sampled_counts(result: dict[str, Any]) -> str:
    if result["sampled"] is None:
        return "refused: the stream's sampler refuses the labels"

    shares = zip(result["classes"], result["shares"], result["sampled"], strict=True)
    factors = {item["name"]: seen / share for item, share, seen in shares if share}
    most = max(factors, key=factors.__getitem__)
    least = min(factors, key=factors.__getitem__)
    if factors[most] - factors[least] < INERT:
        return "changes nothing: the stream's sampler shows all images alike"
    return f"shares of {least} × {factors[least]:.2f} to {most} × {factors[most]:.2f} by the stream's sampler"


def _of_rare_class(result: dict[str, Any]) -> str:
    drawn = [item for item in result["classes"] if item["rare_class"] > 0]
    empty = [item["name"] for item in drawn if not item["enough"]]
    if empty:
        return f"refused: no image has enough of {', '.join(empty)}; lower min_share"

    often = max(drawn, key=lambda item: item["rare_class"] / item["enough"])
    share = 100 * often["rare_class"]
    return f"{share:.0f} % of the draws show {often['name']}, from {often['enough']} of {result['images']} images"


if __name__ == "__main__":
    cli.run(main)
