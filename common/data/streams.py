"""Named training streams: which image each draw shows, and the loaders that run them.

A stream numbers its draws over all ranks and epochs. Everything about draw d (index, augmentation) follows from
(seed, stream name, d) alone, so a stream's whole state is the next draw: a run resumes at any step, with any number of
ranks or loader processes, and sees the same samples.
"""

import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset

from common.config import DataConfig, TrainConfig, pick, typed
from common.data.dataset import SegmentationDataset
from common.data.loading import batches
from common.data.orders import Order, SamplerConfig, generator, ignored_options, make_order
from common.data.pixel_cache import GIB, PixelCache, pixel_cache
from common.data.recipes.build import build_transform
from common.data.recipes.recipe import Recipe


class Stream:
    """A dataset, its order and its batch size. `sample(draw)` is a pure function."""

    def __init__(
        self,
        name: str,
        dataset: SegmentationDataset,
        batch_size: int,
        seed: int,
        order: Order | None = None,
    ):
        if batch_size < 1:
            raise ValueError(f"stream {name!r}: batch_size {batch_size} must be at least 1")

        self.name = name
        self.dataset = dataset
        self.batch_size = batch_size
        self.seed = seed
        self.order = Order(len(dataset), seed, name) if order is None else order

    def sample(self, draw: int, index: int | None = None) -> dict[str, Any]:
        """The sample of a draw: the dataset's, and `draw`."""
        index = self.order.index(draw) if index is None else index
        rng = generator(self.seed, self.name, "sample", draw)
        sample = self.dataset.sample(index, rng, self.order.focus(draw))
        return {**sample, "draw": draw}

    def draws(self, step: int, slot: int, slots: int) -> list[int]:
        """The draws of one micro-batch: step t consumes [t·B, (t+1)·B), its slot v the v-th of `slots` equal parts."""
        size = self.batch_size // slots
        start = step * self.batch_size + slot * size
        return list(range(start, start + size))


def make_streams(data: DataConfig, seed: int, cache: Path | None = None) -> dict[str, Stream]:
    """The streams of a config by name. `cache` is the folder of dataset statistics (sampling by class, Copy-Paste of
    rare classes)."""
    if not data.streams:
        raise ValueError("data.streams names no training stream")

    streams = {}

    for name, config in data.streams.items():
        where = f"data.streams.{name}.augment"
        transform = transform_of(data, name)
        dataset = SegmentationDataset(config)
        dataset.transform = transform.for_dataset(dataset, data.workers, cache, where)

        where = f"data.streams.{name}.sampler"
        sampler = typed(SamplerConfig, config.sampler, where)
        if text := ignored_options(config.sampler):
            warnings.warn(f"{where}: {text}", stacklevel=2)
        order = make_order(sampler, dataset, seed, name, data.workers, cache)
        streams[name] = Stream(name, dataset, config.batch_size, seed, order)

    return streams


def transform_of(data: DataConfig, name: str) -> Recipe:
    """The augmentation of a stream, which knows nothing of its images yet. ConfigError for options that do not fit."""
    return build_transform(_augment(data, name), f"data.streams.{name}.augment")


def _augment(data: DataConfig, name: str) -> Mapping[str, Any]:
    """The augmentation of a stream; a name in its `colour_from` stands for that stream's images."""
    augment = data.streams[name].augment
    lender = augment.get("colour_from")
    if not isinstance(lender, str):
        return augment

    source = pick(data.streams, lender, f"data.streams.{name}.augment.colour_from")
    images = {
        key: getattr(source, key) for key in ("dataset", "root", "split", "list", "folder")
    }
    return {**augment, "colour_from": images}


def hold_images(streams: Mapping[str, Stream], data: DataConfig, folder: Path) -> None:
    """Let the streams read decoded images from `folder`, up to `data.cache_size` GiB of all together, the first stream
    before the next; what is not there yet is written, in `data.workers` processes. Streams of the same images share one
    cache."""
    left = int((data.cache_size or 0) * GIB)
    held: dict[tuple[Path, ...], PixelCache | None] = {}
    for stream in streams.values():
        dataset = stream.dataset
        paths = tuple(record.image for record in dataset.records)
        if paths not in held:
            if left == 0:
                continue

            cache = pixel_cache(paths, dataset.row.name, folder, left, data.workers)
            left -= 0 if cache is None else cache.size
            held[paths] = cache

        dataset.cache = held[paths]


