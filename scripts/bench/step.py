"""A training step of a config, taken apart: data, forward, backward, and the optimiser with all the rest.

    step CONFIG [--against blv|joint|bf16|channels_last|recommended|'NAME: key=value …'] … [key=value …]

The config and each form to compare it with take turns in one process, on toy scenes in the real layout and size and on
random weights, one micro-batch of --batch images per stream. `blv` puts BLV on the decode head; `joint` builds all
parts of a step before one backward, in place of one backward per part; `recommended` is bf16 with channels_last.
Supervised configs are compared with `blv` by default, and their losses also alone.
"""

import argparse
import gc
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

from common.config import Config, load_config
from common.engine.method import Batch, Losses, Method
from common.engine.trainer import Trainer
from common.losses.blv import variation_weights
from common.losses.build import LossContext, build_loss
from common.losses.counts import Counts
from common.losses.cross_entropy import pixel_cross_entropy
from common.losses.pixel_loss import PixelLoss
from scripts.bench import measure, workspace
from scripts.bench.families import family_of, least_batch
from scripts.bench.full_size import parse_size

PARTS = ("data", "forward", "backward", "optimiser")
FORMS: dict[str, tuple[str, ...]] = {
    "blv": ("remedies.logits={name: blv, preset: paper}",),
    "joint": (),
    "bf16": ("train.precision=bf16",),
    "channels_last": ("train.channels_last=true",),
    "recommended": ("train.precision=bf16", "train.channels_last=true"),
}
BLV_BAR = 1.03  # of a step's time over cross-entropy


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config")
    parser.add_argument("overrides", nargs="*", default=[], help="section.key=value, for all forms")
    known = f"{', '.join(FORMS)}, or 'NAME: key=value …'"
    parser.add_argument("--against", action="append", metavar="FORM", help=known)
    parser.add_argument("--batch", type=int, help="images per stream (default: 1, or 2 where batch norm needs it)")
    parser.add_argument("--size", help="HEIGHTxWIDTH of the images, in place of the real one")
    parser.add_argument("--loss-only", action="store_true", help="only the loss alone")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N")


def run(args: argparse.Namespace) -> list[measure.Row]:
    path, here = Path(args.config).resolve(), Path.cwd()
    plain = load_config(path, args.overrides)
    supervised = "heads" in plain.method
    chosen = choose(args.against, plain, supervised)
    batch = args.batch or least_batch(plain)
    rows = [loss_alone(plain, batch, args)] if supervised else []
    if args.loss_only:
        return rows
    with tempfile.TemporaryDirectory(prefix="step_") as folder:
        os.chdir(folder)
        try:
            forms = {
                name: build(path, [*args.overrides, *words], name == "joint", batch, args)
                for name, words in chosen.items()
            }
            return [whole_step(f"{path.parent.name}/{path.stem}", forms, args), *rows]
        finally:
            os.chdir(here)


def choose(against: list[str] | None, cfg: Config, supervised: bool) -> dict[str, tuple[str, ...]]:
    """The forms by name, the config itself first. ValueError for an unknown one."""
    plain = supervised and not cfg.remedies
    if against is None:
        against = (["blv"] if plain else []) if supervised else ["joint", "recommended"]
    forms: dict[str, tuple[str, ...]] = {"ce" if plain else "as configured": ()}
    for text in against:
        name, sign, words = text.partition(":")
        if not sign and name not in FORMS:
            raise ValueError(f"--against {text!r}: neither 'NAME: key=value …' nor one of {', '.join(FORMS)}")
        forms[name] = tuple(words.split()) if sign else FORMS[name]
    return forms


# A step in parts ----------------------------------------------------------------------------------------------------


