"""CPSL's operations at the paper's sizes against their looped or literal forms, and its source samples.

The method's own work is `uda.cpsl.CPSL` with networks whose outputs are given, on target images with random geometry:
rectification, warp, bank, Sinkhorn, losses and their backward, with a full bank.
"""

import argparse
import tempfile
from collections.abc import Callable, Mapping
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.config import SourceConfig, load_config
from common.data import SegmentationDataset, build_transform, toy
from common.data.recipes.cpsl import CPSLViews
from common.data.statistics import placeholder
from common.engine import MethodContext
from common.ops.resize_chain import resample_labels
from common.ops.ring import RingBank
from common.ops.sinkhorn import sinkhorn
from scripts.bench import cpsl_literal as literal
from scripts.bench import measure
from scripts.bench.families import ROOT, full_banks
from scripts.bench.workspace import REAL_SIZE
from uda.base import onto_crop, onto_grid
from uda.cpsl import CPSL
from uda.pseudo_labels import class_sums

CONFIG = ROOT / "uda" / "configs" / "gta5_to_cityscapes" / "stage1.yaml"
BAR, OWN_BAR, OWN_MEMORY, LAB_BAR = 8.0, 5.0, 0.4, 4.0


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--images", type=int, default=3, help="of the own work and the source samples (default 3)")
    parser.add_argument("--only", choices=("operations", "own", "lab"), help="one of the three parts")


def run(args: argparse.Namespace) -> list[measure.Row]:
    parts = {"operations": operations, "own": own_work, "lab": source_samples}
    chosen = [args.only] if args.only else list(parts)
    return [row for name in chosen for row in parts[name](args)]


