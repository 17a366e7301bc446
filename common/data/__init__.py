"""Data sets, samples, augmentations and training streams."""

from common.data.datasets import DATASETS, DatasetRow, resolve
from common.data.labels import IGNORE
from common.data.segmentation import SegmentationDataset, check
from common.data.statistics import Statistics, class_statistics
from common.data.streams import Stream, make_loaders, make_streams
from common.data.transforms import build_transform

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
