"""What a trained network's classifier reads of the training images: a sample of the pixels of each class."""

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from itertools import accumulate
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from common import console
from common.config import EvalConfig
from common.data import SegmentationDataset, Statistics
from common.evaluation import evaluation_mode
from common.evaluation.samples import sample_batches
from common.inference import predict_scores
from common.models import SegmentationModel

BAND = 1 << 25  # numbers of an enlarged map that are held at once
MIB = 1 << 20


class Features(NamedTuple):
    """Features float32 (N, D) of pixels, those of class 0 first, and how many there are of each class, int64 (K,)."""

    values: Tensor
    counts: Tensor


def per_class(statistics: Statistics, channels: int, mib: int) -> int:
    """How many pixels of each class fit into `mib` MiB, where all classes that occur have as many."""
    present = int((statistics.pixel_count > 0).sum())
    return max(mib * MIB // (4 * channels * max(present, 1)), 1)


def chosen_pixels(statistics: Statistics, most: int, seed: int) -> list[list[np.ndarray]]:
    """Class → image → which of the class's pixels in it are taken, by their number in reading order.

    Of each class at most `most` pixels of the whole set, every one as likely; without repetition.
    """
    found = []
    for k, pixels in enumerate(statistics.pixels.T.astype(np.int64)):
        total = int(pixels.sum())
        rng = np.random.default_rng([seed, k])
        drawn = (
            np.sort(rng.choice(total, most, replace=False, shuffle=False))
            if total > most
            else np.arange(total)
        )
        ends = pixels.cumsum()
        places = np.searchsorted(drawn, ends)
        parts = np.split(drawn, places[:-1])
        starts = ends - pixels
        found.append([part - start for part, start in zip(parts, starts, strict=True)])

    return found


@torch.no_grad()
def read_features(
    network: SegmentationModel,
    place: str,
    dataset: SegmentationDataset,
    statistics: Statistics,
    cfg: EvalConfig,
    *,
    mib: int,
    seed: int,
    device: torch.device,
) -> Features:
    """Pass every image through the network once, in evaluation mode, as an evaluation at scale 1 sees it.

    The features are those of full-size pixels: enlarged as the network enlarges its logits. For a linear classifier
    what it says of them is what the network says there.
    """
    channels: Any = network.get_submodule(place).in_channels
    most = per_class(statistics, channels, mib)
    chosen = chosen_pixels(statistics, most, seed)

    counts = [sum(map(len, of_images)) for of_images in chosen]
    values = torch.empty(sum(counts), channels, device=device)
    free = list(accumulate(counts, initial=0))  # the next row of each class

    images = SegmentationDataset(replace(dataset.source, maps={}))
    bar = console.bar(what="reading features", total=len(images))

    with giving_features(network, place), evaluation_mode(network), bar:
        for samples in sample_batches(images, range(len(images)), cfg):
            for sample in samples:
                for k, part in _of_image(network, sample, chosen, cfg, device):
                    values[free[k] : free[k] + len(part)] = part
                    free[k] += len(part)
            bar.update(len(samples))

    return Features(values, torch.tensor(counts, device=device))


@contextlib.contextmanager
def giving_features(network: SegmentationModel, place: str) -> Iterator[None]:
    """Within, the network's logits are the features that its classifier reads."""
    trained = network.get_submodule(place)
    network.set_submodule(place, nn.Identity())

    try:
        yield
    finally:
        network.set_submodule(place, trained)


def _of_image(
    network: SegmentationModel,
    sample: dict[str, Any],
    chosen: list[list[np.ndarray]],
    cfg: EvalConfig,
    device: torch.device,
) -> list[tuple[int, Tensor]]:
    """The features of the chosen pixels of one image, by class."""
    label = sample["label"].numpy()
    pixels = {}
    for k, of_images in enumerate(chosen):
        numbers = of_images[sample["index"]]
        if len(numbers):
            pixels[k] = np.flatnonzero(label == k)[numbers]

    if not pixels:
        return []

    places = torch.from_numpy(np.concatenate(list(pixels.values()))).to(device)
    values = features_at(network, sample["image"][None].to(device), label.shape, places, cfg)
    lengths = [len(numbers) for numbers in pixels.values()]
    return list(zip(pixels, values.split(lengths), strict=True))


def features_at(
    network: SegmentationModel,
    images: Tensor,
    size: tuple[int, int],
    places: Tensor,
    cfg: EvalConfig,
) -> Tensor:
    """Features (N, D) at the places (N,), in reading order, of the map of size (H, W) that the network's logits, here
    features, are enlarged to."""
    if cfg.mode == "slide":
        once = replace(cfg, scales=(1.0,), flip=False, window_softmax=False)
        return _at(predict_scores(network, images, once, size), places)

    maps = network.infer(images)["logits"]
    channels = max(BAND // (size[0] * size[1]), 1)
    parts = []
    for part in maps.split(channels, 1):
        enlarged = network.scores_of({"logits": part}, images, size)
        parts.append(_at(enlarged, places))

    return torch.cat(parts, 1)


def _at(maps: Tensor, places: Tensor) -> Tensor:
    """(N, C) of maps (1, C, H, W)."""
    return maps[0].flatten(1)[:, places].T.float()
