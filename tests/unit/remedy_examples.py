"""Losses of one remedy on three classes."""

import torch

from common.losses.build import LOSSES, LossContext, build_loss
from common.losses.counts import Counts

PIXELS = torch.tensor([900.0, 90.0, 10.0], dtype=torch.float64)
COUNTS = Counts(PIXELS, torch.tensor([10.0, 6.0, 2.0], dtype=torch.float64), 10.0)


def section(name, **options):
    item = {"name": name, **options}
    slot = LOSSES[name].slot
    return {slot: [item] if slot == "sets" else item}


def make(name, counts=COUNTS, average="valid", **options):
    return build_loss(section(name, **options), LossContext(counts, average, cosine=30.0, features=3))


def value(loss, logits, label):
    """A loss whose features, where a remedy asks for them, are the three logits."""
    return loss(logits, label, features=logits)


def example(classes=3, size=(2, 6, 7), seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(size[0], classes, *size[1:], generator=generator)
    label = torch.randint(-1, classes, size, generator=generator)
    return logits, label