@dataclass
class Form:
    """A trainer whose steps are timed in parts."""

    trainer: Trainer
    streams: Mapping[str, Any]
    step: int = 0
    seconds: dict[str, list[float]] = field(default_factory=lambda: {part: [] for part in (*PARTS, "step")})
    scalars: dict[str, float] = field(default_factory=dict)

    def __call__(self) -> None:
        now: dict[str, float] = dict.fromkeys(PARTS, 0.0)
        trainer, streams = self.trainer, {name: timed_stream(s, now) for name, s in self.streams.items()}
        parts, backward = trainer.parts, trainer._backward
        trainer.parts, trainer._backward = timed(parts, "forward", now), timed(backward, "backward", now)
        try:
            start = clock()
            scalars = trainer.step(self.step, streams, [])
            total = clock() - start
        finally:
            trainer.parts, trainer._backward = parts, backward
        now["backward"] -= now["forward"]  # the engine's backward calls the method
        now["optimiser"] = total - sum(now.values())
        self.step += 1
        self.scalars = self.scalars or {name: float(value) for name, value in scalars.items()}
        for part, value in {**now, "step": total}.items():
            self.seconds[part].append(value)


def clock() -> float:
    measure.synchronise()
    return time.perf_counter()


def timed(call: Callable[..., Any], part: str, seconds: dict[str, float]) -> Callable[..., Any]:
    def run(*args: Any) -> Any:
        start = clock()
        result = call(*args)
        seconds[part] += clock() - start
        return result

    return run


def timed_stream(stream: Iterator[Batch], seconds: dict[str, float]) -> Iterator[Batch]:
    while True:
        start = clock()
        batch = next(stream)
        seconds["data"] += clock() - start
        yield batch


def build(path: Path, words: list[str], joint: bool, batch: int, args: argparse.Namespace) -> Form:
    """The trainer and streams of one form."""
    family, plain = family_of(path), load_config(path, words)
    cfg = load_config(path, [*workspace.overrides(plain, batch), *words, "output=runs"])
    trainer, experiment = workspace.trainer(cfg, family, parse_size(args.size), torch.device(args.device))
    if joint:
        join(trainer.method)
    return Form(trainer, experiment.open(0))


def join(method: Method) -> None:
    """Let the method give all parts of a step at once, their losses summed: one graph, one backward."""
    forward = method.forward

    def joined(streams: Mapping[str, Batch], step: int) -> Losses:
        merged: Losses = {}
        for part in list(forward(streams, step)):
            for name, value in part.items():
                merged[name] = merged[name] + value if name in merged else value
        return merged

    if method.backwards > 1:
        method.forward, method.backwards = joined, 1


def whole_step(name: str, forms: dict[str, Form], args: argparse.Namespace) -> measure.Row:
    """Milliseconds of a step and its parts, and peak memory above weights, gradients and optimiser state."""
    for form in forms.values():
        form()  # also the first images are read and the allocator warmed
    reference, *others = forms.values()
    check = {}
    for key, form in list(forms.items())[1:]:
        if key == "joint":
            for term in ("loss", "grad_norm"):
                ours, theirs = reference.scalars[term], form.scalars[term]
                check[term] = measure.require(f"{key}: {term}", abs(ours - theirs) / abs(theirs), 1e-4)
    first = {key: dict(form.scalars) for key, form in forms.items()}
    for form in forms.values():
        form.seconds = {part: [] for part in form.seconds}
    for round_ in range(args.rounds):
        for form in list(forms.values())[:: -1 if round_ % 2 else 1]:
            form()
    parts = {key: {part: 1000 * median(form.seconds[part]) for part in PARTS} for key, form in forms.items()}
    total = {key: 1000 * median(form.seconds["step"]) for key, form in forms.items()}
    ours, *rest = total
    peaks = {}
    for key, form in forms.items():
        workspace.settle(form.trainer)
        gc.collect()
        peaks[key] = measure.mebibytes(measure.peak_of_tensors(form, args.device))
        for parameter in form.trainer.parameters:
            parameter.grad = None
    row = {
        "name": f"step of {name}",
        "ms": total,
        "parts_ms": parts,
        "faster": {key: total[key] / total[ours] for key in rest},
        "peak_mib": peaks,
        "check": check,
        "first_step": first,
        "batch": {key: batch_of(form) for key, form in forms.items()},
        "device": args.device,
        **measure.tf32(args.device),
    }
    return row | bars(row, ours)


def batch_of(form: Form) -> int:
    return next(iter(form.trainer.cfg.data.streams.values())).batch_size


