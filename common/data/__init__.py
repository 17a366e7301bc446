"""Data sets, samples, augmentations and training streams."""

from common.data.catalogue.registry import DATASETS, DatasetRow, resolve
from common.data.dataset import SegmentationDataset, check
from common.data.labels import IGNORE
from common.data.recipes.build import build_transform
from common.data.statistics import Statistics, class_statistics
from common.data.streams import Stream, make_loaders, make_streams

__all__ = [
    "DATASETS",
    "IGNORE",
    "DatasetRow",
    "SegmentationDataset",
    "Statistics",
    "Stream",
    "build_transform",
    "check",
    "class_statistics",
    "make_loaders",
    "make_streams",
    "resolve",
]
