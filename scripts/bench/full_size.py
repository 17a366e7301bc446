"""Every official config through one real training step: the paper's crop, all classes and streams.

Names choose configs: a whole name that one, a part all that have it, none all. The images are toy scenes in the real
layout and size. The batch is 1, or 2 where a batch norm needs it. Each config runs in a process of its own. The JSON
file is written after each, and a later call measures what is missing; changed values, another size and another device
are part of a row's name. `seconds` of the step, `data_seconds` of them for loading, `cpu_seconds` that its threads
worked, which other programs on the cores hardly change, `peak_gib` above what the process holds with weights, gradients
and optimiser state, which are `held_gib`. Each row names its commit and machine.
"""

import argparse
import gc
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from common.cli import split_overrides
from common.config import load_config
from common.engine.logging import commit, describe_machine
from common.files import load_json, read_artifact, write_json

BENCHMARK = Path(__file__).resolve().parents[1] / "benchmark.py"
OUT = BENCHMARK.parents[1] / "docs" / "results" / "full_size.json"
MARK = "result: "  # what the child's line begins with


def arguments(parser: argparse.ArgumentParser) -> None:
    words = "parts of configs' names; overrides"
    parser.add_argument("names", nargs="*", default=[], metavar="NAME|KEY=VALUE", help=words)
    parser.add_argument("--again", action="store_true", help="also what the file holds already")
    parser.add_argument("--size", help="HEIGHTxWIDTH of the images, in place of the real one")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N")
    parser.add_argument("--list", action="store_true", help="print the names and stop")
    parser.set_defaults(out=str(OUT))


def run(args: argparse.Namespace) -> int:
    """Measure what is missing; 1 where a config failed."""
    from scripts.bench.families import official

    words, changes = split_overrides(args.names)
    known = official()
    chosen = choose(words, list(known))
    if args.list:
        print("\n".join(chosen))
        return 0
    out = Path(args.out)
    others = otherwise(args, changes)
    results = read(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    failed = 0
    with tempfile.TemporaryDirectory(prefix="full_size_") as folder:
        for name in chosen:
            row = " ".join([name, *others])
            if not args.again and "error" not in results["configs"].get(row, {"error": ""}):
                print(f"{row}: measured already", flush=True)
                continue
            result = measure(name, args, changes, Path(folder))
            failed += "error" in result
            results["configs"][row] = result
            write_json(out, results)
            print(f"{row}: {summary(result)}", flush=True)
    return int(failed > 0)


def otherwise(args: argparse.Namespace, changes: list[str]) -> list[str]:
    """What makes a row another one than the official config's at full size on a CPU."""
    size = [f"--size {args.size}"] if args.size else []
    device = [] if args.device == "cpu" else [f"--device {args.device}"]
    return [*sorted(changes), *size, *device]


def choose(words: list[str], names: list[str]) -> list[str]:
    """The names that one of the words is, or is a part of where it is no whole name; all without words.

    ValueError for a word that is part of none.
    """
    if not words:
        return names

    chosen: set[str] = set()
    for word in words:
        found = [word] if word in names else [name for name in names if word in name]
        if not found:
            raise ValueError(f"{word!r} is part of no official config's name; --list prints them")
        chosen.update(found)

    return [name for name in names if name in chosen]


def read(path: Path) -> dict[str, Any]:
    """Earlier results. ValueError where the file holds something else."""
    if not path.is_file():
        return {"benchmark": "full-size", "configs": {}}

    def parse(path: Path) -> dict[str, Any]:
        found = load_json(path)
        if not isinstance(found["configs"], dict):
            raise TypeError("configs is no mapping")
        return found

    return read_artifact(path, parse, "not a file of this benchmark; give another --out")


def measure(name: str, args: argparse.Namespace, changes: list[str], folder: Path) -> dict[str, Any]:
    """One config in its own process, which works below `folder`."""
    words = [name, *changes, "--device", args.device, *(("--size", args.size) if args.size else ())]
    words += ["--threads", str(args.threads)] if args.threads else []
    command = [sys.executable, str(BENCHMARK), "one-step", *words]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    for line in done.stdout.splitlines():
        if line.startswith(MARK):
            return json.loads(line.removeprefix(MARK)) | {"date": time.strftime("%Y-%m-%d"), "commit": commit()}
    reason = done.stderr.strip().splitlines() or [f"killed by signal {-done.returncode}"]
    return {"error": f"exit code {done.returncode}: {reason[-1]}"}


def summary(result: dict[str, Any]) -> str:
    if "error" in result:
        return f"failed: {result['error']}"
    peak = "-" if result["peak_gib"] is None else f"{result['peak_gib']:.2f}"
    return f"{result['seconds']:.1f} s, peak {peak} GiB above {result['held_gib']:.2f}, loss {result['loss']:.4f}"


# The child process --------------------------------------------------------------------------------------------------


class Clock:
    """A stream that adds up the seconds its batches take."""

    def __init__(self, stream: Iterator[Any]):
        self.stream, self.seconds = stream, 0.0

    def __iter__(self) -> "Clock":
        return self

    def __next__(self) -> Any:
        start = time.perf_counter()
        batch = next(self.stream)
        self.seconds += time.perf_counter() - start
        return batch


def one_step(args: argparse.Namespace) -> None:
    """Take the config `args.names[0]` through one step in this process, and print the result as a line of JSON."""
    import torch

    from scripts.bench import measure as m
    from scripts.bench import workspace
    from scripts.bench.families import family_of, least_batch, official

    name, *changes = args.names
    path = official()[name]
    family, plain = family_of(path), load_config(path)
    batch = least_batch(plain)
    cfg = load_config(path, [*workspace.overrides(plain, batch), "output=runs/full_size", *changes])
    device = torch.device(args.device)
    trainer, experiment = workspace.trainer(cfg, family, parse_size(args.size), device)
    streams = {key: Clock(stream) for key, stream in experiment.open(0).items()}
    held = workspace.settle(trainer)
    timed: dict[str, float] = {}

    def step() -> None:
        start, worked = time.perf_counter(), time.process_time()
        scalars = trainer.step(0, streams, [])
        timed["loss"] = float(scalars["loss"])  # waits for the device
        timed["seconds"] = time.perf_counter() - start
        timed["cpu_seconds"] = time.process_time() - worked

    gc.collect()
    peak = m.peak_memory(step, device)
    result = {
        "seconds": round(timed["seconds"], 2),
        "cpu_seconds": round(timed["cpu_seconds"], 2),
        "data_seconds": round(sum(stream.seconds for stream in streams.values()), 2),
        "peak_gib": m.gibibytes(peak),
        "held_gib": m.gibibytes(held),
        "loss": timed["loss"],
        "batch": {key: stream.batch_size for key, stream in cfg.data.streams.items()},
        "crop": {key: "x".join(map(str, s.dataset.transform.crop)) for key, s in experiment.streams.items()},
        "classes": cfg.model.num_classes,
        "parameters": sum(p.numel() for p in trainer.parameters),
        "precision": cfg.train.precision,
        "device": str(device),
        "machine": describe_machine(),
        **({"size": args.size} if args.size else {}),
        **({"changes": changes} if changes else {}),
    }
    print(MARK + json.dumps(result), flush=True)


def parse_size(text: str | None) -> tuple[int, int] | None:
    """HEIGHTxWIDTH; ValueError for anything else."""
    if text is None:
        return None
    parts = text.split("x")
    if len(parts) != 2 or not all(part.isdigit() for part in parts):
        raise ValueError(f"--size {text!r} is no HEIGHTxWIDTH, such as 1024x2048")
    return int(parts[0]), int(parts[1])
