"""Mask2Former against the usual way to compute it: order of inference, a training step, deformable attention.

`inference` compares predicted classes from query maps that are resized in bands of rows, or in a kernel on CUDA, with K
class maps at full size.
`step` is forward and backward on one image beside Mask2Former of the `transformers` package, both on random weights;
it needs that package. `operation` has every form of the attention that runs on the device; on a GPU the chosen form has
to be 3 times as fast as `grid_sample`, in a quarter of its memory, at 16 images; `--other MODULE:FUNCTION` adds an
implementation that is installed and called as Deformable DETR's extension is, such as
mmcv.ops.multi_scale_deform_attn:MultiScaleDeformableAttnFunction.apply. `host` is what surrounds the two
kernels of the attention, which small ones wait for: forward and backward without a launch, on a few tokens on the CPU.
"""

import argparse
import importlib
import operator as operators
import warnings
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.config import ModelConfig
from common.models import build_model
from common.models.mask2former import Mask2Former
from common.ops import deform_attn, upsampled_loss
from common.ops.deform_attn import choose_form, ms_deform_attn, triton_missing
from ltss_benchmark.criterion import CriterionConfig, SetCriterion
from ltss_benchmark.matcher import find_targets
from scripts.bench import measure

FROZEN = 53_120  # affine parameters of ResNet-50's norms: constant here, trained there


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N")
    parser.add_argument("--only", choices=tuple(PARTS), help="one of the parts")
    parser.add_argument("--batch", type=int, help="images of `operation` (default 1, on a GPU 16)")
    parser.add_argument(
        "--shown", nargs=2, type=int, metavar=("H", "W"), help="the image's size in `inference`, if not the network's"
    )
    parser.add_argument(
        "--other", nargs="+", default=[], metavar="MODULE:FUNCTION", help="implementations that `operation` has rows of"
    )


def run(args: argparse.Namespace) -> list[measure.Row]:
    if args.batch is not None and args.batch < 1:
        raise ValueError(f"--batch {args.batch}: must be at least 1")
    if args.other and args.only not in (None, "operation"):
        raise ValueError(f"--other: of `operation`, and --only is {args.only}; leave one of them out")
    if args.shown and (min(args.shown) < 1 or args.only not in (None, "inference")):
        raise ValueError(f"--shown {args.shown[0]} {args.shown[1]}: of `inference`, two sides of at least 1")
    for place in args.other:
        installed(place)
    torch.manual_seed(0)
    chosen = [args.only] if args.only else list(PARTS)
    batch = args.batch or (16 if torch.device(args.device).type == "cuda" else 1)
    return [row for name in chosen for row in PARTS[name](args, Sizes(args.quick, batch))]


class Sizes:
    """Those of ADE20K-Full, or tiny ones; `batch` is that of `operation`."""

    def __init__(self, quick: bool, batch: int = 1):
        self.classes, self.queries = (19, 20) if quick else (847, 100)
        self.image = (40, 70) if quick else (512, 683)
        self.crop, self.targets = (64, 4) if quick else (512, 10)
        self.batch = batch


# Inference ----------------------------------------------------------------------------------------------------------


class Given(Mask2Former):
    """A Mask2Former whose queries' outputs are given."""

    def __init__(self, out: dict[str, Tensor], classes: int):
        nn.Module.__init__(self)
        self.out, self.num_classes, self.align_corners, self.divisor = out, classes, False, 32

    def infer(self, images: Tensor) -> dict[str, Any]:
        return self.out


