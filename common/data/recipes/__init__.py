"""Augmentations, one file a paper; `build.py` makes one from the `augment` section of a stream."""