def make_loaders(
    data: DataConfig,
    train: TrainConfig,
    start_step: int = 0,
    rank: int = 0,
    world: int = 1,
    *,
    seed: int = 0,
    cache: Path | None = None,
    streams: Mapping[str, Stream] | None = None,
) -> dict[str, Iterator[dict[str, Any]]]:
    """One endless iterator of micro-batches a stream, beginning at `start_step`.

    The batch of a step is divided into `train.devices` slots; rank r yields slots r, r + world, … of each step in turn
    (train.devices / world micro-batches a step). Tensors are stacked, where their shapes allow it; names are lists.
    A ValueError about a sample is raised here as the one line it was.
    """
    check_division(data, train.devices, world)
    streams = make_streams(data, seed, cache) if streams is None else streams

    slots = range(rank, train.devices, world)
    # a GPU may be there and not be trained on: the pinning of memory would open a context on it
    on_gpu = torch.cuda.is_initialized()
    loaders = {}

    for name, stream in streams.items():
        schedule = _Schedule(stream, start_step, slots, train.devices)
        loaders[name] = batches(
            _Samples(stream), collate, data.workers, schedule=schedule, pin_memory=on_gpu
        )

    return loaders


def check_division(data: DataConfig, devices: int, world: int) -> None:
    """ValueError where the batches cannot be divided over `devices` slots, or these over `world` processes."""
    if devices % world:
        raise ValueError(f"train.devices {devices} must be a multiple of the {world} processes")
    for name, stream in data.streams.items():
        if stream.batch_size % devices:
            raise ValueError(
                f"stream {name!r}: batch_size {stream.batch_size} must be a multiple of train.devices {devices}"
            )


class _Schedule:
    """The (draw, index) pairs of each micro-batch of this rank, endless."""

    def __init__(self, stream: Stream, start_step: int, slots: range, count: int):
        self.stream = stream
        self.step = start_step
        self.slots = slots
        self.count = count

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        step = self.step
        while True:
            for slot in self.slots:
                draws = self.stream.draws(step, slot, self.count)
                yield [(draw, self.stream.order.index(draw)) for draw in draws]
            step += 1


class _Samples(Dataset):
    """What a loader process holds: the sample of each (draw, index)."""

    def __init__(self, stream: Stream):
        self.stream = stream

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Any]:
        return self.stream.sample(*key)


# what networks take as one tensor: a teacher's input and output of the whole image, too
WHOLE = ("image", "full", "soft")


def collate(samples: list[dict[str, Any]]) -> dict[str, Any]:
    """Stacks tensors of equal shape; other tensors and strings become lists, numbers an int64 tensor.

    Images, and maps of whole ones, have to be of one shape: a ValueError names two that are not.
    """
    batch: dict[str, Any] = {}
    for key in samples[0]:
        values = [sample[key] for sample in samples]
        if isinstance(values[0], torch.Tensor) and all(
            v.shape == values[0].shape for v in values
        ):
            batch[key] = torch.stack(values)
        elif key in WHOLE:
            raise _unequal(key, samples)
        else:
            batch[key] = torch.tensor(values) if isinstance(values[0], int) else values

    return batch


def _unequal(key: str, samples: list[dict[str, Any]]) -> ValueError:
    first = samples[0]
    other = next(sample for sample in samples if sample[key].shape != first[key].shape)
    shapes = " and ".join(
        "×".join(map(str, sample[key].shape[-2:])) for sample in (first, other)
    )
    return ValueError(
        f"{first['name']} and {other['name']}: `{key}`, which no crop brings to one size, is {shapes}; "
        "set train.devices to the stream's batch_size, so that images of several sizes are taken one by one"
    )
