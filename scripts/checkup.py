"""Whether a config can be trained on this machine: its files, its labels, and one step. For scripts/doctor.py."""

import os
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from common import cli, distributed
from common.config import Config, SourceConfig
from common.data import IGNORE, SegmentationDataset, check
from common.data.catalogue.registry import home, row_of
from common.data.streams import Stream, collate
from common.engine import prepare, rehearse, runtime
from common.engine.trainer import Trainer
from common.experiment import Experiment
from scripts.systems import system_of

SIZE = 2  # images a stream in the step that is tried: batch norm refuses one alone
UNTRIED = "not tried: the data come first"


class Finding(NamedTuple):
    """A line about one thing; `fault` says what to do where it stands against training."""

    name: str
    text: str
    fault: str = ""


def sources(cfg: Config) -> dict[str, SourceConfig]:
    """The training streams and the validation set, by name."""
    return {**cfg.data.streams, "val": cfg.data.val}


# Files --------------------------------------------------------------------------------------------------------------


def look_for(name: str, source: SourceConfig) -> tuple[Finding, SegmentationDataset | None]:
    """Whether every image, label and list of a source is there, and the data set where it is. Maps of an earlier step
    are left to the step that is tried, which knows what makes them."""
    try:
        dataset = SegmentationDataset(replace(source, maps={}))
        check(dataset)
    except (ValueError, OSError) as error:
        said = " ".join(str(error).split())
        text = said + (dangling(source, said) or _maker(source))
        return Finding(f"data {name}", text, f"data {name}: {text}"), None

    labelled = f"{len(dataset)} labels" if source.labels else "no labels asked for"
    return Finding(f"data {name}", f"{len(dataset)} images, {labelled}, in {dataset.root}"), dataset


def dangling(source: SourceConfig, said: str) -> str:
    """The link that leads nowhere, as the end of the line `said` about a missing file; "" where none does."""
    try:
        row = row_of(source)
        root = Path(source.root).expanduser() if source.root else home(row)[0]
    except ValueError:
        return ""

    named = Path(said.partition(": ")[0])
    for path in (*_upwards(root), *_upwards(named), *_entries(root)):
        if path.is_symlink() and not path.exists():
            return f"; {path} is a link to {os.readlink(path)}, which is not there"

    return ""


def _maker(source: SourceConfig) -> str:
    """What makes the list of a source, where it is that which is missing."""
    if source.list is None or Path(source.list).exists():
        return ""
    return "; scripts/prepare_splits.py CONFIG makes those of semi_sup"


def _upwards(path: Path) -> tuple[Path, ...]:
    return (path, *path.parents)


def _entries(root: Path, depth: int = 2) -> Iterator[Path]:
    """What lies in a folder, and in the folders there."""
    if not root.is_dir() or depth == 0:
        return

    for entry in sorted(root.iterdir()):
        yield entry
        if entry.is_dir():
            yield from _entries(entry, depth - 1)


# Labels -------------------------------------------------------------------------------------------------------------


@dataclass
class Histogram:
    """What some labels hold: pixels and images of each class (K,), ignored pixels, and the pixels and images of stored
    values that are none of the classes."""

    pixels: np.ndarray
    images: np.ndarray
    ignored: int = 0
    strays: Counter[str] = field(default_factory=Counter)
    stray_images: Counter[str] = field(default_factory=Counter)

    @property
    def total(self) -> int:
        return int(self.pixels.sum()) + self.ignored + self.strays.total()


def chosen(dataset: SegmentationDataset, count: int) -> list[int]:
    """At most `count` indices, evenly over the set."""
    places = np.linspace(0, len(dataset) - 1, min(count, len(dataset)))
    return sorted({round(float(place)) for place in places})


def histogram(dataset: SegmentationDataset, indices: list[int]) -> Histogram:
    """What the label files of these images hold. ValueError for a file that cannot be read."""
    k = dataset.row.num_classes
    found = Histogram(np.zeros(k, np.int64), np.zeros(k, np.int64))

    for index in indices:
        path = dataset.records[index].label
        table = dataset.row.label_table(path)
        values, counts = np.unique(table.stored(path), return_counts=True)
        shown: set[int] = set()
        for value, pixels in zip(values.tolist(), counts.tolist(), strict=True):
            class_id = table.entries.get(value, IGNORE if table.unlisted == "ignore" else None)
            if class_id is None:
                found.strays[table.describe(value)] += pixels
                found.stray_images[table.describe(value)] += 1
            elif class_id == IGNORE:
                found.ignored += pixels
            else:
                found.pixels[class_id] += pixels
                shown.add(class_id)
        found.images[list(shown)] += 1

    return found


