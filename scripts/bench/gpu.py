"""A training step of every system on this machine's GPU: is it bound by the chip, by Python, or by the loader?

One row a system: milliseconds of a step, `busy_ms` of them in which kernels ran (the sum of their times), kernels,
waits of the host for the GPU, the five most expensive operators (of a recorded step: kernels), peak memory, and the
images a second that one loader process makes beside those that the steps need. The batch lies on the GPU.
`--device cpu` counts operators in the place of kernels; with `--quick` networks have all their layers, but narrow ones
on tiny images.

`--forms` has a row of each system as it is, compiled, and recorded as CUDA graphs (`train.compile`), side by side with
what the first steps took more than others, which is compilation; a form that a method refuses has a row that says why.
"""

import argparse
import gc
import math
import statistics
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from common.engine.runtime import RECORDED
from scripts.bench import measure, operators
from scripts.bench.systems import SYSTEMS, Resident, System, resident

EAGER = "eager"
FORMS = {EAGER: (), "compiled": ("train.compile=true",), RECORDED: (f"train.compile={RECORDED}",)}
WARM = 2  # steps before the first that is measured: optimisers have their state, algorithms are chosen
TOP = 5
COPIES = ("Memcpy", "Memset")


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--systems", nargs="+", metavar="NAME", default=list(SYSTEMS), help=", ".join(SYSTEMS))
    parser.add_argument("--device", default="cuda", help="cuda, cuda:N, or cpu to count operators (default cuda)")
    parser.add_argument(
        "--forms", nargs="+", choices=FORMS, default=[EAGER], help=f"{', '.join(FORMS)} (default {EAGER})"
    )


def run(args: argparse.Namespace) -> Iterator[measure.Row]:
    for name in args.systems:
        if name not in SYSTEMS:
            raise ValueError(f"--systems {name}: unknown; known: {', '.join(SYSTEMS)}")

    device = torch.device(args.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError("gpu: torch finds no GPU here; --device cpu counts operators in place of kernels")

    return (row_of(name, form, device, args) for name in args.systems for form in args.forms)


def row_of(name: str, form: str, device: torch.device, args: argparse.Namespace) -> measure.Row:
    """One system in one form; where the GPU's memory is too small for it, or it cannot be compiled, the row says so."""
    system = SYSTEMS[name]
    torch.compiler.reset()
    # a compiler may fail in any way; that costs its row, not those of others
    expected = torch.OutOfMemoryError if form == EAGER else Exception
    try:
        row = measured(of_form(system, form), device, args)
    except expected as error:
        row = {"ms": {}, "error": (str(error).splitlines() or [type(error).__name__])[0]}

    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()

    shown = name if form == EAGER else f"{name}, {form}"
    return {"name": shown, **row, "device": str(device)}


def of_form(system: System, form: str) -> System:
    return replace(system, words=(*system.words, *FORMS[form]))


def measured(made: System, device: torch.device, args: argparse.Namespace) -> measure.Row:
    system = resident(made, device, args.quick)
    rounds = args.rounds
    warming = sum(timed(system.step, number) for number in range(WARM))

    seconds = statistics.median(timed(system.step, WARM + turn) for turn in range(rounds))
    after = WARM + rounds
    found = found_on(device, system, after)
    gc.collect()
    cfg = system.trainer.cfg
    recorded = cfg.train.compile == RECORDED  # what a graph needs lies in its pool, where nothing counts it
    peak = None if recorded else measure.peak_memory(lambda: system.step(after + 2), device)
    needed = system.images / seconds

    return {
        "ms": {"step": 1000 * seconds},
        "warm_seconds": max(warming - WARM * seconds, 0.0),  # what the first steps took more: compilation, choices
        **found,
        "peak_mib": measure.mebibytes(peak),
        "loader": {
            "images_per_second": system.loaded,
            "needed": needed,
            "processes": math.ceil(needed / system.loaded),
        },
        "images": system.images,
        "precision": cfg.train.precision,
        **measure.tf32(device),
        "parameters": sum(p.numel() for p in system.trainer.parameters),
    }


def found_on(device: torch.device, system: Resident, number: int) -> dict[str, Any]:
    """What a profile says of a step. Of a compiled one on the CPU nothing: its operators are not dispatched."""
    if device.type == "cuda":
        return on_gpu(system, number)
    return {} if system.trainer.cfg.train.compile else on_cpu(system, number)


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

    recorded = system.trainer.cfg.train.compile == RECORDED
    return {
        **kernels(profiler.events() or ()),
        "syncs": syncs(system.step, number + 1),
        "top": longest(profiler.key_averages(), DeviceType.CUDA if recorded else DeviceType.CPU),
    }


def longest(averages: Iterable[Any], kind: DeviceType) -> dict[str, Any]:
    """What takes most of the GPU's time, among a profiler's averages.

    kind: CPU for operators, with the kernels that they start; CUDA for kernels, since what is replayed from a graph has
    no operators. A profile has both, and the ranges that a program names, so that all together count time repeatedly.
    """
    found = [
        each
        for each in averages
        if each.device_type == kind and not annotates(each) and each.self_device_time_total > 0
    ]
    found.sort(key=lambda each: -each.self_device_time_total)
    return {each.key: {"ms": each.self_device_time_total / 1000, "calls": each.count} for each in found[:TOP]}


def annotates(event: Any) -> bool:
    """Whether it is a range that a program names, such as a step of an optimiser."""
    return bool(getattr(event, "is_user_annotation", False))


def kernels(events: Iterable[Any]) -> dict[str, Any]:
    """Number of kernels, and milliseconds of them and of copies, among a profiler's events."""
    ran = [event for event in events if event.device_type == DeviceType.CUDA and not annotates(event)]
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
