"""A training step of every system on this machine's GPU: is it bound by the chip, by Python, or by the loader?

One row a system: milliseconds of a step, `busy_ms` of them in which kernels ran (the sum of their times), kernels,
waits of the host for the GPU, the five most expensive operators, peak memory, and the images a second that one loader
process makes beside those that the steps need. The batch lies on the GPU. `--device cpu` counts operators in the place
of kernels; with `--quick` networks have all their layers, but narrow ones on tiny images.
"""

import argparse
import gc
import math
import statistics
import time
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from scripts.bench import measure, operators
from scripts.bench.systems import SYSTEMS, Resident, resident

WARM = 2  # steps before the first that is measured: optimisers have their state, algorithms are chosen
TOP = 5
COPIES = ("Memcpy", "Memset")


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--systems", nargs="+", metavar="NAME", default=list(SYSTEMS), help=", ".join(SYSTEMS))
    parser.add_argument("--device", default="cuda", help="cuda, cuda:N, or cpu to count operators (default cuda)")


def run(args: argparse.Namespace) -> list[measure.Row]:
    for name in args.systems:
        if name not in SYSTEMS:
            raise ValueError(f"--systems {name}: unknown; known: {', '.join(SYSTEMS)}")

    device = torch.device(args.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError("gpu: torch finds no GPU here; --device cpu counts operators in place of kernels")

    return [row_of(name, device, args) for name in args.systems]


def row_of(name: str, device: torch.device, args: argparse.Namespace) -> measure.Row:
    """One system; where the GPU's memory is too small for it, the row says so."""
    try:
        system = resident(SYSTEMS[name], device, args.quick)
        row = measured(system, device, args.rounds)
    except torch.OutOfMemoryError as error:
        row = {"ms": {}, "error": str(error).splitlines()[0]}

    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()

    return {"name": name, **row, "device": str(device)}


def measured(system: Resident, device: torch.device, rounds: int) -> measure.Row:
    for number in range(WARM):
        system.step(number)

    seconds = statistics.median(timed(system.step, WARM + turn) for turn in range(rounds))
    after = WARM + rounds
    found = on_gpu(system, after) if device.type == "cuda" else on_cpu(system, after)
    gc.collect()
    peak = measure.peak_memory(lambda: system.step(after + 2), device)
    cfg = system.trainer.cfg
    needed = system.images / seconds

    return {
        "ms": {"step": 1000 * seconds},
        **found,
        "peak_mib": measure.mebibytes(peak),
        "loader": {
            "images_per_second": system.loaded,
            "needed": needed,
            "processes": math.ceil(needed / system.loaded),
        },
        "images": system.images,
        "precision": cfg.train.precision,
        "parameters": sum(p.numel() for p in system.trainer.parameters),
    }


def timed(step: Callable[[int], None], number: int) -> float:
    """Seconds until the device has done the step."""
    measure.synchronise()
    start = time.perf_counter()
    step(number)
    measure.synchronise()

    return time.perf_counter() - start


def on_cpu(system: Resident, number: int) -> dict[str, Any]:
    """Operators of a step: by part, those that start nothing, and the most frequent ones."""
    counted = operators.count(system.trainer, system.streams, number)
    parts = {part: counted.of_part(part) for part in operators.PARTS}

    return {
        "operators": sum(parts.values()),
        "parts": parts,
        "idle": counted.idle,
        "top": counted.most(TOP),
    }


def on_gpu(system: Resident, number: int) -> dict[str, Any]:
    """Kernels of a step and their time, the operators that take most of it, and the waits of another step."""
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        system.step(number)
        measure.synchronise()

    top = sorted(profiler.key_averages(), key=lambda each: -each.self_device_time_total)[:TOP]
    return {
        **kernels(profiler.events() or ()),
        "syncs": syncs(system.step, number + 1),
        "top": {each.key: {"ms": each.self_device_time_total / 1000, "calls": each.count} for each in top},
    }


def kernels(events: Iterable[Any]) -> dict[str, Any]:
    """Number of kernels, and milliseconds of them and of copies, among a profiler's events."""
    ran = [
        event
        for event in events
        if event.device_type == DeviceType.CUDA and not getattr(event, "is_user_annotation", False)
    ]
    copies = [event for event in ran if event.name.startswith(COPIES)]

    return {
        "kernels": len(ran) - len(copies),
        "copies": len(copies),
        "busy_ms": sum(event.time_range.elapsed_us() for event in ran) / 1000,
    }


def syncs(step: Callable[[int], None], number: int) -> int:
    """How often the host waits for the GPU in a step."""
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            step(number)
    finally:
        torch.cuda.set_sync_debug_mode(before)

    return sum("synchronizing CUDA operation" in str(warning.message) for warning in caught)
