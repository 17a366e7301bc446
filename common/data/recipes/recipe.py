"""What every recipe is asked before it is used."""

from pathlib import Path
from typing import Self

from common.data.dataset import SegmentationDataset


class Recipe:
    """The base of the recipes: by default one has nothing to learn from its data set."""

    flip = 0.0  # probability that a sample is mirrored

    @property
    def gives(self) -> frozenset[str]:
        """The images of a sample by their keys, and what tells how they were made."""
        return frozenset({"image"})

    def for_dataset(
        self,
        dataset: SegmentationDataset,
        workers: int = 0,
        cache: Path | None = None,
        where: str = "augment",
    ) -> Self:
        """The recipe with all that it needs to know of `dataset`, whose labels may be counted for it
        (see `class_statistics`). ValueError, which begins with `where`, for a set that it does not suit."""
        row = dataset.row
        if row.flip_pairs and dataset.source.labels and self.flip > 0:
            lack = f"this recipe does not exchange the flip_pairs of data set {row.name!r}"
            raise ValueError(
                f"{where}.flip: {self.flip:g}, but {lack}; use recipe detectron2, or flip: 0.0"
            )

        return self