def look_at_labels(name: str, dataset: SegmentationDataset, count: int) -> tuple[list[str], Finding]:
    """The lines of a histogram of some labels, and what it says. Images and labels are decoded as training does."""
    indices = chosen(dataset, count)
    looked = f"{len(indices)} of {len(dataset)} labels looked at"
    try:
        found = histogram(dataset, indices)
        lines = table(found, dataset.row.classes, len(indices))
        fault = _stray(found, dataset)
        if not fault:
            for index in indices:
                dataset.load(index)
    except ValueError as error:
        return [], Finding(f"labels {name}", str(error), str(error))

    if not fault and not found.pixels.any():
        fault = f"labels {name}: every pixel looked at is ignored; correct the label map"
    absent = [dataset.row.classes[k] for k in np.flatnonzero(found.images == 0)]
    text = f"{looked}; in none of them: {', '.join(absent)}" if absent else f"{looked}; they show every class"

    return lines, Finding(f"labels {name}", fault or text, fault)


def _stray(found: Histogram, dataset: SegmentationDataset) -> str:
    """What to do about stored values that are no class; "" where there are none."""
    if not found.strays:
        return ""

    values = ", ".join(found.strays)
    if dataset.source.folder is not None:
        keys = ("palette", "ignore_colours") if dataset.row.encoding == "rgb" else ("label_map", "ignore")
        advice = f"add what they mean to data.folder.{keys[0]}, or to data.folder.{keys[1]}"
    else:
        advice = f"they are no labels of data.dataset: {dataset.source.dataset}; convert them, or describe the folder"
    return f"labels hold {values}, none of the {dataset.row.num_classes} classes; {advice}"


def table(found: Histogram, classes: tuple[str, ...], images: int) -> list[str]:
    """A line for each class, the ignored pixels, and each stored value that is no class."""
    total = max(found.total, 1)
    rows = [
        (f"{k:3d} {name}", pixels, f"{shown} of {images} images" if shown else "absent in these")
        for k, (name, pixels, shown) in enumerate(zip(classes, found.pixels, found.images, strict=True))
    ]
    rows.append(("    ignored", found.ignored, ""))
    rows += [
        (f"    {value}", pixels, f"{found.stray_images[value]} of {images} images: NONE OF THE CLASSES")
        for value, pixels in found.strays.items()
    ]
    wide = max(len(name) for name, _, _ in rows)

    return [f"  {name:<{wide}} {100 * pixels / total:8.3f} %  {text}".rstrip() for name, pixels, text in rows]


# One step -----------------------------------------------------------------------------------------------------------


def try_a_step(cfg: Config, device: str | None) -> Finding:
    """One forward and backward pass, and the optimiser's step, on a tiny batch of the config's own samples.

    Nothing is left of it but the counts of the labels, which training would make too.
    """
    try:
        return Finding("step", _step(cfg, device))
    except Exception as error:  # whatever stops a step is what a checkup is asked for
        text, _ = cli.describe(error)
        return Finding("step", text, text)
    finally:
        distributed.stop()


def _step(cfg: Config, device: str | None) -> str:
    system = system_of(cfg)
    cfg = system.completed(cfg)
    rehearse(cfg, system.build_method)
    cfg = tiny(cfg)
    experiment = Experiment(cfg, counted=system.counted)

    target = distributed.start(device)
    runtime.configure(cfg.train, target)
    method = prepare(cfg, system.build_method, experiment.context, target)
    trainer = Trainer(cfg, method, target)
    batches = first_batches(experiment.streams)

    start = time.perf_counter()
    scalars = trainer.step(0, {name: iter([batch]) for name, batch in batches.items()}, [])
    loss = float(scalars["loss"])
    seconds = time.perf_counter() - start

    size = "×".join(map(str, next(iter(batches.values()))["image"].shape[-2:]))
    norm = float(scalars["grad_norm"])
    return f"loss {loss:.3g}, gradient norm {norm:.3g}; {SIZE} images of {size} a stream in {seconds:.1f} s on {target}"


def tiny(cfg: Config) -> Config:
    """The config with the smallest batches that can be trained, not compiled."""
    streams = {name: replace(stream, batch_size=SIZE) for name, stream in cfg.data.streams.items()}
    data = replace(cfg.data, streams=streams)
    return replace(cfg, data=data, train=replace(cfg.train, devices=1, compile=False))


def first_batches(streams: Mapping[str, Stream]) -> dict[str, dict[str, torch.Tensor]]:
    """The first batch of every stream, made in this process."""
    return {
        name: collate([stream.sample(draw) for draw in range(stream.batch_size)]) for name, stream in streams.items()
    }
