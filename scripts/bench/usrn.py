"""A training step of USRN against the same step as the release writes it, and with the recommended options.

All forms start from the same weights and see the same pixels, labels and dropout: the losses and the gradient's norm of
the first step have to be equal. The classifiers are scaled up so that many pseudo-labels are certain and some are
vetoed, as after some training. Memory is the peak above weights, gradients and optimiser state.
"""

import argparse
from collections.abc import Iterator
from itertools import repeat

import torch

from common.config import Config, load_config
from common.data.statistics import placeholder
from common.engine import MethodContext, prepare, runtime
from common.engine.method import Batch
from common.engine.trainer import Trainer
from scripts.bench import measure
from scripts.bench.families import ROOT
from scripts.bench.step import Form, whole_step
from scripts.bench.usrn_literal import LiteralUSRN
from semi_sup.subclasses import offsets
from semi_sup.usrn import USRN

GAIN = 8.0  # of the classifiers
MEMORY_BAR, FAST_BAR = 0.7, 1.5
SMALLEST = 1e-6  # of a term, for its relative difference
SAME, SAME_NORM = 1e-5, 1e-4  # relative differences allowed to losses and to the gradient's norm
OURS, LITERAL, FAST = "ours", "literal", "channels_last + bf16"
FORMS: dict[str, tuple[type[USRN], tuple[str, ...]]] = {
    OURS: (USRN, ()),
    LITERAL: (LiteralUSRN, ()),
    FAST: (USRN, ("train.precision=bf16", "train.channels_last=true")),
}
TINY = ("model.options.blocks=[1, 1, 1, 1]", "model.options.width=8", "model.options.channels=16")


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--split", default="voc_1over32", help="whose classes and subclasses (default voc_1over32)")
    parser.add_argument("--batch", type=int, default=4, help="labelled and as many unlabelled crops (default 4)")
    parser.add_argument("--crop", type=int, default=320, help="side of a crop (default 320)")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N")


def run(args: argparse.Namespace) -> list[measure.Row]:
    path = ROOT / "semi_sup" / "configs" / f"{args.split}_usrn.json"
    if not path.is_file():
        raise ValueError(f"--split {args.split!r}: there is no {path}")
    if args.quick:
        args.batch, args.crop = 2, 64
    words = ["model.pretrained=false", "train.devices=1", "optim.lr=1e-6", *(TINY if args.quick else ())]
    words += [f"data.streams.{stream}.batch_size={args.batch}" for stream in ("labeled", "unlabeled")]
    forms = {name: build(kind, load_config(path, [*words, *more]), args) for name, (kind, more) in FORMS.items()}
    check = same_step(forms)
    row = whole_step(f"{args.split}_usrn", forms, args)
    sizes = {"crop": args.crop, "subclasses": forms[OURS].trainer.method.model.subclasses}
    return [{**row, **sizes, "check": check, **bars(row, MEMORY_BAR)}]


def build(kind: type[USRN], cfg: Config, args: argparse.Namespace) -> Form:
    """A trainer of one form, and crops that it sees again in every step."""
    device = torch.device(args.device)
    context = MethodContext(placeholder(cfg.model.num_classes))
    runtime.configure(cfg.train, device)
    method = prepare(cfg, kind, context, device).train()
    with torch.no_grad():
        for name, tensor in method.model.named_parameters():
            if name.startswith("classifier"):
                tensor.mul_(GAIN)
    return Form(Trainer(cfg, method, device), crops(method, args))


def crops(method: USRN, args: argparse.Namespace) -> dict[str, Iterator[Batch]]:
    """Random pixels with labels in blocks and subclasses of those, without borders."""
    g, side, batch = torch.Generator().manual_seed(0), args.crop, args.batch
    parents = method.parents.cpu()
    counts = parents.bincount()
    label = torch.randint(-1, len(counts), (batch, side // 16, side // 16), generator=g)
    part = (torch.rand(label.shape, generator=g) * counts[label.clamp(min=0)]).long()
    sub_label = torch.where(label < 0, -1, offsets(counts)[label.clamp(min=0)] + part)
    label, sub_label = (t.repeat_interleave(16, 1).repeat_interleave(16, 2).short() for t in (label, sub_label))

    def pixels() -> torch.Tensor:
        return torch.randint(0, 256, (batch, 3, side, side), generator=g, dtype=torch.uint8)

    geometry = torch.tensor([[side, side, side, side, 0, 0, 0]] * batch, dtype=torch.int32)
    labeled = {"image": pixels(), "label": label, "sub_label": sub_label}
    unlabeled = {"weak": pixels(), "strong": pixels(), "geometry": geometry}
    return {"labeled": repeat(labeled), "unlabeled": repeat(unlabeled)}


def same_step(forms: dict[str, Form]) -> dict[str, float]:
    """The first step of both float32 forms: relative differences of the losses and of the gradient's norm."""
    for form in forms.values():
        form()
    ours, theirs = forms[OURS].scalars, forms[LITERAL].scalars
    if not ours["kept"] > 0 or not ours["vetoed"] > 0:
        raise ValueError(f"of the pseudo-labels {ours['kept']} are kept and {ours['vetoed']} vetoed: both must occur")
    limits = {**dict.fromkeys(("loss", "Ls", "Ls_sub", "Lu_sub", "Lu_reg"), SAME), "grad_norm": SAME_NORM}
    apart = {}
    for name in limits:
        size = max(abs(theirs[name]), SMALLEST)  # a term may be 0 in both, where no label is sure enough
        apart[name] = abs(ours[name] - theirs[name]) / size
    found = {name: measure.require(name, apart[name], limit) for name, limit in limits.items()}
    return {**found, "kept": ours["kept"], "vetoed": ours["vetoed"]}


def bars(row: measure.Row, memory_bar: float) -> dict[str, object]:
    """Peak memory, no slower like for like, and faster with the recommended options."""
    times, peaks = row["ms"], row["peak_mib"]
    ratio = peaks[OURS] / peaks[LITERAL] if peaks[LITERAL] else None
    alike, fast = times[LITERAL] / times[OURS], times[LITERAL] / times[FAST]
    return {
        "faster": {LITERAL: alike},
        "bar": 1.0,
        "met": alike >= 1.0,
        "memory_ratio": ratio,
        "memory_bar": memory_bar,
        "memory_met": ratio is not None and ratio <= memory_bar,
        "recommended_faster": {"times": fast, "bar": FAST_BAR, "met": fast >= FAST_BAR},
    }
