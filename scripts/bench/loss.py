"""The loss at label size of logits at a network's stride: fused, one image at a time, and enlarged as a whole.

`loss` is forward and backward of BLV at 8×19, 128×256 → 512×1024, and at 4×847, 128² → 512²; `labels` is the class and
confidence of each pixel. On a GPU the fused forms have to be 4 times as fast as the plain one in a tenth of its memory,
and as fast as the plain labels in 0.15 of theirs. On a CPU, which has no fused form, one image will do.
"""

import argparse
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from common.losses.build import LossContext, build_loss
from common.losses.counts import Counts
from common.losses.pixel_loss import PixelLoss
from common.losses.upsampled import upsampled_sum
from common.ops.resize import Size
from common.ops.upsampled_loss import fuses, upsampled_labels, upsampled_loss
from scripts.bench import measure

BARS = {"bar": 4.0, "memory_bar": 0.1}
LABEL_BARS = {"bar": 1.0, "memory_bar": 0.15}


class Case(NamedTuple):
    """Sizes of a batch of logits and of its label."""

    batch: int
    classes: int
    small: Size
    large: Size

    def __str__(self) -> str:
        sizes = ("×".join(map(str, size)) for size in (self.small, self.large))
        return f"{self.batch}×{self.classes}, {' → '.join(sizes)}"


CASES = (Case(8, 19, (128, 256), (512, 1024)), Case(4, 847, (128, 128), (512, 512)))
QUICK = (Case(2, 5, (4, 6), (9, 13)), Case(1, 9, (3, 3), (12, 12)))


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="of logits")


def run(args: argparse.Namespace) -> list[measure.Row]:
    torch.manual_seed(0)
    cases = QUICK if args.quick else CASES
    if torch.device(args.device).type == "cpu":
        cases = tuple(case._replace(batch=1) for case in cases)

    return [make(case, args) for case in cases for make in (loss, labels)]


def example(case: Case, args: argparse.Namespace) -> tuple[Tensor, Tensor]:
    """Logits and label."""
    device = torch.device(args.device)
    kind = getattr(torch, args.dtype)
    logits = torch.randn(case.batch, case.classes, *case.small, device=device, dtype=kind)
    label = torch.randint(-1, case.classes, (case.batch, *case.large), dtype=torch.int16, device=device)
    return logits.requires_grad_(), label


# Loss and gradient --------------------------------------------------------------------------------------------------


def loss(case: Case, args: argparse.Namespace) -> measure.Row:
    logits, label = example(case, args)
    calls = sums(logits, label, plain_cross_entropy(case).to(logits.device))
    check = differences(calls, logits)

    forms = {
        name: partial(gradient, call, logits)
        for name, call in sums(logits, label, balanced(case).to(logits.device)).items()
    }
    bars = BARS if "fused" in forms else {}
    facts = {"dtype": args.dtype, "device": logits.device, **bars}
    name = f"loss, {case}"
    return measure.compare(name, forms, args.rounds, check=check, against="plain", memory=True, **facts)


def plain_cross_entropy(case: Case) -> PixelLoss:
    return build_loss({}, LossContext(Counts.from_pixels(torch.ones(case.classes))))


def balanced(case: Case) -> PixelLoss:
    """BLV, whose noise every form has to make."""
    counts = Counts.from_pixels(torch.logspace(3, 9, case.classes, dtype=torch.float64))
    return build_loss({"logits": {"name": "blv"}}, LossContext(counts))


def sums(logits: Tensor, label: Tensor, remedies: PixelLoss) -> dict[str, Callable[[], Tensor]]:
    """The sum of the pixels' losses in each form that the device has, the one that training uses first."""
    size = (label.shape[-2], label.shape[-1])

    def plain() -> Tensor:
        large = F.interpolate(logits, size, mode="bilinear", align_corners=False)
        return remedies.total(large, label)

    forms = {"image by image": lambda: upsampled_sum(logits, label, remedies.total, align_corners=False)}
    if fuses(logits, size, False):
        change = None if remedies.logits is None else remedies.logits.change(remedies.offsets, 0.0)
        fused = partial(upsampled_loss, logits, label, align_corners=False, change=change)
        forms = {"fused": fused, **forms}

    return {**forms, "plain": plain}


def gradient(call: Callable[[], Tensor], logits: Tensor) -> list[Tensor]:
    value = call()
    return [value, *torch.autograd.grad(value, logits)]


def differences(calls: dict[str, Callable[[], Tensor]], logits: Tensor) -> dict[str, float]:
    """Of values and gradients without noise, relative to those of the plain form."""
    limit = 1e-4 if logits.dtype == torch.float32 else 2e-2  # the plain form enlarges in half precision
    reference = gradient(calls["plain"], logits)
    found = {}
    for name, call in calls.items():
        pairs = zip(gradient(call, logits), reference, strict=True)
        apart = max(measure.relative(ours, theirs) for ours, theirs in pairs)
        found[f"{name}, relative"] = measure.require(name, apart, limit)

    return found


# Labels -------------------------------------------------------------------------------------------------------------


def labels(case: Case, args: argparse.Namespace) -> measure.Row:
    logits, _ = example(case, args)
    logits = logits.detach()

    def plain() -> tuple[Tensor, Tensor]:
        large = F.interpolate(logits.float(), case.large, mode="bilinear", align_corners=False)
        confidence, label = large.softmax(1).max(1)
        return label, confidence

    forms = {"plain": plain}
    if fuses(logits, case.large, False):
        fused = partial(upsampled_labels, logits, case.large, align_corners=False)
        forms = {"fused": fused, **forms}

    ours, theirs = next(iter(forms.values()))(), plain()
    check = {"confidence": measure.require("confidence", measure.relative(ours[1], theirs[1]), 1e-5)}
    bars = LABEL_BARS if "fused" in forms else {}
    facts = {"dtype": args.dtype, "device": logits.device, **bars}
    name = f"labels, {case}"
    return measure.compare(name, forms, args.rounds, check=check, against="plain", memory=True, **facts)
