"""A range test of the learning rate (Smith, WACV 2017): python scripts/lr_find.py CONFIG [--low 1e-6] [--high 1].

Trains a supervised network for some steps, each at a higher rate than the last, until the loss has blown up. Drawn to
--out is the loss over the rate; printed are the rate at which it falls the fastest, a good `optim.lr` to begin with,
and the one at which it was lowest, which is too high. No run is left. Groups keep their ratio to `optim.lr`.
"""

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from common import cli, console, distributed
from common.config import Config, load_config
from common.engine import prepare, rehearse, runtime
from common.engine.trainer import NonFiniteLoss, Trainer
from common.experiment import Experiment
from common.files import refuse_to_overwrite, replacing
from common.report.charts import log_ticks, number, ticks
from fully_sup.supervised import build_method

MEMORY = 0.9  # of the running mean of the loss
BLOWN = 4.0  # times the lowest loss: nothing comes after that
ENDS = 5  # points at either end whose slope is not looked at


@dataclass(frozen=True)
class Test:
    """The rates that were taken, and the running mean of the loss at each."""

    rates: Sequence[float]
    losses: Sequence[float]

    @property
    def steepest(self) -> float:
        """Where the loss falls the fastest over the logarithm of the rate. ValueError for too few points."""
        if len(self.rates) <= 2 * ENDS:
            raise ValueError(f"--steps: the loss blew up after {len(self.rates)}; lower --low or raise --steps")

        slopes = np.gradient(np.asarray(self.losses), np.log(self.rates))
        inner = slopes[ENDS:-ENDS]
        return float(self.rates[ENDS + int(inner.argmin())])

    @property
    def lowest(self) -> float:
        return float(self.rates[int(np.argmin(self.losses))])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cli.add_config(parser)
    parser.add_argument("--low", type=float, default=1e-6, help="the first rate (default 1e-6)")
    parser.add_argument("--high", type=float, default=1.0, help="the last one (default 1)")
    parser.add_argument("--steps", type=int, default=100, help="how many (default 100)")
    parser.add_argument("--out", default="lr.svg", metavar="FILE", help="the drawing (default lr.svg)")
    cli.add_force(parser)
    args = cli.parse(parser)
    if not 0 < args.low < args.high:
        raise ValueError(f"--low {args.low:g} --high {args.high:g}: give two rates above 0, the second one higher")
    if args.steps <= 2 * ENDS:
        raise ValueError(f"--steps {args.steps}: give more than {2 * ENDS}")
    if Path(args.out).suffix != ".svg":
        raise ValueError(f"--out {args.out}: the name has to end in .svg")
    refuse_to_overwrite([args.out], args.force)

    cfg = load_config(args.config, args.overrides)
    found = range_test(cfg, rising(args.low, args.high, args.steps), args.device)
    steepest, lowest = found.steepest, found.lowest
    with replacing(Path(args.out)) as draft:
        draft.write_text(drawing(found), encoding="utf-8")
    print(f"falls the fastest at {steepest:.1e}: try optim.lr={steepest:.0e}")
    print(f"lowest at {lowest:.1e}, after {len(found.rates)} steps; drawn in {args.out}")


def rising(low: float, high: float, steps: int) -> list[float]:
    return [float(rate) for rate in np.geomspace(low, high, steps)]


def range_test(cfg: Config, rates: Sequence[float], device: str | None = None) -> Test:
    """Train one step at each rate, in order, until the loss has blown up."""
    constant = replace(cfg.optim, schedule="constant", milestones=(), warmup=0)
    cfg = replace(cfg, optim=constant, train=replace(cfg.train, steps=len(rates)))
    rehearse(cfg, build_method)
    experiment = Experiment(cfg, counted="labeled")
    target = distributed.start(device)
    runtime.configure(cfg.train, target)
    method = prepare(cfg, build_method, experiment.context, target)
    trainer = Trainer(cfg, method, target)
    streams = experiment.open(0)
    groups = [group for optimizer in trainer.optimizers.values() for group in optimizer.param_groups]
    ratios = [group["initial_lr"] / cfg.optim.lr for group in groups]

    taken: list[float] = []
    losses: list[float] = []
    mean = 0.0
    for step, rate in enumerate(console.bar(rates, what="steps")):
        for group, ratio in zip(groups, ratios, strict=True):
            group["initial_lr"] = rate * ratio
        try:
            loss = float(trainer.step(step, streams, [])["loss"])
        except NonFiniteLoss:
            break

        mean = MEMORY * mean + (1 - MEMORY) * loss
        smooth = mean / (1 - MEMORY ** (step + 1))
        taken.append(rate)
        losses.append(smooth)
        if smooth > BLOWN * min(losses):
            break

    distributed.stop()
    return Test(taken, losses)


def drawing(test: Test) -> str:
    """SVG: the loss over the rate, on a logarithmic axis, with the two rates that are named."""
    left, right, top, bottom = 64, 620, 20, 300
    low, high = math.log10(test.rates[0]), math.log10(test.rates[-1])
    floor, ceiling = min(test.losses), max(test.losses)

    def x(rate: float) -> float:
        return left + (right - left) * (math.log10(rate) - low) / (high - low)

    def y(loss: float) -> float:
        return bottom - (bottom - top) * (loss - floor) / max(ceiling - floor, 1e-12)

    places = " ".join(f"{x(rate):.1f},{y(loss):.1f}" for rate, loss in zip(test.rates, test.losses, strict=True))
    parts = [
        f'<text x="{x(tick):.1f}" y="{bottom + 20}" text-anchor="middle">{number(tick)}</text>'
        for tick in log_ticks(test.rates[0], test.rates[-1])
        if test.rates[0] <= tick <= test.rates[-1]
    ]
    parts += [
        f'<text x="{left - 8}" y="{y(tick) + 4:.1f}" text-anchor="end">{number(tick)}</text>'
        for tick in ticks(floor, ceiling)
    ]
    marks = ((test.steepest, "#0f8a66", "falls fastest"), (test.lowest, "#c85a08", "lowest"))
    for i, (rate, colour, word) in enumerate(marks):
        at = x(rate)
        label = f'x="{at - 5:.1f}" y="{top + 12 + 18 * i}" text-anchor="end" style="fill:{colour}"'
        parts.append(f'<line x1="{at:.1f}" x2="{at:.1f}" y1="{top}" y2="{bottom}" stroke="{colour}"/>')
        parts.append(f"<text {label}>{word}: {rate:.1e}</text>")

    return "\n".join(
        [
            '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 680 350" role="img">',
            "<title>Loss over the learning rate</title>",
            "<style>text{font:13px system-ui,sans-serif;fill:#1b2027}</style>",
            '<rect width="680" height="350" fill="#ffffff"/>',
            f'<polyline points="{places}" fill="none" stroke="#2470c8" stroke-width="2"/>',
            *parts,
            f'<text x="{(left + right) / 2}" y="{bottom + 42}" text-anchor="middle">learning rate</text>',
            "</svg>",
            "",
        ]
    )


if __name__ == "__main__":
    cli.run(main)
