"""The wiring that every entry point shares: streams, validation, and the last files of a run's folder."""

import os
import shlex
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from common import distributed
from common.config import Config, ConfigError, typed
from common.data import DatasetRow, SegmentationDataset, check, make_loaders, make_streams
from common.data.coverage import coverage_warnings
from common.data.groups import grouping, groups_config
from common.data.statistics import Statistics, class_statistics
from common.data.streams import hold_images
from common.engine.checkpoint import refuse_earlier
from common.engine.method import Method, MethodContext
from common.engine.trainer import Streams
from common.evaluation import evaluate, format_table
from common.evaluation.adjustment import adjusted_by, offsets_of
from common.evaluation.per_image import FILE as PER_IMAGE
from common.files import read_json, write_json
from common.losses.build import Remedies
from common.losses.counts import Counts
from common.report import RunFolder, write_report

REPORT = "report.html"


class Counted(NamedTuple):
    """The labels that say what is rare; where they are trained on, the shares (N,) of the draws of their images."""

    dataset: SegmentationDataset
    statistics: Statistics
    shares: np.ndarray | None


class Experiment:
    """The data of a run: streams, validation set, and statistics of the stream that says what is rare.

    Everything that can be wrong with the files is found here, before a process group is joined or a model built:
    folders, pairing, empty files, and a model whose class count is not the data set's. Raises ValueError.
    """

    def __init__(self, cfg: Config, counted: str | None = None, train: bool = True):
        """`counted`: the stream whose labels are counted; None counts nothing. `train`: whether streams are needed."""
        self.cfg = cfg
        self.cache = Path(cfg.data.cache or Path(cfg.output) / ".cache")
        self.streams = make_streams(cfg.data, cfg.seed, self.cache) if train else {}
        self.val = SegmentationDataset(cfg.data.val)

        for dataset in (*(stream.dataset for stream in self.streams.values()), self.val):
            check(dataset)

        self._check_classes()
        if train and cfg.eval.best == "miou_tail" and not self.val.row.tail:
            raise ConfigError(
                f"{cfg.name}: eval.best: miou_tail: data set {self.val.row.name!r} names no tail, so no checkpoint "
                "would be the best; set it to miou"
            )

        tau = cfg.eval.logit_adjustment  # refused now, not where training ends
        adjusted_by(cfg.remedies, tau, f"{cfg.name}: eval.logit_adjustment: {tau:g}")
        groups = groups_config(cfg.data.groups, self.val.row)

        self.counted = None if counted is None else self._count(counted)
        self.counts: dict[str, Any] | None = None  # what the report shows of them
        statistics = None if self.counted is None else self.counted.statistics
        self.grouping = grouping(groups, self.val.row, statistics)

    def _count(self, stream: str) -> Counted:
        known = self.streams.get(stream)
        dataset = (
            SegmentationDataset(self.cfg.data.streams[stream])
            if known is None
            else known.dataset
        )
        statistics = class_statistics(dataset, self.cfg.data.workers, self.cache)
        shares = None if known is None else known.order.shares(len(dataset))
        return Counted(dataset, statistics, shares)

    @property
    def context(self) -> MethodContext:
        """What the method gets to know of the data. ValueError where no stream was counted."""
        if self.counted is None:
            raise ValueError(
                f"{self.cfg.name}: a method needs the class statistics of a labelled stream"
            )
        counted = self.counted
        return MethodContext(counted.statistics, counted.dataset.row, counted.shares)

    def _check_classes(self) -> None:
        for name, dataset in (
            *((n, s.dataset) for n, s in self.streams.items()),
            ("val", self.val),
        ):
            known = dataset.row.num_classes
            wanted = self.cfg.model.num_classes
            if known != wanted:
                raise ConfigError(
                    f"{self.cfg.name}: model.num_classes is {wanted}, but data set {dataset.row.name!r} ({name}) has "
                    f"{known} classes; make them equal"
                )

        for name, stream in self.streams.items():
            if stream.dataset.source.labels:
                same_classes(
                    f"{self.cfg.name}: data.streams.{name}", stream.dataset.row, self.val.row
                )

    def open(self, step: int) -> Streams:
        """The iterators of all streams from `step` on, for this rank.

        `fit` calls it when all has been checked: the run begins, and its counts are left in `statistics.json`.
        """
        if self.counts is not None:
            self.cfg.folder.mkdir(parents=True, exist_ok=True)
            write_json(self.cfg.folder / "statistics.json", self.counts)

        hold_images(self.streams, self.cfg.data, self.cache)
        rank = distributed.rank()
        world = distributed.world_size()
        return make_loaders(
            self.cfg.data, self.cfg.train, step, rank, world, streams=self.streams
        )

    def evaluator(
        self, method: Method, device: torch.device
    ) -> Callable[[int], dict[str, Any]]:
        """What `fit` calls to validate; the newest result stands in the run's `evaluation.json`."""

        def validate(step: int) -> dict[str, Any]:
            folder = self.cfg.folder
            result = self.score(
                method, device, panels=folder / "panels", per_image=folder / PER_IMAGE
            )
            result = {"step": step, **result}
            if distributed.rank() == 0:
                write_json(self.cfg.folder / "evaluation.json", result)

            return result

        return validate

    def score(
        self,
        model: torch.nn.Module,
        device: torch.device,
        checkpoint: str | Path | None = None,
        **options: Any,
    ) -> dict[str, Any]:
        """`evaluate` on the validation set, with rare, common and frequent groups where they are known (`group_rule`
        says by what). checkpoint: the model's, which tells the counts of logit adjustment where none were made."""
        options = {
            "groups": self.levels(),
            "rank": distributed.rank(),
            "world": distributed.world_size(),
            **options,
        }
        cfg = options.pop("cfg", self.cfg.eval)
        counted = None if self.counted is None else self.counted.statistics.pixel_count.tolist()
        offsets = offsets_of(replace(self.cfg, eval=cfg), checkpoint, counted)
        result = evaluate(model, self.val, cfg, device=device, offsets=offsets, **options)

        return {**result, "group_rule": self.grouping.rule} if self.grouping else result

    def levels(self) -> Mapping[str, Sequence[str]] | None:
        """Level of counting → each class's group; None where nothing says what is rare."""
        return self.grouping.levels if self.grouping else None

    def last_result(self) -> dict[str, Any]:
        """The newest validation of this run."""
        return read_json(self.cfg.folder / "evaluation.json")

    def finish(self) -> None:
        """Mark the run as complete, for drivers that skip finished steps, and leave its report."""
        if distributed.rank() == 0:
            (self.cfg.folder / "done").touch()
        leave_report(self.cfg.folder / REPORT, [self.cfg.folder])

    def begin(self, resume: bool) -> None:
        """Find what stands against the run, while that costs nothing yet: an earlier run, a folder not to write in.

        Nothing is written before `open`. Says what the training labels lack. Raises ValueError or OSError.
        """
        if not resume:
            refuse_earlier(self.cfg.folder)

        if distributed.rank() != 0:
            return

        there = next(
            path
            for path in (self.cfg.folder, *self.cfg.folder.absolute().parents)
            if path.exists()
        )
        if not (there.is_dir() and os.access(there, os.W_OK)):
            raise OSError(f"{there}: no folder to write in; set `output` to another")

        if self.counted is not None:
            self.counts = counts_of(self.counted.dataset, self.counted.statistics)
            self.counts |= self._sampled_counts(self.counted)

    def _sampled_counts(self, counted: Counted) -> dict[str, Any]:
        """What remedies that go by the sampler count, which is said; nothing where they go by the data set."""
        chosen = typed(Remedies, self.cfg.remedies, f"{self.cfg.name}: remedies").counts.of
        if chosen == "dataset":
            return {}

        sampled = Counts.from_statistics(counted.statistics, counted.shares)
        print(
            "remedies: classes are counted as the sampler is expected to show the images (counts.of: sampled)"
        )

        return {
            "sampled_pixels": sampled.pixels.tolist(),
            "sampled_images": sampled.images.tolist(),
        }


