"""CPSL's own work as the method's description says it, step by step: what the fast forms are measured against.

Soft labels and features go through full-size copies, queues shift, classes are looped over, geometric operations replay
one by one, and all terms of the target are alive at the backward.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from common.data import SegmentationDataset
from uda.cpsl import CPSL
from uda.sampling import uniform

Size = tuple[int, int]


def bilinear(maps: Tensor, size: Size) -> Tensor:
    return F.interpolate(maps, size, mode="bilinear", align_corners=True)


def cut(maps: Tensor, y: int, x: int, crop: Size, flip: int) -> Tensor:
    part = maps[..., y : y + crop[0], x : x + crop[1]]
    return part.flip(-1) if flip else part


def soft_on_grid(soft: Tensor, geometry: Tensor, crop: Size) -> Tensor:
    """Stride 8 → image → random size → crop → mirror → quarter: (B, C, crop/4)."""
    parts = []
    for one, (height0, width0, height, width, y, x, flip) in zip(soft.float()[:, None], geometry.tolist(), strict=True):
        full = bilinear(bilinear(one, (height0, width0)), (height, width))
        parts.append(bilinear(cut(full, y, x, crop, flip), (crop[0] // 4, crop[1] // 4)))
    return torch.cat(parts)


def features_on_grid(maps: Tensor, geometry: Tensor, crop: Size) -> Tensor:
    """Stride 8 → quarter of the image → quarter of the random size → crop → mirror: (B, D, crop/4)."""
    parts = []
    for one, (*sizes, flip) in zip(maps[:, None], geometry.tolist(), strict=True):
        height0, width0, height, width, y, x = (size // 4 for size in sizes)
        full = bilinear(bilinear(one, (height0, width0)), (height, width))
        parts.append(cut(full, y, x, (crop[0] // 4, crop[1] // 4), flip))
    return torch.cat(parts)


def similarity(features: Tensor, prototypes: Tensor) -> Tensor:
    """Cosine of every pixel with every prototype, one class after the other."""
    maps = [F.cosine_similarity(features, prototype.view(1, -1, 1, 1), dim=1) for prototype in prototypes]
    return torch.stack(maps, 1)


def cosines(features: Tensor, prototypes: Tensor) -> Tensor:
    """The same by one product of unit vectors."""
    return torch.einsum("bdhw,cd->bchw", F.normalize(features, dim=1), F.normalize(prototypes, dim=1))


def class_means(logits: Tensor, features: Tensor, fewest: int = 10) -> dict[int, Tensor]:
    """Mean feature of each class that is predicted on enough pixels, by masks: logits (C, h, w), features (D, h, w)."""
    predicted, means = logits.argmax(0), {}
    for k in range(len(logits)):
        mask = (predicted == k).float()
        if mask.sum() >= fewest:
            means[k] = (features * mask).sum((1, 2)) / mask.sum()
    return means


def class_means_indexed(logits: Tensor, features: Tensor, fewest: int = 10) -> dict[int, Tensor]:
    """The same by selecting the pixels of each class."""
    predicted, means = logits.argmax(0), {}
    for k in range(len(logits)):
        mask = predicted == k
        if mask.sum() >= fewest:
            means[k] = features[:, mask].mean(1)
    return means


def shift(queue: Tensor, rows: Tensor) -> Tensor:
    """A queue with new rows at its front and the oldest gone."""
    return torch.cat((rows, queue))[: len(queue)]


@torch.no_grad()
def sinkhorn(scores: Tensor, share: Tensor, epsilon: float, iterations: int, keep: int) -> Tensor:
    """Alternating division by row and column sums in the linear domain: scores (N, C) → the last `keep` rows."""
    q = (scores / epsilon).exp().T
    q = q / q.sum()
    for _ in range(iterations):
        q = q / q.sum(1, keepdim=True) * share[:, None]
        q = q / q.sum(0, keepdim=True) / q.shape[1]
    return (q * q.shape[1]).T[-keep:]


class OwnWork:
    """What a target step of CPSL does beside the network passes, on the same numbers as `method`."""

    def __init__(self, method: CPSL):
        self.o, self.prototypes = method.options, method.prototypes
        self.ema, self.distribution = method.prototypes_ema, method.distribution
        self.bank, self.score_bank = method.features.rows.flip(0), method.scores.rows.flip(0)  # newest first

    def __call__(self, target: Mapping[str, Tensor], teacher: Mapping[str, Tensor], weak: Mapping[str, Tensor],
                 strong: Mapping[str, Tensor]) -> dict[str, Tensor]:  # fmt: skip
        crop = tuple(target["weak"].shape[-2:])
        grid = (crop[0] // 4, crop[1] // 4)
        with torch.no_grad():
            warm = soft_on_grid(target["soft"], target["geometry"], crop)
            features = features_on_grid(teacher["features"], target["geometry"], crop)
            logits = features_on_grid(teacher["logits"], target["geometry"], crop)
            near = cosines(features, self.ema)
            rectified = (near / self.o.temperature).softmax(1) * warm
            label = rectified.argmax(1)
        sce = self.symmetric(bilinear(weak["logits"], grid), label)
        first, second = self.self_label(label, features, logits)
        regular = self.consistency(near, strong["features"], target, grid)
        total = sce + self.o.self_label * (first + second) + self.o.consistency * regular
        total.backward()
        terms = {"target_sce": sce, "self_label_a": first, "self_label_b": second, "consistency": regular}
        return {**terms, "label": label}

    def symmetric(self, logits: Tensor, label: Tensor) -> Tensor:
        alpha, beta = self.o.rce
        valid = (label >= 0).float()
        p = logits.softmax(1).clamp(1e-7, 1)
        onehot = F.one_hot(label.clamp(min=0), logits.shape[1]).permute(0, 3, 1, 2).float().clamp(1e-4, 1)
        reverse = (-(p * onehot.log()).sum(1) * valid).sum() / (valid.sum() + 1e-6)
        return alpha * F.cross_entropy(logits, label, ignore_index=-1) + beta * reverse

    def self_label(self, label: Tensor, features: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
        index = uniform(label.flatten(1), self.o.samples)
        prototypes = F.normalize(self.prototypes, dim=1)
        first, second = [], []
        for feature, logit, places in zip(features, logits, index, strict=True):
            z, o = (F.normalize(maps.flatten(1).T[places], dim=1) for maps in (feature, logit))
            scores = z @ prototypes.T
            for terms, bank, rows in (
                (first, self.bank @ prototypes.detach().T, scores.detach()),
                (second, self.score_bank, o),
            ):
                every = torch.cat((bank, rows))
                q = sinkhorn(every, self.distribution, self.o.epsilon, self.o.sinkhorn_iterations, len(z))
                terms.append(-(q * (scores / self.o.temperature).log_softmax(1)).sum(1).mean())
            self.bank, self.score_bank = shift(self.bank, z), shift(self.score_bank, o)
        return torch.stack(first).mean(), torch.stack(second).mean()

    def consistency(self, near: Tensor, features: Tensor, target: Mapping[str, Tensor], grid: Size) -> Tensor:
        moved = replay(near + 2, target, grid)  # the fill, 0, is then no similarity
        mask = (moved != 0).float()
        scores = cosines(bilinear(features, grid), self.ema)
        log_s = (scores / self.o.temperature).log_softmax(1)
        t = ((moved - 2) / self.o.temperature).softmax(1)
        return (F.kl_div(log_s, t, reduction="none") * mask).sum() / mask.sum()


def replay(maps: Tensor, target: Mapping[str, Tensor], grid: Size) -> Tensor:
    """The strong view's operations on maps of the quarter grid, in order: mirror, translation, cutout; fill 0."""
    moved = maps.flip(-1)
    theta = torch.tensor([[1.0, 0, 2 * (target["shift"] // 4) / grid[1]], [0, 1.0, 0]])
    field = F.affine_grid(theta[None].expand(len(maps), 2, 3), list(maps.shape), align_corners=False)
    moved = F.grid_sample(moved, field.to(maps), mode="nearest", padding_mode="zeros", align_corners=False)
    for image, (y0, x0, y1, x1) in zip(moved, target["cutout"].tolist(), strict=True):
        image[:, y0 // 4 : y1 // 4, x0 // 4 : x1 // 4] = 0
    return moved


# LAB colour transfer ----------------------------------------------------------------------------------------------

XYZ = np.array([[0.412453, 0.357580, 0.180423], [0.212671, 0.715160, 0.072169], [0.019334, 0.119193, 0.950227]])
WHITE = np.array([0.95047, 1.0, 1.08883])


def rgb_to_lab(rgb: np.ndarray) -> np.ndarray:
    """uint8 (H, W, 3) to L, a, b in float64, as scikit-image does it."""
    values = rgb / 255
    linear = np.where(values > 0.04045, ((values + 0.055) / 1.055) ** 2.4, values / 12.92)
    xyz = linear @ XYZ.T / WHITE
    f = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    return np.stack((116 * f[..., 1] - 16, 500 * (f[..., 0] - f[..., 1]), 200 * (f[..., 1] - f[..., 2])), -1)


def lab_to_rgb(lab: np.ndarray) -> np.ndarray:
    """The inverse, to [0, 1]."""
    y = (lab[..., 0] + 16) / 116
    f = np.stack((lab[..., 1] / 500 + y, y, np.maximum(y - lab[..., 2] / 200, 0)), -1)
    xyz = np.where(f > 0.2068966, f**3, (f - 16 / 116) / 7.787) * WHITE
    linear = xyz @ np.linalg.inv(XYZ).T
    curve = 1.055 * np.maximum(linear, 0.0031308) ** (1 / 2.4) - 0.055
    return np.where(linear > 0.0031308, curve, 12.92 * linear).clip(0, 1)


def source_sample(data: SegmentationDataset, index: int, rng: np.random.Generator) -> dict[str, Any]:
    """A source sample with the colours of a random target image, whole images all along: image and label arrays."""
    recipe, record = data.transform, data.records[index]
    base = recipe.base or Image.open(record.image).size[::-1]
    image = Image.open(record.image).convert("RGB").resize(base[::-1], Image.Resampling.BILINEAR)
    label = Image.fromarray(data._label(record, Image.open(record.image).size[::-1]).astype(np.int32))
    label = label.resize(base[::-1], Image.Resampling.NEAREST)
    other = recipe.reference.records[int(rng.integers(len(recipe.reference)))].image
    own, wanted = rgb_to_lab(np.asarray(image)), rgb_to_lab(np.asarray(Image.open(other).convert("RGB")))
    mean, std = own.mean((0, 1)), own.std((0, 1))
    moved = (own - mean) / std * wanted.std((0, 1)) + wanted.mean((0, 1))
    image = Image.fromarray((lab_to_rgb(moved) * 255).clip(0, 255).astype(np.uint8))
    g = recipe.draw(base, rng)
    image = np.array(image.resize((g.width, g.height), Image.Resampling.BILINEAR))
    label = np.array(label.resize((g.width, g.height), Image.Resampling.NEAREST))
    parts = (a[g.y : g.y + recipe.crop[0], g.x : g.x + recipe.crop[1]] for a in (image, label))
    image, label = (a[:, ::-1] if g.flip else a for a in parts)
    return {"image": np.ascontiguousarray(image.transpose(2, 0, 1)), "label": np.ascontiguousarray(label)}
