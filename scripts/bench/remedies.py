"""What every remedy of the training loss costs, in plain cross-entropies: forward and backward, at label size.

All take their turns in one process, called as a training does: logits of 2×K, 64×128, labels of 256×512, of few large
regions and most classes rare, with 11 and with 150 classes. `at: network` is a term over regions that sees the logits
as they are. Values are those of docs/remedies.md.
"""

import argparse
from dataclasses import fields
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from common.losses.build import LOSSES, LossContext, build_loss
from common.losses.counts import Counts
from common.losses.pixel_loss import PixelLoss
from scripts.bench import measure

PLAIN = "cross-entropy"
CLASSES = (11, 150)
BATCH, SMALL, LARGE = 2, (64, 128), (256, 512)
QUICK = (2, (4, 6), (9, 13))
FEATURES = 64  # channels, for the terms that classify regions


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N")


def run(args: argparse.Namespace) -> list[measure.Row]:
    torch.manual_seed(0)
    return [row(num_classes, args) for num_classes in CLASSES]


def row(num_classes: int, args: argparse.Namespace) -> measure.Row:
    batch, small, large = QUICK if args.quick else (BATCH, SMALL, LARGE)
    device = torch.device(args.device)
    logits = torch.randn(batch, num_classes, *small, device=device).requires_grad_()
    features = torch.randn(batch, FEATURES, *small, device=device)
    label = regions(batch, num_classes, large).to(device)

    calls = {
        name: partial(gradient, loss.to(device), logits, label, features) for name, loss in losses(num_classes).items()
    }
    check = {PLAIN: difference(calls[PLAIN](), logits, label)}
    sizes = " → ".join("×".join(map(str, size)) for size in (small, large))
    name = f"loss of {batch}×{num_classes}, {sizes}"
    return measure.compare(name, calls, args.rounds, check=check, device=device)


def regions(batch: int, num_classes: int, size: tuple[int, int]) -> Tensor:
    """Labels (B, H, W) of an eighth as many patches a side, class k about as often as 1 / k."""
    chances = 1 / torch.arange(1, num_classes + 1, dtype=torch.float64)
    patches = [max(1, side // 8) for side in size]
    drawn = torch.multinomial(chances, batch * patches[0] * patches[1], replacement=True)
    grid = drawn.view(batch, 1, *patches).double()
    return F.interpolate(grid, size, mode="nearest")[:, 0].long()


def losses(num_classes: int) -> dict[str, PixelLoss]:
    """Plain cross-entropy, and every remedy with its own defaults."""
    rank = torch.arange(1, num_classes + 1, dtype=torch.float64)
    pixels, images = 1e9 / rank, 1000 / rank.sqrt()
    context = LossContext(Counts(pixels, images, 1000.0), cosine=30.0, features=FEATURES)
    sections = {PLAIN: {}}
    for name, remedy in LOSSES.items():
        if remedy.slot != "sets":
            sections[name] = {remedy.slot: {"name": name}}
            continue
        sections[name] = {"sets": [{"name": name}]}
        if "at" in {field.name for field in fields(remedy.remedy)}:
            sections[f"{name}, at: network"] = {"sets": [{"name": name, "at": "network"}]}

    return {name: build_loss(section, context) for name, section in sections.items()}


def gradient(loss: PixelLoss, logits: Tensor, label: Tensor, features: Tensor) -> list[Tensor]:
    """The loss, and its gradient to the logits."""
    value = loss.upsampled(logits, label, align_corners=False, progress=0.9, features=features)
    return [value, *torch.autograd.grad(value, logits)]


def difference(ours: list[Tensor], logits: Tensor, label: Tensor) -> float:
    """Of cross-entropy's value and gradient to torch's own."""
    large = F.interpolate(logits, label.shape[-2:], mode="bilinear", align_corners=False)
    value = F.cross_entropy(large, label)
    theirs = [value, *torch.autograd.grad(value, logits)]
    apart = max(measure.relative(a, b) for a, b in zip(ours, theirs, strict=True))
    return measure.require(PLAIN, apart, 1e-4)
