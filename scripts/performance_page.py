"""Write docs/performance.md from the results in docs/results: python scripts/performance_page.py"""

import argparse
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import cli

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "docs" / "results"
PAGE = ROOT / "docs" / "performance.md"
MEASURED = (
    "step_blv", "usrn_step", "cpsl_step", "daformer_step", "unimatch_step", "unimatch_v2_step", "ltss",
    "attention_host", "cpsl", "loader", "loader_cached", "metrics", "kmeans",
)  # fmt: skip
HEAD = """# Performance

Made by `python scripts/performance_page.py` from `docs/results/*.json`; a test fails where it is not. Every figure was
measured, with the command that its file names. Rows that lose stay.
"""
OPERATORS = """## Operators of a training step

`python scripts/benchmark.py gpu --device cpu --quick` counts what one step (forward, losses, backward, clipping,
optimiser, moving average) dispatches below autograd. Networks are narrow and images tiny, but all layers are there, so
the number is that of full size, but for what is repeated for each image. daformer, hrda and mic (which is on HRDA) are
an exception, with eight blocks of MiT-B0 for the 52 of MiT-B5, and unimatch with a ResNet-50 for the 101. Views,
allocations and numbers read on the host, which start no kernel, are in a column of their own
([before](results/operators_before.json), [now](results/operators.json)). `tests/unit/test_launches.py` holds these
numbers.

"""
AFTER = """
Before, optimisers took one tensor after the other on the CPU, and lists of tensors, in a few operators, on CUDA alone.
So the last two columns leave the update out; they are what a GPU has less to start.
"""
GPU = """
## On a GPU

"""
UNMEASURED = """\
Since these changes no GPU was at hand: what fused optimisers, TF32, channels last by default and fewer operators give
there **was not measured**, nor was `train.compile=reduce-overhead` run. On a machine with one,
`python scripts/benchmark.py gpu --forms eager compiled reduce-overhead --out gpu.json` measures every system; as
`docs/results/gpu.json` its rows have a table here.
"""
MEASURED_ON = """\
`{command}` on {device}, torch {torch}, commit {commit}, the batch on the GPU, median of {rounds} steps
([values](results/gpu.json)); busy is the sum of kernel times, peak what a step needs above what is held before it
(– where a graph holds it), warm what the first steps took more than others, processes those of the loader that the
step needs:

| step | ms | busy ms | busy | kernels | syncs | peak, MiB | warm, s | processes |
|---|---|---|---|---|---|---|---|---|
"""
GPU_BEFORE = """
{measured} ([values](results/gpu_before.json)); busy is the sum of kernel times:

| step | ms | busy ms | busy | kernels |
|---|---|---|---|---|
"""
CPU = """
## Against the plain way, on a CPU

Milliseconds of each form, how many times faster the first is than the others (below 1: slower), and the peak of each in
MiB above what is held before (of `unimatch_v2_step` that of tensors, else of the process). With bf16 a step was faster
than in float32 on the AMD EPYC of `usrn_step` and `cpsl_step`, and slower on the Intel Xeon of the others.

| result | row | ms | faster | peak |
|---|---|---|---|---|
"""
FULL = """
## One real step at full size, on a CPU

`python scripts/benchmark.py --full-size NAME`: the official config with its classes, crops and streams on scenes of the
real size, one image a stream (two where a batch norm or the method needs them), float32, random weights. Seconds are
those of the step, beside other work; CPU seconds are what its threads worked, which other work hardly changes. Memory
is that of weights, gradients and optimiser (held), and the peak above ([values](results/full_size.json)). Configs that
are not here share network and crop with one that is, or were not run.

| config | images | crop | parameters, M | s | CPU s | held, GiB | peak above, GiB | threads, processor |
|---|---|---|---|---|---|---|---|---|
"""


def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()
    PAGE.write_text(page(), encoding="utf-8")
    print(PAGE)


