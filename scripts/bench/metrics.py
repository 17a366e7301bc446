"""The confusion matrix of a 1024×2048 image, and the evaluation of whole images.

Ours makes class scores for a band of rows at a time and no K-channel map at full size. The plain forms: bincount over
the labelled pixels; upsample all logits, argmax, bincount. Without --config the network of the evaluation is left out:
its logits are given. With it the config's network, on random weights, evaluates toy images.
"""

import argparse
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from common.config import EvalConfig, load_config
from common.data import DATASETS, IGNORE, SegmentationDataset
from common.evaluation import evaluate, evaluation_mode
from common.inference import predict_labels
from common.metrics import confusion_matrix
from common.models import SegmentationModel, build_model
from scripts.bench import measure, workspace
from scripts.bench.full_size import parse_size

BAR_MS = 6.0  # of a confusion matrix, on 2 cores
TIES = 1e-5  # share of pixels at which two classes are so near that the last bit decides


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--size", default="1024x2048", help="HEIGHTxWIDTH (default 1024x2048)")
    parser.add_argument("--classes", type=int, default=19)
    parser.add_argument("--stride", type=int, default=4, help="of the given logits (default 4)")
    parser.add_argument("--config", help="also evaluate this config's network")
    parser.add_argument("overrides", nargs="*", default=[], help="section.key=value, for --config")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N")


def run(args: argparse.Namespace) -> list[measure.Row]:
    size = (64, 128) if args.quick else parse_size(args.size)
    rows = [matrix(size, args), labels(size, args)]
    return rows + ([evaluation(size, args)] if args.config else [])


def plain_matrix(pred: Tensor, label: Tensor, classes: int) -> Tensor:
    """Select the labelled pixels, then count pairs."""
    valid = label != IGNORE
    pair = classes * label[valid].long() + pred[valid].long()
    return torch.bincount(pair, minlength=classes**2).view(classes, classes)


def matrix(size: tuple[int, int], args: argparse.Namespace) -> measure.Row:
    k, device = args.classes, torch.device(args.device)
    blocks = torch.randint(-1, k, (1, 1, -(-size[0] // 16), -(-size[1] // 16))).float()
    label = F.interpolate(blocks, scale_factor=16)[0, 0, : size[0], : size[1]].to(device, torch.int16)
    wrong = torch.randint(k, size, device=device)
    pred = torch.where(torch.rand(size, device=device) < 0.7, label.long().clamp(min=0), wrong)
    forms = {"ours": lambda: confusion_matrix(pred, label, k), "bincount": lambda: plain_matrix(pred, label, k)}
    apart = float((forms["ours"]() - forms["bincount"]()).abs().sum())
    check = {"pixels apart": measure.require("confusion matrix", apart, 0)}
    facts = {"memory": True, "size": list(size), "classes": k, "device": device}
    row = measure.compare("confusion matrix", forms, args.rounds, check=check, **facts)
    return row | {"bar_ms": BAR_MS, "met": row["ms"]["ours"] <= BAR_MS}


class Given(SegmentationModel):
    """A network whose logits are given."""

    def __init__(self, logits: Tensor):
        super().__init__(logits.shape[1], (0, 0, 0), (1, 1, 1))
        self.logits = logits

    def segment(self, x: Tensor) -> dict[str, Any]:
        return {"logits": self.logits}


def plain_labels(model: SegmentationModel, images: Tensor) -> Tensor:
    """All scores at full size, then their argmax."""
    logits = model(images)["logits"]
    corners = model.align_corners
    return F.interpolate(logits, images.shape[-2:], mode="bilinear", align_corners=corners).argmax(1)


@torch.no_grad()
def labels(size: tuple[int, int], args: argparse.Namespace) -> measure.Row:
    """From logits at the network's stride to predicted classes at full size."""
    device = torch.device(args.device)
    grid = [-(-side // args.stride) for side in size]
    model = Given(torch.randn(1, args.classes, *grid, device=device)).to(device)
    images, cfg = torch.zeros(1, 3, *size, device=device), EvalConfig()
    forms = {"ours": lambda: predict_labels(model, images, cfg), "plain": lambda: plain_labels(model, images)}
    apart = float((forms["ours"]() != forms["plain"]()).float().mean())
    check = {"share of pixels apart": measure.require("predicted classes", apart, TIES)}
    facts = {"size": list(size), "classes": args.classes, "stride": args.stride, "device": args.device}
    return measure.compare("classes from logits", forms, args.rounds, check=check, memory=True, **facts)


@torch.no_grad()
def plain_evaluation(model: torch.nn.Module, data: SegmentationDataset, device: torch.device) -> Tensor:
    """Image by image: load, forward, all scores at full size, argmax, count."""
    classes = data.row.num_classes
    total = torch.zeros(classes, classes, dtype=torch.int64)
    with evaluation_mode(model):
        for index in range(len(data)):
            sample = data.load(index)
            images = torch.from_numpy(sample["image"]).permute(2, 0, 1)[None].to(device)
            pred = plain_labels(model, images)[0].cpu()
            total += plain_matrix(pred, torch.from_numpy(sample["label"]), classes)
    return total


def evaluation(size: tuple[int, int], args: argparse.Namespace) -> measure.Row:
    """Milliseconds an image of a whole evaluation, loading included, in this process."""
    device = torch.device(args.device)
    cfg = load_config(args.config, [*args.overrides, "data.root=", "data.val.root="])
    whole = replace(cfg.eval, workers=0, mode="whole", scales=(1.0,), flip=False)
    torch.manual_seed(0)
    model = build_model(replace(cfg.model, pretrained=False, checkpoint=None)).to(device)
    with tempfile.TemporaryDirectory(prefix="metrics_") as folder:
        workspace.use(Path(folder))
        workspace.write_scenes(cfg, Path(folder), size)
        root = Path(folder) / DATASETS[cfg.data.val.dataset].folder
        data = SegmentationDataset(replace(cfg.data.val, root=str(root)))
        results: dict[str, Any] = {}

        def ours() -> None:
            results["ours"] = evaluate(model, data, whole, device=device)

        def plain() -> None:
            results["plain"] = plain_evaluation(model, data, device)

        ours(), plain()
        difference = (torch.tensor(results["ours"]["confusion"]) - results["plain"]).abs().sum()
        apart = float(difference / results["plain"].sum())
        check = {"share of pixels apart": measure.require("evaluation", apart, 2 * TIES)}
        facts = {"config": cfg.name, "size": list(size), "images": len(data), "device": args.device}
        forms, items = {"ours": ours, "plain": plain}, len(data)
        return measure.compare("evaluation", forms, args.rounds, check=check, memory=True, items=items, **facts)