class Sizes:
    """The paper's, or tiny ones."""

    def __init__(self, quick: bool):
        self.image, self.crop, self.bank = ((128, 256), (64, 96), 1024) if quick else ((1024, 2048), (512, 896), 65536)
        self.samples, self.classes, self.width = (32, 19, 256) if quick else (256, 19, 256)
        self.grid = tuple(side // 4 for side in self.crop)
        self.stride8 = tuple(side // 8 + 1 for side in self.image)
        self.crop8 = tuple(side // 8 + 1 for side in self.crop)

    def geometry(self, index: int = 0, of: int = 1) -> Tensor:
        """The drawn geometry (1, 7) of image `index` of `of`, whose widths are spread evenly over the recipe's."""
        ratio = 0.5 + (index + 0.5) / of
        recipe = CPSLViews(crop=self.crop, width=2200 * self.image[1] // 2048, ratio=(ratio, ratio))
        return recipe.draw(self.image, np.random.default_rng((3, index))).array()[None]


# Operations -------------------------------------------------------------------------------------------------------


@torch.no_grad()
def operations(args: argparse.Namespace) -> list[measure.Row]:
    sizes, rounds = Sizes(args.quick), args.rounds
    torch.manual_seed(0)
    return [
        bank_update(sizes, rounds),
        prototype_pass(sizes, rounds),
        feature_similarity(sizes, rounds),
        soft_labels(sizes, rounds),
        teacher_similarity(sizes, rounds),
        assignment(sizes, rounds),
    ]


def bank_update(s: Sizes, rounds: int) -> measure.Row:
    """The features and scores of four images enter two full banks."""
    rows = [F.normalize(torch.randn(4, s.samples, width), dim=2) for width in (s.width, s.classes)]
    rings = [RingBank(s.bank, width) for width in (s.width, s.classes)]
    for ring in rings:
        ring.push(F.normalize(torch.randn_like(ring.rows), dim=1))
    queues = [ring.rows.flip(0) for ring in rings]  # newest first

    def ours() -> None:
        for images, ring in zip(rows, rings, strict=True):
            for image in images:
                ring.push(image)

    def shifted() -> None:
        for i, images in enumerate(rows):
            for image in images:
                queues[i] = literal.shift(queues[i], image)

    ours(), shifted()
    apart = sum(_rows_apart(ring.rows, queue) for ring, queue in zip(rings, queues, strict=True))
    check = {"rows of one alone": measure.require("banks", apart, 0)}
    forms = {"ours": ours, "shifted": shifted}
    return measure.compare("bank update", forms, rounds, check=check, bar=BAR, memory=True, bank=s.bank)


def _rows_apart(ours: Tensor, theirs: Tensor) -> int:
    """Rows that only one of the two holds, whatever their order."""
    first, second = (set(rows.numpy().view(f"V{4 * rows.shape[1]}").ravel().tolist()) for rows in (ours, theirs))
    return len(first ^ second)


def prototype_pass(s: Sizes, rounds: int) -> measure.Row:
    """Class means of an image's features."""
    coarse = torch.randn(1, s.classes, 5, 9)
    logits = F.interpolate(coarse, s.stride8, mode="bilinear")[0] + 0.05 * torch.randn(s.classes, *s.stride8)
    features = torch.randn(s.width, *s.stride8)

    def ours() -> Tensor:
        sums, counts = class_sums(logits, features)
        return sums / counts.clamp(min=1)[:, None]

    looped, found = literal.class_means(logits, features), ours()
    apart = measure.relative(found[list(looped)], torch.stack(list(looped.values())))
    check = {"relative difference": measure.require("class means", apart, 1e-4)}
    forms = {
        "ours": ours,
        "looped": lambda: literal.class_means(logits, features),
        "looped, indexed": lambda: literal.class_means_indexed(logits, features),
    }
    return measure.compare("prototype pass", forms, rounds, check=check, bar=BAR, memory=True, grid=list(s.stride8))


def feature_similarity(s: Sizes, rounds: int) -> measure.Row:
    """The student's features with every prototype, on the crop's quarter grid."""
    method = small_method(s)
    features = torch.randn(1, s.width, *s.crop8)
    forms = {
        "ours": lambda: method.similarity(features, onto_grid(features, s.grid)),
        "looped": lambda: literal.similarity(literal.bilinear(features, s.grid), method.prototypes_ema),
    }
    apart = measure.relative(forms["ours"](), forms["looped"]())
    check = {"relative difference": measure.require("similarity", apart, 1e-5)}
    return measure.compare("similarity", forms, rounds, check=check, bar=BAR, memory=True, grid=list(s.grid))


def soft_labels(s: Sizes, rounds: int) -> measure.Row:
    """Soft labels of the whole image at stride 8, brought to the quarter grid of a crop."""
    soft, geometry = torch.rand(1, s.classes, *s.stride8), s.geometry()
    forms = {
        "ours": lambda: resample_labels(soft, geometry, s.crop),
        "literal": lambda: literal.soft_on_grid(soft, geometry, s.crop),
    }
    apart = measure.relative(forms["ours"](), forms["literal"]())
    check = {"relative difference": measure.require("soft labels", apart, 1e-4)}
    return measure.compare(
        "soft labels on the crop", forms, rounds, check=check, memory=True, geometry=geometry[0].tolist()
    )


def teacher_similarity(s: Sizes, rounds: int) -> measure.Row:
    """Features of the whole image at stride 8 with every prototype, on the quarter grid of a crop."""
    method, features, geometry = small_method(s), torch.randn(1, s.width, *s.stride8), s.geometry()
    target = {"geometry": geometry, "weak": torch.empty(1, 3, *s.crop), "full": torch.empty(1, 3, *s.image)}
    forms = {
        "ours": lambda: method.similarity(features, onto_crop(features, target)),
        "literal": lambda: literal.cosines(literal.features_on_grid(features, geometry, s.crop), method.prototypes_ema),
    }
    apart = measure.relative(forms["ours"](), forms["literal"]())
    check = {"relative difference": measure.require("teacher's similarity", apart, 1e-4)}
    return measure.compare(
        "similarity on the crop", forms, rounds, check=check, memory=True, geometry=geometry[0].tolist()
    )


def assignment(s: Sizes, rounds: int) -> measure.Row:
    """Sinkhorn over a full bank and one image's samples."""
    scores = torch.rand(s.bank + s.samples, s.classes) * 2 - 1
    share = torch.rand(s.classes).add_(0.05)
    share /= share.sum()
    forms = {
        "ours": lambda: sinkhorn(scores, share, 0.05, 3, keep=s.samples),
        "linear domain": lambda: literal.sinkhorn(scores, share, 0.05, 3, s.samples),
    }
    apart = float((forms["ours"]() - forms["linear domain"]()).abs().max())
    check = {"largest difference": measure.require("Sinkhorn", apart, 1e-4)}
    return measure.compare("Sinkhorn", forms, rounds, check=check, memory=True, rows=len(scores))


# The method's own work --------------------------------------------------------------------------------------------


class Outputs(nn.Module):
    """A network whose outputs are given, in the order of its calls."""

    def __init__(self):
        super().__init__()
        self.waiting: list[Mapping[str, Tensor]] = []

    def forward(self, images: Tensor) -> Mapping[str, Tensor]:
        return self.waiting.pop(0)


def small_method(s: Sizes) -> CPSL:
    """Stage 1 with the paper's options but for sampling (uniform) and CutMix (off), a full bank, and no network."""
    with tempfile.TemporaryDirectory() as folder:
        prototypes, shares = Path(folder) / "prototypes.pt", Path(folder) / "shares.npy"
        torch.save(torch.randn(s.classes, s.width), prototypes)
        share = torch.rand(s.classes, dtype=torch.float64) + 0.05
        np.save(shares, (share / share.sum()).numpy())
        words = [f"method.prototypes={prototypes}", f"method.class_distribution={shares}", "model.checkpoint="]
        words += [f"method.bank={s.bank}", f"method.samples={s.samples}"]
        words += ["method.sampling=uniform", "method.cutmix=0.0"]
        words += ["model.options={blocks: [1, 1, 1, 1], width: 8, head_channels: 16}"]
        cfg = load_config(CONFIG, words)
        method = CPSL(cfg, MethodContext(placeholder(cfg.model.num_classes)))
    method.model, method.teacher = Outputs(), Outputs()
    full_banks(method)
    return method


class Case:
    """One target image: its batch, and what the networks say about it."""

    def __init__(self, s: Sizes, index: int, of: int):
        generator = torch.Generator().manual_seed(index)

        def maps(channels: int, size: tuple[int, int], gain: float = 1.0) -> Tensor:
            coarse = torch.randn(1, channels, 6, 10, generator=generator)
            noise = torch.randn(1, channels, *size, generator=generator)
            return gain * (2 * F.interpolate(coarse, size, mode="bilinear") + 0.5 * noise)

        shift = 4 * (index + 3)
        mirror = torch.tensor([[-1.0, 0, s.crop[1]], [0, 1, 0], [0, 0, 1]])
        translation = torch.tensor([[1.0, 0, shift], [0, 1, 0], [0, 0, 1]])
        side = min(s.crop) // 3
        blank, full = (torch.zeros(1, 3, *size, dtype=torch.uint8) for size in (s.crop, s.image))
        self.target = {
            "weak": blank, "strong": blank, "full": full, "geometry": s.geometry(index, of),
            "soft": maps(s.classes, s.stride8, 2.0).softmax(1).half(),
            "warp": (mirror @ translation)[None], "shift": shift,
            "cutout": torch.tensor([[8, 12, 8 + side, 12 + side]], dtype=torch.int32),
        }  # fmt: skip
        self.teacher = {"features": maps(s.width, s.stride8), "logits": maps(s.classes, s.stride8, 2.0)}
        self.weak, self.strong = (
            {"features": maps(s.width, s.crop8).requires_grad_(), "logits": maps(s.classes, s.crop8).requires_grad_()}
            for _ in range(2)
        )

    def clear(self) -> None:
        for out in (self.weak, self.strong):
            for leaf in out.values():
                leaf.grad = None

    def gradients(self) -> dict[str, Tensor]:
        return {"weak logits": self.weak["logits"].grad, "strong features": self.strong["features"].grad}


def ours(method: CPSL, case: Case) -> dict[str, Tensor]:
    """The target part of a step of `CPSL.forward`, back-propagated as the engine does it."""
    method.teacher.waiting, method.model.waiting = [case.teacher], [case.weak, case.strong]
    similarity, label, _, sampled = method.label_target(case.target)
    terms = method.weak_terms({}, case.target, label, sampled, 0.0)
    terms["loss"].backward()
    strong = method.strong_terms(case.target, similarity)
    strong["loss"].backward()
    return {**{key: value.detach() for key, value in (terms | strong).items()}, "label": label}


def own_work(args: argparse.Namespace) -> list[measure.Row]:
    sizes = Sizes(args.quick)
    torch.manual_seed(0)
    method = small_method(sizes)
    theirs, cases = literal.OwnWork(method), [Case(sizes, i, args.images) for i in range(args.images)]
    check = compare_own(method, theirs, cases)

    def turn(form: Callable[[Case], Any]) -> Callable[[], None]:
        def call() -> None:
            for case in cases:
                case.clear()
                method.prototypes.grad = None
                form(case)

        return call

    forms = {
        "ours": turn(lambda case: ours(method, case)),
        "literal": turn(lambda case: theirs(case.target, case.teacher, case.weak, case.strong)),
    }
    bars = {"bar": OWN_BAR, "memory": True, "memory_bar": OWN_MEMORY, "items": len(cases)}
    facts = {"image": list(sizes.image), "crop": list(sizes.crop), "bank": sizes.bank, "images": len(cases)}
    return [measure.compare("own work beside the networks", forms, args.rounds, check=check, **bars, **facts)]


def compare_own(method: CPSL, theirs: literal.OwnWork, cases: list[Case]) -> dict[str, float]:
    """Labels, losses and gradients of both forms: the largest relative differences."""
    worst: dict[str, float] = {}

    def note(name: str, value: float, limit: float) -> None:
        worst[name] = max(worst.get(name, 0.0), measure.require(name, value, limit))

    for seed, case in enumerate(cases):
        found = []
        for form in (ours, lambda _, case: theirs(case.target, case.teacher, case.weak, case.strong)):
            case.clear()
            method.prototypes.grad = None
            torch.manual_seed(seed)
            terms = form(method, case)
            found.append((terms, {**case.gradients(), "prototypes": method.prototypes.grad}))
        (terms, gradients), (other, expected) = found
        note("share of labels apart", float((terms["label"] != other["label"]).float().mean()), 1e-4)
        for key in ("target_sce", "self_label_a", "self_label_b", "consistency"):
            note(key, measure.relative(terms[key], other[key]), 1e-4)
        for key, value in gradients.items():
            note(f"gradient of {key}", measure.relative(value, expected[key]), 1e-3)
    return worst


# Source samples ---------------------------------------------------------------------------------------------------


def source_samples(args: argparse.Namespace) -> list[measure.Row]:
    """Loading a GTA5 sample with the colours of a Cityscapes image, in one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return _source_samples(args)
    finally:
        torch.set_num_threads(threads)


def _source_samples(args: argparse.Namespace) -> list[measure.Row]:
    sizes = {"gta5": (96, 160), "cityscapes": (64, 128)} if args.quick else REAL_SIZE
    with tempfile.TemporaryDirectory(prefix="cpsl_") as folder:
        roots = {
            name: str(toy.make(name, Path(folder) / name, train=2, size=sizes[name])) for name in ("gta5", "cityscapes")
        }
        recipe = {"recipe": "cpsl", "colour_from": {"dataset": "cityscapes", "root": roots["cityscapes"]}}
        recipe |= {"crop": [48, 80], "base": [64, 128], "width": 160} if args.quick else {"base": [1024, 2048]}
        source = SourceConfig(dataset="gta5", root=roots["gta5"])
        data = SegmentationDataset(source, build_transform(recipe))
        cold = SegmentationDataset(source, build_transform(recipe))

        def uncached(index: int, rng: np.random.Generator) -> Any:
            cold.transform._colours.fill_(torch.nan)
            return cold.sample(index, rng)

        forms = {
            "ours": turn(data.sample, len(data), args.images),
            "literal": turn(lambda i, rng: literal.source_sample(data, i, rng), len(data), args.images),
            "ours, target not seen before": turn(uncached, len(data), args.images),
        }
        check = compare_samples(data, args.images)
        facts = {"items": args.images, "size": list(sizes["gta5"]), "base": recipe["base"]}
        bars = {"bar": LAB_BAR, "memory": True}
        return [measure.compare("source sample with LAB transfer", forms, args.rounds, check=check, **bars, **facts)]


def turn(form: Callable[[int, np.random.Generator], Any], files: int, samples: int) -> Callable[[], None]:
    def call() -> None:
        for draw, index in zip(range(samples), cycle(range(files)), strict=False):
            form(index, np.random.default_rng((5, draw)))

    return call


def compare_samples(data: SegmentationDataset, samples: int) -> dict[str, float]:
    """Images differ by roundings alone, labels not at all."""
    largest, mean, labels = 0.0, 0.0, 0
    for draw, index in zip(range(samples), cycle(range(len(data))), strict=False):
        sample = data.sample(index, np.random.default_rng((5, draw)))
        other = literal.source_sample(data, index, np.random.default_rng((5, draw)))
        apart = np.abs(sample["image"].numpy().astype(int) - other["image"])
        largest, mean = max(largest, float(apart.max())), max(mean, float(apart.mean()))
        labels += int((sample["label"].numpy() != other["label"]).sum())
    return {
        "levels apart": measure.require("images", largest, 3),
        "mean levels apart": measure.require("images on average", mean, 0.1),
        "labels apart": measure.require("labels", labels, 0),
    }
