"""Balanced k-means against the package k-means-constrained: seconds and objective from the same initial centres.

Every round is another seed of the data and of the centres. Both stop after --iterations of Lloyd's alternation, or when
nothing changes any more (tolerance 0); the exact sizes are checked first. --large also clusters 1,000,000 × 256
features in half precision into 121, alone: seconds and the process's peak memory.
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np

from common.ops.balanced_kmeans import balanced_kmeans
from scripts.bench import measure

BAR, OBJECTIVE_BAR = 8.0, 1.01
LARGE, LARGE_K = (1_000_000, 256), 121
LARGE_SECONDS, LARGE_GIB = 360, 4.0
COMPONENTS, BLOCK = 30, 50_000  # of the mixture; points written at a time


class Turn(NamedTuple):
    """One clustering: seconds, processor seconds (other processes change these less), objective, iterations."""

    seconds: float
    cpu: float
    objective: float
    iterations: int


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--points", type=int, default=20_000)
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--k", type=int, default=20)
    parser.add_argument("--iterations", type=int, default=20)
    parser.add_argument("--large", action="store_true", help="also 1,000,000 × 256 into 121; minutes and 4 GB")
    parser.add_argument("--large-only", action="store_true", help="only that")


def run(args: argparse.Namespace) -> list[measure.Row]:
    if args.quick:
        args.points, args.dim, args.k, args.iterations = 400, 8, 5, 3
    rows = [] if args.large_only else [compare(kind, args) for kind in ("mixture", "normal")]
    return rows + ([large(args.quick)] if args.large or args.large_only else [])


def sampler(kind: str, d: int, draw: np.random.Generator) -> Callable[[int], np.ndarray]:
    """Draws n points float32 (n, d): normal ones, or of a mixture of very different weights after a ReLU, which is
    nearer to what a decoder's features are."""
    if kind == "normal":
        return lambda n: draw.standard_normal((n, d), dtype=np.float32)
    weights, spread = draw.dirichlet(np.full(COMPONENTS, 0.3)), draw.gamma(2, 0.3, (COMPONENTS, 1))
    centre = 2 * draw.standard_normal((COMPONENTS, d))

    def mixture(n: int) -> np.ndarray:
        component = draw.choice(COMPONENTS, n, p=weights)
        x = centre[component] + spread[component] * draw.standard_normal((n, d))
        return np.maximum(x + 0.5 * draw.standard_normal((n, 1)), 0).astype(np.float32)

    return mixture


def constrained() -> Callable[..., Any]:
    """The package's class. ValueError where it is not installed."""
    try:
        from k_means_constrained import KMeansConstrained
    except ImportError as error:
        raise ValueError(f"this benchmark needs `pip install k-means-constrained` ({error})") from error
    return KMeansConstrained


def objective(x: np.ndarray, labels: np.ndarray, k: int) -> float:
    """Σ ‖x_i − mean of its cluster‖², in float64."""
    clusters = (x[labels == j].astype(np.float64) for j in range(k))
    return float(sum(np.square(c - c.mean(0)).sum() for c in clusters))


def compare(kind: str, args: argparse.Namespace) -> measure.Row:
    n, k, library = args.points, args.k, constrained()
    limits = {"size_min": n // k, "size_max": -(-n // k), "n_init": 1, "max_iter": args.iterations, "tol": 0.0}

    def ours(x: np.ndarray, centres: np.ndarray) -> tuple[np.ndarray, int]:
        found = balanced_kmeans(x, k, centres=centres, max_iter=args.iterations, tol=0.0)
        return found.labels.numpy(), found.iterations

    def theirs(x: np.ndarray, centres: np.ndarray) -> tuple[np.ndarray, int]:
        found = library(k, init=centres.astype(np.float64), **limits).fit(x)
        return found.labels_, found.n_iter_

    forms = {"ours": ours, "k-means-constrained": theirs}
    results: dict[str, list[Turn]] = {name: [] for name in forms}
    for seed in range(args.rounds + 1):  # the first one warms up
        draw = np.random.default_rng(seed)
        x = sampler(kind, args.dim, draw)(n)
        centres = x[draw.choice(n, k, replace=False)]
        for name in list(forms)[:: -1 if seed % 2 else 1]:
            start = time.perf_counter(), time.process_time()
            labels, iterations = forms[name](x, centres)
            seconds, cpu = time.perf_counter() - start[0], time.process_time() - start[1]
            measure.require(f"{name}: sizes beyond n / k rounded down and up", beyond(labels, k), 0)
            results[name].append(Turn(seconds, cpu, objective(x, labels, k), iterations))
    return summary(f"{kind}, {n} x {args.dim} into {k}", {name: values[1:] for name, values in results.items()})


def summary(name: str, results: dict[str, list[Turn]]) -> measure.Row:
    """Medians over the seeds; ratios are made seed by seed."""
    ours, theirs = results.values()
    faster = median(b.seconds / a.seconds for a, b in zip(ours, theirs, strict=True))
    ratios = [a.objective / b.objective for a, b in zip(ours, theirs, strict=True)]
    return {
        "name": name,
        "ms": {form: 1000 * median(turn.seconds for turn in turns) for form, turns in results.items()},
        "cpu_ms": {form: 1000 * median(turn.cpu for turn in turns) for form, turns in results.items()},
        "faster": {list(results)[1]: faster},
        "bar": BAR,
        "met": faster >= BAR,
        "objective_ratio": median(ratios),
        "objective_ratios": ratios,
        "objective_bar": OBJECTIVE_BAR,
        "objective_met": median(ratios) <= OBJECTIVE_BAR,
        "iterations": {form: [turn.iterations for turn in turns] for form, turns in results.items()},
        "check": {"sizes beyond n / k rounded down and up": 0},
    }


def beyond(labels: np.ndarray, k: int) -> float:
    """By how many points the worst cluster is smaller than ⌊n/k⌋ or larger than ⌈n/k⌉."""
    sizes = np.bincount(labels, minlength=k)
    return float(max(len(labels) // k - sizes.min(), sizes.max() - -(-len(labels) // k), 0))


def large(quick: bool) -> measure.Row:
    """The full size of VOC 1/32: features from a memory map, default settings. Peak memory is the whole process's."""
    (n, d), k = ((4000, 16), 11) if quick else (LARGE, LARGE_K)
    with tempfile.TemporaryDirectory(prefix="kmeans_") as folder:
        path, points = Path(folder) / "features.npy", sampler("mixture", d, np.random.default_rng(0))
        data = np.lib.format.open_memmap(path, mode="w+", dtype=np.float16, shape=(n, d))
        for start in range(0, n, BLOCK):
            data[start : start + BLOCK] = points(min(BLOCK, n - start))
        del data  # what was written is no longer mapped
        data = np.load(path, mmap_mode="r")
        measure.rest()
        start = time.perf_counter()
        found = balanced_kmeans(data, k)
        seconds = time.perf_counter() - start
        peak = measure.gibibytes(measure.resident("VmHWM"))
    outside = measure.require("sizes", beyond(found.labels.numpy(), k), 0)
    return {
        "name": f"{n} x {d} float16 into {k}",
        "ms": {"ours": 1000 * seconds},
        "iterations": found.iterations,
        "converged": found.converged,
        "peak_gib": peak,
        "bar_seconds": LARGE_SECONDS,
        "met": seconds <= LARGE_SECONDS,
        "memory_bar_gib": LARGE_GIB,
        "memory_met": peak is not None and peak <= LARGE_GIB,
        "check": {"sizes beyond n / k rounded down and up": outside},
    }