def inference(args: argparse.Namespace, sizes: Sizes) -> list[measure.Row]:
    device, (height, width) = torch.device(args.device), sizes.image
    padded = tuple(-(-side // 32) * 32 for side in sizes.image)
    probability = (3 * torch.randn(1, sizes.classes + 1, sizes.queries)).softmax(1)[:, :-1].contiguous()
    coarse = torch.randn(1, sizes.queries, padded[0] // 32, padded[1] // 32)
    masks = 4 * F.interpolate(coarse, scale_factor=8, mode="bilinear", align_corners=False)
    out = {"probability": probability.to(device), "pred_masks": masks.to(device)}
    model, images = Given(out, sizes.classes), torch.zeros(1, 3, height, width, device=device)

    size = tuple(args.shown or sizes.image)
    other = [size] if args.shown else []

    def labels() -> Tensor:
        return model.labels(images, *other)[0]

    def literal_scores() -> Tensor:
        large = F.interpolate(out["pred_masks"], padded, mode="bilinear", align_corners=False).sigmoid()
        scores = torch.einsum("bkq,bqhw->bkhw", out["probability"], large)[..., :height, :width]
        return F.interpolate(scores, size, mode="bilinear", align_corners=False)

    check = {"pixels of another class that are no ties": no_ties(literal_scores(), labels())}
    ours = "fused" if upsampled_loss.choose_form(out["pred_masks"]) == "triton" else "bands"
    forms = {ours: labels, "literal": lambda: literal_scores().argmax(1)}
    facts = {"classes": sizes.classes, "queries": sizes.queries, "image": [height, width], "shown": list(size)}
    bars = {"bar": 1.0, "memory": True, "memory_bar": 0.15}
    return [measure.compare("inference", forms, args.rounds, check=check, device=device, **bars, **facts)]


def no_ties(scores: Tensor, label: Tensor) -> float:
    """Share of pixels whose label is neither the best class of `scores` nor within rounding of it."""
    best = scores.max(1).values
    given = scores.gather(1, label.unsqueeze(1)).squeeze(1)
    share = (best - given > 1e-5 * best.abs().clamp(min=1)).float().mean().item()
    return measure.require("labels of the bands against the literal order", share, 0.0)


# A training step ----------------------------------------------------------------------------------------------------


def step(args: argparse.Namespace, sizes: Sizes) -> list[measure.Row]:
    if find_spec("transformers") is None:
        warnings.warn("step: left out, the package transformers is not installed", stacklevel=2)
        return []
    device = torch.device(args.device)
    image = torch.randint(0, 256, (1, 3, sizes.crop, sizes.crop), dtype=torch.uint8, device=device)
    label = stripes(sizes).to(device)
    ours, (theirs, parameters) = our_step(image, label, sizes), their_step(image, label, sizes)
    difference = abs(ours.parameters + FROZEN - parameters)
    check = {"parameters, difference": measure.require("number of parameters", difference, 0)}
    forms = {"ours": ours, "transformers": theirs}
    facts = {"classes": sizes.classes, "crop": sizes.crop, "targets": sizes.targets, "batch": 1}
    bars = {"bar": 1.3, "memory": True, "memory_bar": 0.65}
    return [measure.compare("training step", forms, args.rounds, check=check, device=device, **bars, **facts)]


def stripes(sizes: Sizes) -> Tensor:
    """A label map (1, H, W) of as many classes as there are targets."""
    rows = torch.arange(sizes.crop) * sizes.targets // sizes.crop
    return rows.view(1, -1, 1).expand(1, -1, sizes.crop).to(torch.int16).contiguous()


class OurStep:
    """Forward and backward; gradients stay allocated, as they are in training."""

    def __init__(self, model: nn.Module, criterion: SetCriterion, image: Tensor, label: Tensor):
        self.model, self.criterion, self.image, self.label = model, criterion, image, label
        self.parameters = sum(p.numel() for p in model.parameters())

    def __call__(self) -> None:
        targets = find_targets(self.label, self.criterion.num_classes)
        self.model.zero_grad(set_to_none=False)
        self.criterion(self.model(self.image), targets)["loss"].backward()


def our_step(image: Tensor, label: Tensor, sizes: Sizes) -> OurStep:
    model = build_model(ModelConfig("mask2former", sizes.classes, "resnet50")).to(image.device).train()
    return OurStep(model, SetCriterion(sizes.classes, CriterionConfig()), image, label)


def their_step(image: Tensor, label: Tensor, sizes: Sizes) -> tuple[Callable[[], None], int]:
    """The step of `transformers`, and the number of parameters of its network."""
    from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation, ResNetConfig

    backbone = ResNetConfig(depths=[3, 4, 6, 3], out_features=["stage1", "stage2", "stage3", "stage4"])
    config = Mask2FormerConfig(backbone_config=backbone, num_labels=sizes.classes, num_queries=100)
    model = Mask2FormerForUniversalSegmentation(config).to(image.device).train()
    classes = torch.arange(sizes.targets, device=image.device)
    masks = (label == classes.view(-1, 1, 1)).float()

    def call() -> None:
        model.zero_grad(set_to_none=False)
        pixels = (image - 120.0) / 60.0
        model(pixel_values=pixels, mask_labels=[masks], class_labels=[classes]).loss.backward()

    return call, sum(p.numel() for p in model.parameters())


# Deformable attention -----------------------------------------------------------------------------------------------


def operation(args: argparse.Namespace, sizes: Sizes) -> list[measure.Row]:
    """Forward and backward of the pixel decoder's attention on a crop: 8 heads of 32, 3 levels, 4 points."""
    device = torch.device(args.device)
    shapes = tuple((sizes.crop // s, sizes.crop // s) for s in (32, 16, 8))
    queries = sum(h * w for h, w in shapes)
    value = torch.randn(sizes.batch, queries, 8, 32, device=device, requires_grad=True)
    locations = torch.rand(sizes.batch, queries, 8, 3, 4, 2, device=device, requires_grad=True)
    weights = torch.rand(sizes.batch, queries, 8, 3, 4, device=device, requires_grad=True)
    tensors = (value, locations, weights)

    def form(name: str) -> Callable[[], list[Tensor]]:
        def call() -> list[Tensor]:
            out = ms_deform_attn(value, shapes, locations, weights, form=name)
            return [out, *torch.autograd.grad(out.square().sum(), tensors)]

        return call

    chosen = choose_form(device.type)
    names = [chosen, *(n for n in ("grid_sample", "embedding_bag") if n != chosen)]
    names += ["triton"] if device.type == "cuda" and chosen != "triton" and triton_missing() is None else []
    forms = {name: form(name) for name in names}
    forms |= {place: other_form(installed(place), tensors, shapes) for place in args.other}
    reference = forms["grid_sample"]()
    check = {
        f"{name}, relative": measure.require(
            name, max(measure.relative(a, b) for a, b in zip(call(), reference, strict=True)), 1e-4
        )
        for name, call in forms.items()
    }
    facts = {"tokens": queries, "batch": sizes.batch, "device": device, **bars_of(device.type, chosen)}
    return [
        measure.compare(
            "deformable attention", forms, args.rounds, check=check, against="grid_sample", memory=True, **facts
        )
    ]


def installed(place: str) -> Callable[..., Tensor]:
    """The function at MODULE:FUNCTION. ValueError where there is none."""
    module, _, function = place.partition(":")
    try:
        return operators.attrgetter(function)(importlib.import_module(module))
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"--other {place}: {error}; give MODULE:FUNCTION of an installed package") from error


def other_form(
    function: Callable[..., Tensor], tensors: tuple[Tensor, Tensor, Tensor], shapes: tuple[tuple[int, int], ...]
) -> Callable[[], list[Tensor]]:
    """Forward and backward of an implementation that takes (value, sizes (L, 2), first token of each level (L,),
    locations, weights, images at once)."""
    value, locations, weights = tensors
    sizes = torch.tensor(shapes, device=value.device)
    areas = sizes.prod(1)
    starts = areas.cumsum(0) - areas

    def call() -> list[Tensor]:
        out = function(value, sizes, starts, locations, weights, len(value))
        return [out, *torch.autograd.grad(out.square().sum(), tensors)]

    return call


def bars_of(device: str, form: str) -> dict[str, float]:
    """What a fused form has to reach on a GPU against `grid_sample`: how many times its speed, what share of its
    memory."""
    return {"bar": 3.0, "memory_bar": 0.25} if device == "cuda" and form != "grid_sample" else {}


def host(args: argparse.Namespace, sizes: Sizes) -> list[measure.Row]:
    """The attention's autograd function against the operator of `torch.library` that compiled code calls."""
    if find_spec("triton") is None:
        warnings.warn("host: left out, Triton is not installed", stacklevel=2)
        return []

    from common.ops import deform_attn_triton

    shapes = ((2, 2), (4, 4))
    tokens = sum(h * w for h, w in shapes)
    places = (2, tokens, 8, len(shapes), 4)
    tensors = (torch.randn(2, tokens, 8, 32), torch.rand(*places, 2), torch.rand(places))
    value, locations, weights = (t.requires_grad_() for t in tensors)
    gradient = torch.ones(2, tokens, 256)

    def function() -> tuple[Tensor, ...]:
        out = ms_deform_attn(value, shapes, locations, weights, form="triton")
        return torch.autograd.grad(out, tensors, gradient)

    def operator() -> tuple[Tensor, ...]:
        out = deform_attn._fused(value, sum(shapes, ()), locations, weights, "triton")
        return torch.autograd.grad(out, tensors, gradient)

    with mock.patch.object(deform_attn_triton, "launch", lambda *arguments, **options: None):
        forms = {"function": function, "operator": operator}
        facts = {"tokens": tokens, "batch": 2}
        return [measure.compare("host time of deformable attention", forms, args.rounds, check={}, **facts)]


PARTS: dict[str, Callable[[argparse.Namespace, Sizes], list[measure.Row]]] = {
    "inference": inference,
    "step": step,
    "operation": operation,
    "host": host,
}
