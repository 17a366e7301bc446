"""The images of an evaluation: which ones, at which size, and their loader."""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from common.config import EvalConfig
from common.data.loading import batches
from common.inference import edge_size


def evenly(length: int, count: int) -> list[int]:
    """At most `count` of `length` indices, evenly spread: frames of a video differ more than neighbours do."""
    count = min(count, length)
    return [i * length // count for i in range(count)]


def chosen_images(dataset: Any, cfg: EvalConfig) -> list[int]:
    """The images to evaluate: all, or `max_images` of the whole set."""
    return evenly(len(dataset), cfg.max_images or len(dataset))


def network_input(image: np.ndarray, cfg: EvalConfig) -> Tensor:
    """The tensor (3, h, w) uint8 that the network gets of an image (H, W, 3): at its own size or, where the config
    gives `short_edge`, resized by `edge_size` with Pillow, as detectron2 does."""
    if cfg.short_edge is not None:
        height, width = edge_size(image.shape[:2], cfg.short_edge, cfg.max_edge or math.inf)
        image = np.asarray(
            Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR)
        )
    return torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)))


class _Samples(Dataset):
    """The chosen images as tensors, ready for the device."""

    def __init__(self, dataset: Any, indices: Sequence[int], cfg: EvalConfig):
        self.dataset = dataset
        self.indices = indices
        self.cfg = cfg

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, position: int) -> dict[str, Any]:
        index = self.indices[position]
        sample = self.dataset.load(index)
        if sample.get("label") is None:
            raise ValueError(
                f"{sample['name']}: evaluation needs labels; set `labels: true` for this split"
            )

        return {
            "image": network_input(sample["image"], self.cfg),
            "label": torch.from_numpy(sample["label"]),
            "name": sample["name"],
            "index": index,
        }


def sample_batches(
    dataset: Any, indices: Sequence[int], cfg: EvalConfig
) -> Iterator[list[dict[str, Any]]]:
    """Lists of the samples of the images `indices`. ValueError for one that cannot be read."""
    workers = min(cfg.workers, len(indices))
    return batches(_Samples(dataset, indices, cfg), list, workers, batch_size=cfg.batch_size)
