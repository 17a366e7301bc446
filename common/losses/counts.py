"""How often each class occurs: what every loss that depends on rarity is given."""

from collections.abc import Sequence
from functools import partial
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from common import distributed
from common.data.statistics import Statistics

Unit = Literal["pixels", "images"]
PseudoUnit = Literal["pixels", "shares"]


class Counts(NamedTuple):
    """Of the training labels: pixels of each class and images that show it, float64 (K,); the number of images.

    given: pixels (K,) that a remedy's options state, which goes by them in place of `pixels`; no other one does.
    area: labelled pixels of the images that show each class (K,); None where nobody has looked.
    """

    pixels: Tensor
    images: Tensor
    num_images: float
    given: Tensor | None = None
    area: Tensor | None = None

    @classmethod
    def from_statistics(
        cls, statistics: Statistics, shares: np.ndarray | None = None
    ) -> "Counts":
        """Of every image once; with shares (N,), whose sum is 1, of as many draws in which each has its share."""
        pixels, images = statistics.pixel_count, statistics.image_count
        labelled = statistics.pixels.sum(1, dtype=np.int64)
        area = labelled @ statistics.presence
        if shares is not None:
            often = shares * statistics.num_images
            pixels, images = often @ statistics.pixels, often @ statistics.presence
            area = (often * labelled) @ statistics.presence

        on_cpu = partial(torch.as_tensor, dtype=torch.float64, device="cpu")
        num_images = float(statistics.num_images)
        return cls(on_cpu(pixels), on_cpu(images), num_images, area=on_cpu(area))

    @classmethod
    def from_pixels(cls, pixels: Sequence[float] | Tensor) -> "Counts":
        """Counts of pixels alone; each class that occurs is taken to be in one image."""
        pixels = torch.as_tensor(pixels, dtype=torch.float64)
        return cls(pixels, (pixels > 0).double(), 1.0)

    def of(self, unit: Unit) -> Tensor:
        """Counts in a unit, float64 (K,)."""
        return self.pixels if unit == "pixels" else self.images

    def prior(self, unit: Unit = "pixels") -> Tensor:
        """Shares π (K,) that sum to 1 over the classes that occur; a class that never does has 0."""
        counts = self.of(unit)
        return counts / counts.sum().clamp(min=1)


def where_present(value: Tensor, counts: Tensor, absent: float | Tensor) -> Tensor:
    """`value` (K,) of classes that occur, `absent` elsewhere: one without labels must not set the scale of others."""
    return torch.where(counts > 0, value, absent)


class SeenCounts(nn.Module):
    """Pixels of the labels that a loss was made of so far, on all ranks; part of the state dict.

    pixels: (K,) of the training labels. A class that they show begins with one pixel, another one stays at none.
    """

    pixels: Tensor

    def __init__(self, pixels: Tensor):
        super().__init__()
        self.register_buffer("pixels", (pixels > 0).double())

    def current(self) -> Counts:
        """The counts so far."""
        return Counts.from_pixels(self.pixels)

    @torch.no_grad()
    def see(self, label: Tensor) -> None:
        """Add labels (B, …); what is no class is ignored."""
        classes = len(self.pixels)
        known = (label >= 0) & (label < classes)
        index = torch.where(known, label.long(), classes).flatten()
        counts = self.pixels.new_zeros(classes + 1)
        counts.index_add_(0, index, torch.ones_like(index, dtype=counts.dtype))
        self.pixels += distributed.all_sum(counts)[:classes]


class RefreshedCounts(nn.Module):
    """Counts of labels, joined every `every` steps by those of the pseudo-labels of these steps (0: never).

    BLV's supplement: frequencies of unlabelled data are estimated by pseudo-labels and refreshed. What has been counted
    is part of the state dict, so a resumed run has the same counts.

    unit: how pseudo-labels are added. `pixels`: as many as were counted, where they come from the same data as the
    labels and a refresh follows a whole pass over them (semi-supervised). `shares`: their class shares times the
    number of labelled pixels, so that two domains weigh alike (domain adaptation; the paper does not say how they are
    weighed, and as pixels the few of some steps would vanish beside the source's). Images are those of the labels.
    """

    pixels: Tensor
    images: Tensor
    given: Tensor | None
    area: Tensor | None
    running: Tensor
    pseudo: Tensor

    def __init__(self, labelled: Counts, every: int = 0, unit: PseudoUnit = "pixels"):
        super().__init__()
        self.every = every
        self.unit = unit
        self.num_images = labelled.num_images
        self.register_buffer("pixels", labelled.pixels.clone(), persistent=False)
        self.register_buffer("images", labelled.images.clone(), persistent=False)
        given = None if labelled.given is None else labelled.given.clone()
        self.register_buffer("given", given, persistent=False)
        area = None if labelled.area is None else labelled.area.clone()
        self.register_buffer("area", area, persistent=False)

        if every:
            self.register_buffer("running", torch.zeros_like(self.pixels))
            self.register_buffer("pseudo", torch.zeros_like(self.pixels))

    def current(self) -> Counts:
        """The counts in force."""
        pixels = self._joined(self.pixels)
        given = None if self.given is None else self._joined(self.given)
        area = self.area
        if area is not None:  # pseudo-labels, too, are of images like those of the labels
            area = area * (pixels.sum() / self.pixels.sum().clamp(min=1))

        return Counts(pixels, self.images, self.num_images, given, area)

    def _joined(self, pixels: Tensor) -> Tensor:
        """Pixels of labels (K,) and those of the pseudo-labels in force."""
        if not self.every:
            return pixels

        pseudo = self.pseudo
        if self.unit == "shares":
            pseudo = pseudo * (pixels.sum() / pseudo.sum().clamp(min=1))

        return pixels + pseudo

    @torch.no_grad()
    def count(self, label: Tensor, area: Tensor | float = 1.0) -> None:
        """Add pseudo-labels (B, …), −1 ignored, each for `area` pixels, one number or one (B,) for each image, on all
        ranks the same."""
        if not self.every:
            return

        classes = label.long() + 1
        weights = torch.ones_like(classes, dtype=self.running.dtype)
        # a number stays on the host: as a tensor it would be copied, and the copy waited for
        if isinstance(area, Tensor):
            area = area.view(-1, *[1] * (label.dim() - 1))
        weights *= area
        counts = self.running.new_zeros(len(self.running) + 1)
        counts.index_add_(0, classes.flatten(), weights.flatten())
        self.running += distributed.all_sum(counts)[1:]

    @torch.no_grad()
    def after_step(self, step: int) -> bool:
        """Put in force what was counted, after every `every` steps; whether that was now."""
        if not self.every or (step + 1) % self.every:
            return False

        self.pseudo.copy_(self.running)
        self.running.zero_()
        return True
