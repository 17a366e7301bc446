"""A training step of UniMatch or UniMatch V2 against the same step in the release's form, and with recommended options.

All forms start from the same weights and see the same pixels, labels, boxes and dropout: the losses and the gradient's
norm of the first step have to be equal. The classifier's outputs are spread, so that some pseudo-labels are confident,
as after some training. Memory is the peak above weights, gradients and optimiser state.
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
from common.models import SegmentationModel
from scripts.bench import measure
from scripts.bench.families import ROOT
from scripts.bench.step import Form, whole_step
from scripts.bench.unimatch_literal import LiteralUniMatch, LiteralUniMatchV2
from scripts.bench.usrn import FAST, LITERAL, OURS, bars
from semi_sup.unimatch import Consistency, UniMatch
from semi_sup.unimatch_v2 import UniMatchV2

CONFIGS = ROOT / "semi_sup" / "configs"
METHODS: dict[str, tuple[str, type[Consistency], type[Consistency]]] = {
    "unimatch": ("unimatch/pascal_92_r50.yaml", UniMatch, LiteralUniMatch),
    "unimatch_v2": ("unimatch_v2/pascal_92_dinov2_small.yaml", UniMatchV2, LiteralUniMatchV2),
}
TINY = {
    "unimatch": ("model.backbone=resnet18", "model.options={channels: 8}"),
    "unimatch_v2": (
        "model.options={widths: [4, 6, 8, 8], channels: 4, backbone: {dim: 16, heads: 2, taps: [0, 1, 2, 3], grid: 3}}",
    ),
}
LOGITS = 2.0  # the standard deviation that the logits are brought to
MEMORY_BAR = 0.8
SAME, SAME_NORM = 1e-5, 1e-3  # relative differences allowed to losses and to the gradient's norm


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--method", choices=METHODS, default="unimatch", help="(default unimatch)")
    parser.add_argument("--batch", type=int, default=2, help="labelled and as many unlabelled crops (default 2)")
    parser.add_argument("--crop", type=int, default=168, help="side of a crop (default 168)")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N")


def run(args: argparse.Namespace) -> list[measure.Row]:
    path, ours, literal = METHODS[args.method]
    if args.quick:
        args.batch, args.crop = 2, 42
    words = ["model.pretrained=false", "train.devices=1", "optim.lr=1e-6", "method.threshold=0.5"]
    words += [f"data.streams.{stream}.batch_size={args.batch}" for stream in ("labeled", "unlabeled")]
    words += TINY[args.method] if args.quick else ()
    fast = ("train.precision=bf16", "train.channels_last=true")
    kinds = {OURS: (ours, ()), LITERAL: (literal, ()), FAST: (ours, fast)}
    forms = {
        name: build(kind, load_config(CONFIGS / path, [*words, *more]), args) for name, (kind, more) in kinds.items()
    }
    check = same_step(forms)
    row = whole_step(path.removesuffix(".yaml"), forms, args)
    return [{**row, "crop": args.crop, "check": check, **bars(row, MEMORY_BAR)}]


def build(kind: type[Consistency], cfg: Config, args: argparse.Namespace) -> Form:
    """A trainer of one form, and crops that it sees again in every step."""
    device = torch.device(args.device)
    context = MethodContext(placeholder(cfg.model.num_classes))
    runtime.configure(cfg.train, device)
    method = prepare(cfg, kind, context, device).train()
    streams = crops(cfg.model.num_classes, args)
    images = next(streams["labeled"])["image"].to(device)
    make_sure(method.model, images)
    if isinstance(method, UniMatchV2):
        method.teacher.load_state_dict(method.model.state_dict())
    return Form(Trainer(cfg, method, device), streams)


@torch.no_grad()
def make_sure(model: SegmentationModel, images: torch.Tensor) -> None:
    """Let the logits of these images have the mean 0 in each class, and the standard deviation LOGITS, in training
    mode: running statistics say nothing of random weights."""
    logits = model(images)["logits"]
    mean = logits.mean((0, 2, 3))
    gain = LOGITS / (logits - mean.view(-1, 1, 1)).std()
    classifier = model.get_submodule(model.classifiers[0])
    classifier.weight.mul_(gain)
    classifier.bias.sub_(mean).mul_(gain)


def crops(classes: int, args: argparse.Namespace) -> dict[str, Iterator[Batch]]:
    """Random pixels, labels in blocks, boxes in every second crop, and padding in the first."""
    g, side, batch = torch.Generator().manual_seed(0), args.crop, args.batch

    def pixels() -> torch.Tensor:
        return torch.randint(0, 256, (batch, 3, side, side), generator=g, dtype=torch.uint8)

    label = torch.randint(-1, classes, (batch, side // 14, side // 14), generator=g)
    label = label.repeat_interleave(14, 1).repeat_interleave(14, 2).short()
    shown = torch.ones(batch, side, side, dtype=torch.bool)
    shown[0, :, -side // 8 :] = False
    boxes = torch.zeros(batch, 4, dtype=torch.int32)
    boxes[::2] = torch.tensor([side // 5, side // 4, side // 2, side - 1])
    views = ("weak", "strong1", "strong2")
    unlabeled = {key: pixels() for key in (*views, *(f"partner_{view}" for view in views))}
    unlabeled |= {"shown": shown, "partner_shown": shown.flip(0), "box1": boxes, "box2": boxes.flip(0)}
    return {"labeled": repeat({"image": pixels(), "label": label}), "unlabeled": repeat(unlabeled)}


def same_step(forms: dict[str, Form]) -> dict[str, float]:
    """The first step of both float32 forms: relative differences of the losses and of the gradient's norm."""
    for form in forms.values():
        form()
    ours, theirs = forms[OURS].scalars, forms[LITERAL].scalars
    if not 0 < ours["kept"] < 1:
        raise ValueError(f"of the pseudo-labels {ours['kept']} are confident: some have to be, and not all")
    terms = [name for name in ("Lx", "Lfp", "Ls") if name in theirs]
    limits = {**dict.fromkeys(terms, SAME), "grad_norm": SAME_NORM}
    found = {
        name: measure.require(name, abs(ours[name] - theirs[name]) / abs(theirs[name]), limit)
        for name, limit in limits.items()
    }
    return {**found, "kept": ours["kept"]}
