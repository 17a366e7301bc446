"""A training step of DAFormer in the order of the release: what `uda.daformer.DAFormer` is measured against.

The teacher is averaged at the start of a step, tensor by tensor. The source loss is back-propagated with its graph
kept, then the feature distance, then the mixed loss. NumPy chooses classes on the host; images are mixed, jittered and
blurred one by one, with kernels a tenth of the image long. Logits are enlarged to the labels' size before the loss.
"""

import math
from collections.abc import Iterator, Mapping

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from common.engine.method import Batch, Losses
from common.ops.colour import Jitter, draw_jitter, jitter
from common.ops.resize import resize, size_of
from uda.daformer import SIGMA, DAFormer, Pseudo, View


class LiteralDAFormer(DAFormer):
    """The same networks and options, with the draws in the same order."""

    def forward(self, streams: Mapping[str, Batch], step: int) -> Iterator[Losses]:
        if step:
            self.average(step)
        source, target = self.opened(streams["source"]), self.normalised(streams["target"])

        out = self.model.segment(source.image)
        source_loss = self.weighted(out["logits"], source.label)
        source_loss.backward(retain_graph=True)
        distance = self.distance(self.imagenet, out["features"][-1], source)
        yield {
            "loss": self.options.feature_distance.weight * distance,
            "source_ce": source_loss,
            "feature_distance": distance,
        }

        pseudo = self.look(self.teacher, target, streams["target"])
        mixed, label, weight = self.mixed(source, target, pseudo)
        logits = self.model.segment(self.distorted(mixed))["logits"]
        loss = self.weighted(logits, label, weight)
        yield {"loss": loss, "mixed_ce": loss, "confident": pseudo.weight.amax()}

    @torch.no_grad()
    def average(self, step: int) -> None:
        momentum = min(1 - 1 / (step + 1), self.options.momentum)
        for mean, new in zip(self.teacher.parameters(), self.model.parameters(), strict=True):
            mean.data[:] = momentum * mean.data + (1 - momentum) * new.data

    def after_step(self, step: int) -> None:
        """Nothing: the next step begins with it."""

    @staticmethod
    def weighted(logits: Tensor, label: Tensor, weight: Tensor | None = None) -> Tensor:
        """Cross-entropy at the labels' size, divided by all pixels."""
        loss = F.cross_entropy(resize(logits, size_of(label)), label, ignore_index=-1, reduction="none")
        return (loss if weight is None else loss * weight).mean()

    @torch.no_grad()
    def mixed(self, source: View, target: Tensor, pseudo: Pseudo) -> tuple[Tensor, Tensor, Tensor]:
        """Image, label and pixel weight with half of the batch's source classes pasted in."""
        labels = source.label.cpu().numpy()
        labels = np.where(labels < 0, self.model.num_classes, labels)
        classes = np.unique(labels)
        noise = torch.rand(len(labels), self.model.num_classes + 1, device=target.device).cpu().numpy()

        images, mixed_labels, weights = [], [], []
        for i, label in enumerate(labels):
            drawn = classes[np.argsort(noise[i, classes])]
            inside = np.isin(label, drawn[: math.ceil(len(classes) / 2)])
            mask = torch.from_numpy(inside).to(target.device)
            images.append(mask * source.image[i] + ~mask * target[i])
            mixed_labels.append(mask * source.label[i] + ~mask * pseudo.label[i])
            weights.append(mask * torch.ones_like(pseudo.weight[i]) + ~mask * pseudo.weight[i])

        return torch.stack(images), torch.stack(mixed_labels), torch.stack(weights)

    @torch.no_grad()
    def distorted(self, image: Tensor) -> Tensor:
        """Jitter and blur, image by image."""
        colour, strength = torch.rand(2, dtype=torch.float64, device="cpu").tolist()
        mean, std = self.model.mean, self.model.std
        if colour < self.options.jitter:
            order = torch.randperm(4, device="cpu").tolist()
            factors = draw_jitter(len(image), self.options.jitter_strength, image.device)
            for i in range(len(image)):
                rgb = ((image[i] * std + mean) / 255)[None]
                changed = jitter(rgb, Jitter(*(factor[i : i + 1] for factor in factors)), order)[0]
                image[i] = (255 * changed - mean) / std

        if strength < self.options.blur:
            low, high = SIGMA
            sigmas = low + (high - low) * torch.rand(len(image), device=image.device)
            for i, sigma in enumerate(sigmas.tolist()):
                image[i] = blurred(image[i], sigma)

        return image


def blurred(image: Tensor, sigma: float) -> Tensor:
    """An image (3, H, W) under a separable Gaussian whose kernels are a tenth of a side long, edges reflected."""
    channels, height, width = image.shape
    down, across = (gaussian(side, sigma).to(image) for side in (height, width))
    above, left = len(down) // 2, len(across) // 2

    padded = F.pad(image[None], (left, left, above, above), mode="reflect")
    rows = F.conv2d(padded, down.view(1, 1, -1, 1).repeat(channels, 1, 1, 1), groups=channels)
    return F.conv2d(rows, across.view(1, 1, 1, -1).repeat(channels, 1, 1, 1), groups=channels)[0]


def gaussian(side: int, sigma: float) -> Tensor:
    """A kernel whose sum is 1, of an odd number of taps."""
    tenth = math.ceil(0.1 * side)
    length = math.floor(tenth - 0.5 + tenth % 2)
    distance = torch.arange(length, dtype=torch.float64) - length // 2
    weights = (-0.5 * (distance / sigma) ** 2).exp()
    return weights / weights.sum()