def page() -> str:
    before = {row["name"]: row for row in read("operators_before")["rows"]}
    counted = [counts(before.get(row["name"]), row) for row in read("operators")["rows"]]
    head = "| system | before | now | | idle before | now | without the update, before | now |\n" + "|---" * 8 + "|\n"
    earlier = read("gpu_before")
    gpu = [GPU, *on_gpu(), GPU_BEFORE.format(**earlier), *(step(row) for row in earlier["rows"])]
    plain = [form(name, row) for name in MEASURED for row in read(name)["rows"]]
    done = {name: row for name, row in read("full_size")["configs"].items() if "error" not in row}
    full = [full_size(name, row) for name, row in sorted(done.items())]

    parts = [HEAD, "\n", OPERATORS, head, *counted, AFTER, *gpu, CPU, *plain, FULL, *full]
    return "".join(parts)


def read(name: str) -> Mapping[str, Any]:
    return json.loads((RESULTS / f"{name}.json").read_text())


def on_gpu() -> list[str]:
    """What `benchmark.py gpu` has measured since, or that it has not."""
    if not (RESULTS / "gpu.json").is_file():
        return [UNMEASURED]

    result = read("gpu")
    if result["quick"] or result["machine"]["gpu"] is None:
        raise ValueError("docs/results/gpu.json: was made with --quick, or without a GPU; measure again on one")

    machine = result["machine"]
    facts = {"device": machine["gpu"], "torch": machine["torch"]}
    return [MEASURED_ON.format(**result, **facts), *(resident_step(row) for row in result["rows"])]


def resident_step(row: Mapping[str, Any]) -> str:
    """A row of a step that the benchmark has measured, or the reason why it has not."""
    if "error" in row:
        return line([row["name"], row["error"], *[""] * 7])

    milliseconds, busy = row["ms"]["step"], row["busy_ms"]
    times = [f"{milliseconds:.4g}", f"{busy:.4g}", f"{busy / milliseconds:.0%}"]
    memory = "–" if row["peak_mib"] is None else f"{row['peak_mib']:.0f}"
    waits = [row["kernels"], row["syncs"], memory, f"{row['warm_seconds']:.3g}", row["loader"]["processes"]]
    return line([row["name"], *times, *waits])


def counts(before: Mapping[str, Any] | None, now: Mapping[str, Any]) -> str:
    """A row of operators before and now; some systems were not counted before."""
    passes = now["operators"] - now["parts"]["update"]
    if before is None:
        return line([now["name"], "–", now["operators"], "", "–", now["idle"], "–", passes])

    share = f"{now['operators'] / before['operators']:.0%}"
    earlier = before["operators"] - before["parts"]["update"]
    return line(
        [now["name"], before["operators"], now["operators"], share, before["idle"], now["idle"], earlier, passes]
    )


def step(row: Mapping[str, Any]) -> str:
    """A row of a step on a GPU."""
    milliseconds = row["ms"]["step"]
    busy = row["busy_ms"]
    return line([row["name"], milliseconds, busy, f"{busy / milliseconds:.0%}", row["kernels"]])


def form(result: str, row: Mapping[str, Any]) -> str:
    """A row of forms that were measured side by side."""
    times = ", ".join(f"{name} {value:.4g}" for name, value in row["ms"].items())
    faster = ", ".join(f"{value:.2f}× {name}" for name, value in row.get("faster", {}).items())
    peaks = [f"{name} {value:.0f}" for name, value in row.get("peak_mib", {}).items() if value is not None]
    return line([f"[{result}](results/{result}.json)", row["name"], times, faster, ", ".join(peaks) or "–"])


def full_size(name: str, row: Mapping[str, Any]) -> str:
    """A row of one step at full size."""
    images = " + ".join(map(str, row["batch"].values()))
    crops = ", ".join(dict.fromkeys(row["crop"].values()))
    machine = f"{row['machine']['threads']}, {row['machine']['processor']}"
    memory = [f"{row['held_gib']:.2f}", f"{row['peak_gib']:.2f}"]
    worked = row.get("cpu_seconds", "–")
    return line([name, images, crops, f"{row['parameters'] / 1e6:.1f}", row["seconds"], worked, *memory, machine])


def line(cells: list[Any]) -> str:
    return "| " + " | ".join(map(str, cells)) + " |\n"


if __name__ == "__main__":
    cli.run(main)
