"""Augmentations, one file per paper; `build.py` makes one from the `augment` section of a stream."""
