"""Evaluation of one network in variants of its classifier, or of what is added to its scores: one pass an image."""

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from common.config import EvalConfig
from common.evaluation.loop import Tally, check, predict_batch, prediction, times
from common.evaluation.per_image import FILE as PER_IMAGE
from common.evaluation.samples import chosen_images, sample_batches
from common.models import SegmentationModel


class Stack(nn.Module):
    """Several classifiers of the same features: (B, D, h, w) to the logits of one after the other, (B, V·K, h, w)."""

    def __init__(self, classifiers: Sequence[nn.Module]):
        super().__init__()
        self.classifiers = nn.ModuleList(classifiers)

    def forward(self, features: Tensor) -> Tensor:
        return torch.cat([classifier(features) for classifier in self.classifiers], 1)


class Repeats(nn.Module):
    """A network that predicts V times on the same images, and runs once.

    The first time keeps what the network's `infer` gives, call by call (a batch may be seen at several scales, or in
    windows), the others read it: what differs among them are the offsets that `labels` and `bands` are given.
    """

    def __init__(self, network: SegmentationModel, count: int):
        super().__init__()
        self.network = network
        self.count = count
        self.chosen = 0
        self.calls = 0
        self.kept: list[Any] = []

    def each(self) -> Iterator["Repeats"]:
        """This module as every variant, in turn, on the same images. What is kept of them goes in the end."""
        for variant in range(self.count):
            self.chosen = variant
            self.calls = 0
            yield self

        self.kept.clear()

    def _infer(self, images: Tensor) -> dict[str, Any]:
        """What the network's `infer` gives for the variant."""
        if self.chosen == 0:
            self.kept.append(self._keep(self.network.infer(images)))

        out = self._own(self.kept[self.calls])
        self.calls += 1

        return out

    def _keep(self, out: dict[str, Any]) -> Any:
        return out

    def _own(self, kept: Any) -> dict[str, Any]:
        """The variant's part of what is kept of a call."""
        return kept

    def predict(self, images: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        """As a network's."""
        return self.network.scores_of(self._infer(images), images, size)

    def labels(
        self, images: Tensor, size: tuple[int, int] | None = None, offsets: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """As a network's."""
        return self.network.labels_of(self._infer(images), images, size, offsets)

    def bands(
        self, images: Tensor, size: tuple[int, int] | None = None, offsets: Tensor | None = None
    ) -> Iterator[tuple[tuple[int, int], Tensor]]:
        """As a network's."""
        return self.network.bands_of(self._infer(images), images, size, offsets)


class Variants(Repeats):
    """A network with V classifiers in the place of its own, each of which predicts as if it were the only one.

    network: its logits (B, K, h, w) are what its module `place` gives; it takes the classifiers in.
    """

    def __init__(
        self, network: SegmentationModel, place: str, classifiers: Sequence[nn.Module]
    ):
        super().__init__(network, len(classifiers))
        network.set_submodule(place, Stack(classifiers))

    def _keep(self, out: dict[str, Any]) -> tuple[Tensor, ...]:
        return parts(out["logits"], self.count)

    def _own(self, kept: tuple[Tensor, ...]) -> dict[str, Any]:
        return {"logits": kept[self.chosen]}


def parts(logits: Tensor, count: int) -> tuple[Tensor, ...]:
    """Logits (B, V·K, h, w) as those of each variant, in the same memory format: it decides how sums are rounded."""
    last = torch.channels_last
    same = last if logits.is_contiguous(memory_format=last) else torch.contiguous_format
    return tuple(part.contiguous(memory_format=same) for part in logits.chunk(count, 1))


@dataclass(frozen=True)
class View:
    """How one variant is evaluated, on the images of the others and at their sizes.

    folder: for its panels and the confusion matrices of its images.
    offsets: (K,), what `cfg.logit_adjustment` stands for.
    """

    folder: Path
    cfg: EvalConfig
    offsets: Tensor | None = None


def evaluate_variants(
    model: Repeats,
    dataset: Any,
    views: Sequence[View],
    *,
    device: torch.device | str,
    groups: Mapping[str, Sequence[str]] | None = None,
) -> list[dict[str, Any]]:
    """What `evaluate` says of every variant, with one forward pass an image; times are those of all together."""
    for view in views:
        check(dataset, view.cfg, view.offsets)

    cfg = views[0].cfg
    chosen = chosen_images(dataset, cfg)
    tallies = []
    for view in views:
        kept = {"panels": view.folder / "panels", "per_image": view.folder / PER_IMAGE}
        tallies.append(Tally(dataset, chosen, view.cfg, device, **kept))

    start = time.monotonic()

    with prediction(model, chosen) as bar:
        for samples in sample_batches(dataset, chosen, cfg):
            for variant, view, tally in zip(model.each(), views, tallies, strict=True):
                calibration = tally.sums.calibration
                predicted = predict_batch(
                    variant, samples, dataset.row, view.cfg, device, view.offsets, calibration
                )
                tally.add(samples, predicted)
            bar.update(len(samples))

    results = [tally.result(groups) for tally in tallies]
    spent = times(time.monotonic() - start, len(chosen))
    return [result | spent for result in results]
