"""Times and peak memory of alternative forms of the same work, measured side by side in one process."""

import ctypes
import gc
import math
import os
import re
import statistics
import time
from collections.abc import Callable, Mapping
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch.autograd.profiler import profile

Call = Callable[[], Any]
Row = dict[str, Any]
LEAST = 0.05  # seconds that a measurement lasts at least: shorter calls are repeated
ALLOCATION = "[memory]"  # a profiler's event: bytes that are allocated, or, below 0, freed


def median_seconds(forms: Mapping[str, Call], rounds: int, pause: float = 0.0) -> dict[str, float]:
    """Median seconds of one call of each form, after a warm-up. pause: seconds before each turn.

    In every round all forms take their turn, in an order that alternates, so that what else the machine does and how
    warm it is hit all alike.
    """
    repeats = {}
    for name, call in forms.items():
        call()
        time.sleep(pause)
        repeats[name] = max(1, math.ceil(LEAST / max(_timed(call, 1), 1e-9)))
    seconds: dict[str, list[float]] = {name: [] for name in forms}
    for round_ in range(rounds):
        for name in list(forms)[:: -1 if round_ % 2 else 1]:
            time.sleep(pause)
            seconds[name].append(_timed(forms[name], repeats[name]))
    return {name: statistics.median(values) for name, values in seconds.items()}


def _timed(call: Call, repeats: int) -> float:
    synchronise()
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    synchronise()
    return (time.perf_counter() - start) / repeats


def synchronise() -> None:
    """Wait for the GPU, where one is in use."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.synchronize()


def compare(
    name: str,
    forms: Mapping[str, Call],
    rounds: int,
    *,
    check: Mapping[str, float],
    bar: float | None = None,
    against: str | None = None,
    memory: bool = False,
    memory_bar: float | None = None,
    items: int = 1,
    device: torch.device | str = "cpu",
    pause: float = 0.0,
    **facts: Any,
) -> Row:
    """A row of results: milliseconds per item of each form, and how many times faster the first form is.

    The first form is ours. `check` says by how much the forms' numbers differ (see `require`). bar: how many times
    faster ours has to be than the form `against` (default: the second). memory: also the peak memory of a call, in
    MiB above what was held before, of which ours may need `memory_bar` times the other's. items: how many items a
    call works through. pause: seconds before each turn, for what a form still does after its own.
    """
    ours, *others = forms
    against = against or (others[0] if others else ours)
    seconds = median_seconds(forms, rounds, pause)
    row: Row = {"name": name, "ms": {form: 1000 * value / items for form, value in seconds.items()}}
    row["faster"] = {form: seconds[form] / seconds[ours] for form in others}
    if bar is not None:
        row |= {"bar": bar, "met": row["faster"][against] >= bar}
    if memory:
        gc.collect()
        row["peak_mib"] = {form: mebibytes(peak_memory(call, device)) for form, call in forms.items()}
        small, large = row["peak_mib"][ours], row["peak_mib"][against]
        row["memory_ratio"] = small / large if small is not None and large else None
    if memory_bar is not None and row["memory_ratio"] is not None:
        row |= {"memory_bar": memory_bar, "memory_met": row["memory_ratio"] <= memory_bar}
    return {**row, "check": dict(check), "device": str(device), **tf32(device), **facts}


def tf32(device: torch.device | str) -> Row:
    """Whether products of float32 keep TF32's digits alone, of a row that was measured on a GPU just now: configs
    switch it."""
    if torch.device(device).type != "cuda":
        return {}
    return {"tf32": torch.backends.cuda.matmul.allow_tf32}


def require(what: str, difference: float, limit: float) -> float:
    """The gate before a measurement: ValueError where two forms do not give the same numbers."""
    if not difference <= limit:
        raise ValueError(f"{what}: the forms differ by {difference:.3g}, {limit:.3g} is allowed; not measured")
    return float(difference)


def relative(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """‖ours − theirs‖ / ‖theirs‖."""
    ours, theirs = ours.detach().double(), theirs.detach().double()
    return float(torch.linalg.norm(ours - theirs) / torch.linalg.norm(theirs).clamp(min=1e-30))


# Memory -------------------------------------------------------------------------------------------------------------


def peak_memory(call: Call, device: torch.device | str = "cpu") -> int | None:
    """Bytes that `call` needs at its peak above what is held before it; None where the system does not say.

    Of the process on the CPU (the forms must have run once before), of the allocator on a GPU.
    """
    if torch.device(device).type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        synchronise()
        return torch.cuda.max_memory_allocated(device) - before
    before = rest()
    call()
    peak = resident("VmHWM")

    return None if before is None or peak is None else max(peak - before, 0)


def peak_of_tensors(call: Call, device: torch.device | str = "cpu") -> int:
    """Bytes of tensors that `call` allocates and holds at its peak, on the CPU as on a GPU.

    `peak_memory` of a process has more in it: holes of the heap, which glibc keeps, so that a form that frees one graph
    before it builds another seems to hold part of both.
    """
    if torch.device(device).type == "cuda":
        return peak_memory(call, device) or 0

    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # or it tells of every start and stop
    with profile(profile_memory=True) as profiler:
        call()

    events = [event for event in profiler.kineto_results.events() if event.name() == ALLOCATION]
    events.sort(key=lambda event: event.start_ns())
    return max(accumulate((event.nbytes() for event in events), initial=0))


def rest() -> int | None:
    """Bytes that the process holds once freed memory is given back; the peak is counted from here on."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (OSError, AttributeError):  # another C library
        pass
    try:
        Path("/proc/self/clear_refs").write_text("5")  # Linux: begin a new VmHWM
    except OSError:
        return None
    return resident("VmRSS")


def resident(kind: str) -> int | None:
    """VmRSS (now) or VmHWM (the peak) of this process in bytes. Unlike ru_maxrss, nothing of a parent's is in it."""
    try:
        found = re.search(rf"{kind}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    except OSError:
        return None
    return int(found[1]) * 1024 if found else None


def mebibytes(value: int | None) -> float | None:
    return None if value is None else round(value / 2**20, 1)


def gibibytes(value: int | None) -> float | None:
    return None if value is None else round(value / 2**30, 3)
