"""Evaluation of one network with several classifiers: what is common to them is computed once an image."""

import time
from collections.abc import Iterator, Mapping, Sequence
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


class Variants(nn.Module):
    """A network with V classifiers in the place of its own, each of which predicts as if it were the only one.

    network: its logits (B, K, h, w) are what its module `place` gives; it takes the classifiers in. The first variant
    runs the network and keeps the logits of all, call by call (a batch may be seen at several scales, or in windows),
    the others read them.
    """

    def __init__(
        self, network: SegmentationModel, place: str, classifiers: Sequence[nn.Module]
    ):
        super().__init__()
        network.set_submodule(place, Stack(classifiers))
        self.network = network
        self.count = len(classifiers)
        self.chosen = 0
        self.calls = 0
        self.kept: list[tuple[Tensor, ...]] = []

    def each(self) -> Iterator["Variants"]:
        """This module as every variant, in turn, on the same images. What is kept of them goes in the end."""
        for variant in range(self.count):
            self.chosen = variant
            self.calls = 0
            yield self

        self.kept.clear()

    def _infer(self, images: Tensor) -> dict[str, Any]:
        """What the network's `infer` gives, with the logits of the variant."""
        if self.chosen == 0:
            self.kept.append(parts(self.network.infer(images)["logits"], self.count))

        logits = self.kept[self.calls][self.chosen]
        self.calls += 1

        return {"logits": logits}

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


def parts(logits: Tensor, count: int) -> tuple[Tensor, ...]:
    """Logits (B, V·K, h, w) as those of each variant, in the same memory format: it decides how sums are rounded."""
    last = torch.channels_last
    same = last if logits.is_contiguous(memory_format=last) else torch.contiguous_format
    return tuple(part.contiguous(memory_format=same) for part in logits.chunk(count, 1))


def evaluate_variants(
    model: Variants,
    dataset: Any,
    cfg: EvalConfig,
    folders: Sequence[Path],
    *,
    device: torch.device | str,
    groups: Mapping[str, Sequence[str]] | None = None,
    offsets: Tensor | None = None,
) -> list[dict[str, Any]]:
    """What `evaluate` says of every variant, with one forward pass an image; times are those of all together.

    folders: of each variant, for its panels and the confusion matrices of its images.
    """
    check(dataset, cfg, offsets)
    chosen = chosen_images(dataset, cfg)
    tallies = []
    for folder in folders:
        kept = {"panels": folder / "panels", "per_image": folder / PER_IMAGE}
        tallies.append(Tally(dataset, chosen, cfg, device, **kept))

    start = time.monotonic()

    with prediction(model, chosen) as bar:
        for samples in sample_batches(dataset, chosen, cfg):
            for variant, tally in zip(model.each(), tallies, strict=True):
                predicted = predict_batch(
                    variant, samples, dataset.row, cfg, device, offsets, tally.sums.calibration
                )
                tally.add(samples, predicted)
            bar.update(len(samples))

    results = [tally.result(groups) for tally in tallies]
    spent = times(time.monotonic() - start, len(chosen))
    return [result | spent for result in results]
