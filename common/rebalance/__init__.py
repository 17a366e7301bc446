"""Remedies after training: a new classifier on the features of a trained network."""

from common.rebalance.build import STAGE2, build_stage2
from common.rebalance.features import read_features
from common.rebalance.given import Given
from common.rebalance.place import find_classifier, seek_classifier

__all__ = [
    "STAGE2",
    "Given",
    "build_stage2",
    "find_classifier",
    "read_features",
    "seek_classifier",
]
