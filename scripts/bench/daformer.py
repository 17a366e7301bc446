"""A training step of DAFormer against the same step as the release orders it, and with the recommended options.

All forms start from the same weights and see the same pixels and labels; what is drawn is drawn alike. The losses and
the gradient's norm of the first step have to be equal. The classifier is made large, so that some pseudo-labels are
confident, as after some training; jitter and blur come in every step. Memory is the peak above weights, gradients and
optimiser state.
"""

import argparse
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from itertools import repeat
from pathlib import Path

import torch

from common.config import Config, load_config
from common.data import DATASETS
from common.data.statistics import placeholder
from common.engine import MethodContext, prepare, runtime
from common.engine.method import Batch
from common.engine.trainer import Trainer
from common.models import build_model
from scripts.bench import measure
from scripts.bench.daformer_literal import LiteralDAFormer
from scripts.bench.families import ROOT
from scripts.bench.step import Form, whole_step
from scripts.bench.usrn import FAST, LITERAL, OURS, bars
from uda.daformer import DAFormer

CONFIG = ROOT / "uda" / "configs" / "daformer" / "gta5_to_cityscapes.yaml"
LOGITS = 2.0  # about the standard deviation of the logits
MEMORY_BAR = 0.8
SAME, SAME_NORM = 1e-5, 1e-4  # relative differences allowed to losses and to the gradient's norm
FORMS: dict[str, tuple[type[DAFormer], tuple[str, ...]]] = {
    OURS: (DAFormer, ()),
    LITERAL: (LiteralDAFormer, ()),
    FAST: (DAFormer, ("train.precision=bf16", "train.channels_last=true")),
}


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--backbone", default="mit_b0", help="of the network (default mit_b0; the paper: mit_b5)")
    parser.add_argument("--batch", type=int, default=2, help="source and as many target crops (default 2)")
    parser.add_argument("--crop", type=int, default=256, help="side of a crop (default 256; the paper: 512)")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N")


def run(args: argparse.Namespace) -> list[measure.Row]:
    if args.quick:
        args.backbone, args.batch, args.crop = "mit_b0", 2, 64
    words = [f"model.backbone={args.backbone}", "train.devices=1", "optim.lr=1e-6", "method.threshold=0.5"]
    words += [f"method.margins={{top: {args.crop * 15 // 512}, bottom: {args.crop * 120 // 512}}}"]
    words += ["method.jitter=1", "method.blur=1", *(["model.options.channels=16"] if args.quick else [])]
    words += [f"data.streams.{stream}.batch_size={args.batch}" for stream in ("source", "target")]
    with tempfile.TemporaryDirectory(prefix="daformer_") as folder:
        weights = imagenet(load_config(CONFIG, words), Path(folder))
        forms = {
            name: build(kind, load_config(CONFIG, [*words, f"model.pretrained={weights}", *more]), args)
            for name, (kind, more) in FORMS.items()
        }
    check = same_step(forms)
    row = whole_step("daformer/gta5_to_cityscapes", forms, args)
    return [{**row, "backbone": args.backbone, "crop": args.crop, "check": check, **bars(row, MEMORY_BAR)}]


def imagenet(cfg: Config, folder: Path) -> Path:
    """A file of random weights of the backbone, in place of ImageNet's."""
    torch.manual_seed(1)
    backbone = build_model(replace(cfg.model, pretrained=False)).get_submodule("backbone")
    path = folder / "imagenet.pth"
    torch.save(backbone.state_dict(), path)
    return path


def build(kind: type[DAFormer], cfg: Config, args: argparse.Namespace) -> Form:
    """A trainer of one form, and crops that it sees again in every step.

    The student has moved a little from ImageNet's weights, so that there is a distance.
    """
    device = torch.device(args.device)
    context = MethodContext(placeholder(cfg.model.num_classes), DATASETS["gta5"])
    runtime.configure(cfg.train, device)
    method = prepare(cfg, kind, context, device).train()
    with torch.no_grad():
        classifier = method.model.decode_head.conv_seg
        torch.nn.init.normal_(classifier.weight, std=LOGITS * (2 / classifier.in_channels) ** 0.5)
        for parameter in method.model.backbone.parameters():
            parameter.mul_(1.01)
        method.teacher.load_state_dict(method.model.state_dict())
    return Form(Trainer(cfg, method, device), crops(cfg.model.num_classes, args))


def crops(classes: int, args: argparse.Namespace) -> dict[str, Iterator[Batch]]:
    """Random pixels, and labels in blocks as large as a cell of the backbone's last map."""
    g, side, batch = torch.Generator().manual_seed(0), args.crop, args.batch
    label = torch.randint(-1, classes, (batch, side // 32, side // 32), generator=g)
    label = label.repeat_interleave(32, 1).repeat_interleave(32, 2).short()
    shared = {"extent": torch.tensor([[side, side]] * batch, dtype=torch.int32)}

    def pixels() -> torch.Tensor:
        return torch.randint(0, 256, (batch, 3, side, side), generator=g, dtype=torch.uint8)

    source = {"image": pixels(), "label": label, **shared}
    target = {"image": pixels(), **shared}
    return {"source": repeat(source), "target": repeat(target)}


def same_step(forms: dict[str, Form]) -> dict[str, float]:
    """The first step of both float32 forms: relative differences of the losses and of the gradient's norm."""
    for form in forms.values():
        form()
    ours, theirs = forms[OURS].scalars, forms[LITERAL].scalars
    if not 0 < ours["confident"] < 1 or not ours["feature_distance"] > 0:
        raise ValueError(
            f"confident pseudo-labels: {ours['confident']}, feature distance: {ours['feature_distance']}; "
            "neither may be 0, and not all labels confident"
        )
    limits = {**dict.fromkeys(("source_ce", "feature_distance", "mixed_ce"), SAME), "grad_norm": SAME_NORM}
    found = {
        name: measure.require(name, abs(ours[name] - theirs[name]) / abs(theirs[name]), limit)
        for name, limit in limits.items()
    }
    return {**found, "confident": ours["confident"]}
