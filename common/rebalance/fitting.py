"""Training a classifier on features that were read once, with equally many pixels of every class in a batch."""

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common import console
from common.config.bounds import Count, NotNegative, Positive, Rate, Whole
from common.rebalance.features import Features


@dataclass(frozen=True)
class Fitting:
    """SGD with a cosine schedule. pixels: of each class in a batch. seed: of the draws; None: the run's.
    cache_mib: memory for features."""

    steps: Count | None = None
    lr: Positive = 0.2
    momentum: Rate = 0.9
    weight_decay: NotNegative = 5e-4
    pixels: Count = 128
    seed: Whole | None = None
    cache_mib: Count = 512


def fit(
    classifier: nn.Module,
    parameters: Iterable[nn.Parameter],
    features: Features,
    weights: Tensor,
    options: Fitting,
    *,
    steps: int,
    seed: int,
    where: str,
    loss: Callable[[Tensor, Tensor], Tensor] | None = None,
) -> None:
    """Minimise Σ_k weights_k · mean of −log softmax(z)_k over class k's pixels, in place.

    weights: (K,), of any size; classes without features have none. loss: logits float32 (N, K) and classes (N,) to
    losses (N,), in place of −log softmax(z)_k. Raises ValueError, which begins with `where`, where
    the loss is no longer finite.
    """
    of_pixels = loss or _cross_entropy
    shown = features.counts > 0
    classes = shown.nonzero()[:, 0]
    share = weights.to(features.values.device, torch.float32)[classes]
    share = share / share.sum()
    target = classes.repeat_interleave(options.pixels)

    draws = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.SGD(
        parameters, options.lr, options.momentum, weight_decay=options.weight_decay
    )

    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = options.lr * (1 + math.cos(math.pi * step / steps)) / 2

        batch = balanced_batch(features, classes, options.pixels, draws)
        logits = classifier(batch[..., None, None])[..., 0, 0]
        each = of_pixels(logits.float(), target)
        total = (share * each.view(len(classes), -1).mean(1)).sum()

        optimizer.zero_grad()
        total.backward()
        optimizer.step()

    last = total.item()
    if not math.isfinite(last):
        raise ValueError(f"{where}: the loss is not finite after {steps} steps; lower lr")
    console.say(f"{where}: {steps} steps, last loss {last:.4f}")


def _cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(logits, target, reduction="none")


@contextlib.contextmanager
def isolated(seed: int, device: torch.device) -> Iterator[None]:
    """Within, torch's own draws follow from the seed; the generators are left as they were."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


def balanced_batch(
    features: Features, classes: Tensor, pixels: int, draws: torch.Generator
) -> Tensor:
    """Features (C·pixels, D) of so many pixels of each of the C classes, drawn with repetition."""
    starts = features.counts.cumsum(0) - features.counts
    shares = torch.rand(len(classes), pixels, generator=draws, dtype=torch.float64)
    numbers = shares.to(features.counts.device) * features.counts[classes, None]
    return features.values[(starts[classes, None] + numbers.long()).flatten()]