def bars(row: measure.Row, ours: str) -> dict[str, Any]:
    """What the forms of this row are held to."""
    times, peaks, found = row["ms"], row["peak_mib"], {}
    if "blv" in times and ours == "ce":
        found |= {"blv_over_ce": times["blv"] / times[ours], "bar": BLV_BAR}
        found["met"] = found["blv_over_ce"] <= BLV_BAR
    if "joint" in times:
        found |= {"memory_bar": 0.75, "memory_ratio": peaks[ours] / peaks["joint"] if peaks[ours] else None}
        found["memory_met"] = found["memory_ratio"] is not None and found["memory_ratio"] <= 0.75
        found["no_slower"] = times[ours] <= times["joint"]
    if "recommended" in times:
        found["recommended_faster"] = {"times": times[ours] / times["recommended"], "bar": 1.5}
        found["recommended_faster"]["met"] = found["recommended_faster"]["times"] >= 1.5
    return found


# The loss alone -----------------------------------------------------------------------------------------------------


def loss_alone(cfg: Config, batch: int, args: argparse.Namespace) -> measure.Row:
    """Forward and backward of the loss at the crop's resolution: cross-entropy, BLV, and BLV written plainly."""
    device, classes = torch.device(args.device), cfg.model.num_classes
    crop = (64, 128) if args.quick else tuple(next(iter(cfg.data.streams.values())).augment["crop"])
    logits = torch.randn(batch, classes, *crop, device=device, requires_grad=True)
    label = torch.randint(-1, classes, (batch, *crop), dtype=torch.int16, device=device)
    counts = torch.logspace(3, 9, classes, dtype=torch.float64)
    blv = _blv(counts).to(device)
    check = {"without weights, difference to cross-entropy": _same_without_weights(counts, logits, label)}
    check |= {"reads back to the host": _reads_back(counts)}

    def backward(loss: Callable[[], torch.Tensor]) -> Callable[[], None]:
        def call() -> None:
            logits.grad = None
            loss().backward()

        return call

    forms = {
        "blv": backward(lambda: blv(logits, label)),
        "ce": backward(lambda: pixel_cross_entropy(logits, label)),
        "blv, noise from the host": backward(lambda: literal_blv(logits, label, counts, blv.logits.sigma)),
    }
    against = "blv, noise from the host"
    facts = {"logits": list(logits.shape), "device": device}
    row = measure.compare("loss alone", forms, args.rounds, check=check, against=against, memory=True, **facts)
    return row | {"blv_adds_ms": row["ms"]["blv"] - row["ms"]["ce"]}


def _blv(counts: torch.Tensor) -> PixelLoss:
    return build_loss({"logits": {"name": "blv"}}, LossContext(Counts.from_pixels(counts)))


def literal_blv(logits: torch.Tensor, label: torch.Tensor, counts: torch.Tensor, sigma: float) -> torch.Tensor:
    """BLV as a first version of it is written: a distribution object samples on the host, the noise is copied over."""
    noise = torch.distributions.Normal(0.0, sigma).sample(logits.shape).clamp(0, 1).to(logits.device)
    weight = variation_weights(counts).to(logits.device).view(1, -1, 1, 1)
    return F.cross_entropy(logits + noise * weight, label.long(), ignore_index=-1)


def _same_without_weights(counts: torch.Tensor, logits: torch.Tensor, label: torch.Tensor) -> float:
    plain = _blv(counts).to(logits.device)
    plain.offsets.zero_()
    with torch.no_grad():
        difference = abs(float(plain(logits, label) - pixel_cross_entropy(logits, label)))
    return measure.require("BLV with all weights 0 against cross-entropy", difference, 0.0)


def _reads_back(counts: torch.Tensor) -> int:
    """0: under tensors without data, where any look at a value raises, the loss of a GPU's logits is made."""
    blv = _blv(counts)
    with FakeTensorMode(allow_non_fake_inputs=True):
        logits = torch.empty(2, len(counts), 8, 8, device="cuda")
        noise = blv.logits.draw(logits)
    return 0 if noise.device.type == "cuda" else 1
