"""Mask2Former: the network; matching and losses belong to the methods that train it."""

from common.models.mask2former.model import (
    Mask2Former,
    Mask2FormerOptions,
    class_probabilities,
    mask2former,
)

__all__ = ["Mask2Former", "Mask2FormerOptions", "class_probabilities", "mask2former"]