def same_classes(where: str, row: DatasetRow, val: DatasetRow) -> None:
    """Whether labels mean in training what they mean in validation, for data sets with as many classes.

    ConfigError where both name the same classes in different orders; a warning where names differ.
    """
    pairs = zip(row.classes, val.classes, strict=True)
    k, (ours, theirs) = next(
        ((k, pair) for k, pair in enumerate(pairs) if pair[0] != pair[1]), (0, ("", ""))
    )
    if ours == theirs:
        return

    apart = (
        f"{where}: class {k} is {ours!r} in {row.name!r}, but {theirs!r} in {val.name!r} (val)"
    )
    if set(row.classes) == set(val.classes):
        raise ConfigError(
            f"{apart}, which have the same classes in different orders; list `classes` of both in one, and bring the "
            "stored values to it by `label_map`"
        )

    warnings.warn(f"{apart}: equal numbers are taken for one class", stacklevel=3)


def counts_of(dataset: SegmentationDataset, statistics: Statistics) -> dict[str, Any]:
    """What the report shows of the training labels. What these lack is said on the way."""
    lacks = coverage_warnings(dataset, statistics)
    for lack in lacks:
        warnings.warn(lack, stacklevel=3)

    return {
        "class_pixels": statistics.pixel_count.tolist(),
        "class_images": statistics.image_count.tolist(),
        "num_images": statistics.num_images,
        "warnings": lacks,
    }


def leave_report(file: Path, runs: Sequence[Path]) -> None:
    """Write the report of runs that have ended, the first as the baseline; rank 0.

    Whatever goes wrong is said in one line and no more: the runs are whole without their report.
    """
    if distributed.rank() != 0:
        return

    command = shlex.join(
        ["python", "scripts/report.py", *map(str, runs), "--output", str(file)]
    )
    try:
        write_report(file, [RunFolder.load(run) for run in runs], command=command)
    except Exception as error:
        # of any kind: a training of days does not fail by its last picture
        reason = " ".join(str(error).split()) or type(error).__name__
        warnings.warn(f"{file}: not written ({reason}); {command} tries again", stacklevel=2)
        return

    print(f"report written to {file}")


def print_result(result: dict[str, Any], baseline: dict[str, Any] | None = None) -> None:
    """The table of an evaluation, on rank 0."""
    if distributed.rank() == 0:
        print(format_table(result, baseline))
