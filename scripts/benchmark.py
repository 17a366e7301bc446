"""Measures the project against the plain way to do the same: python scripts/benchmark.py NAME [options].

    loader       loading and augmenting Cityscapes-size samples, against Pillow and OpenCV
    step         a training step of a config in its parts, cross-entropy against BLV and others
    metrics      confusion matrix, and evaluation of whole images
    cpsl         the operations of CPSL against their literal forms, LAB colour transfer
    usrn         a training step of USRN against the release's form of it, and with channels_last + bf16
    unimatch     the same of UniMatch, or with --method unimatch_v2 of UniMatch V2
    daformer     the same of DAFormer
    kmeans       balanced k-means against k-means-constrained (with --large also at full size)
    loss         the loss at label size: fused, one image at a time, and enlarged as a whole; labels likewise
    remedies     what every remedy of the training loss costs, in plain cross-entropies
    ltss         Mask2Former: order of inference, a training step against transformers, deformable attention
    gpu          a step of every system on this GPU: busy or waiting, kernels, memory, the loader beside it
    full-size    every official config through one real training step (also: --full-size [NAME …])

All forms of a row run in turns in one process, after a check that they give the same numbers. `--quick` takes tiny
sizes: a test that it works, not a measurement. The result is JSON, printed or written to --out.
"""

import argparse
import importlib
import json
import shlex
import sys
import time
from collections.abc import Iterable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for scripts.bench, which is not installed

from common import cli
from common.files import refuse_to_overwrite

NAMES = (
    "loader", "step", "metrics", "cpsl", "usrn", "unimatch", "daformer", "kmeans", "loss", "remedies",
    "ltss", "gpu", "full-size",
)  # fmt: skip
MODULES = {name: f"scripts.bench.{name.replace('-', '_')}" for name in NAMES}
CHILD = "one-step"  # a process that full-size starts


def main(words: list[str] | None = None) -> int:
    words = list(sys.argv[1:] if words is None else words)
    if "--full-size" in words:
        words.remove("--full-size")
        words.insert(0, "full-size")
    if not words or words[0] in ("-h", "--help"):
        print(__doc__)
        return 0
    name, *rest = words
    if name not in (*MODULES, CHILD):
        raise ValueError(f"benchmark {name!r} is unknown; known: {', '.join(MODULES)}")
    module = importlib.import_module(MODULES["full-size" if name == CHILD else name])
    args = parse(name, module, rest)
    if name not in ("full-size", CHILD):
        refuse_to_overwrite(filter(None, [args.out]), args.force)
    # full-size leaves all work to processes of its own
    configure(args.threads, None if name == "full-size" else getattr(args, "device", None))
    if name == CHILD:
        return module.one_step(args)
    if name == "full-size":
        return module.run(args)
    write(name, module.run(args), args, words)
    return 0


def parse(name: str, module, words: list[str]) -> argparse.Namespace:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog=f"benchmark.py {name}", description=module.__doc__, formatter_class=formatter)
    parser.add_argument("--out", metavar="FILE", help="write the JSON there")
    parser.add_argument("--threads", type=int, help="CPU threads; default: torch's, for `loader` 1")
    parser.set_defaults(rounds=1)
    if name not in ("full-size", CHILD):
        cli.add_force(parser)
        parser.add_argument("--rounds", type=int, default=7, help="turns that each form takes (default 7)")
        parser.add_argument("--quick", action="store_true", help="tiny sizes and one round")
    module.arguments(parser)
    args = parser.parse_intermixed_args(words)
    args.rounds = 1 if getattr(args, "quick", False) else args.rounds
    if args.rounds < 1 or (args.threads is not None and args.threads < 1):
        raise ValueError("--rounds and --threads must be at least 1")
    return args


def configure(threads: int | None, device: str | None) -> None:
    """CPU threads, and which GPU is meant where none is named: by a kernel of Triton's, or a wait for the GPU."""
    import torch

    from common import distributed

    if threads is not None:
        torch.set_num_threads(threads)
    if device is not None and device.startswith("cuda:"):
        distributed.start(device)


def write(name: str, rows: Iterable[dict], args: argparse.Namespace, words: list[str]) -> None:
    """The result as JSON: what was measured, on what, and how. A file holds each row as soon as it is there."""
    from common.engine.logging import commit, describe_machine
    from common.files import write_json

    machine = describe_machine()
    del machine["tf32"]  # of each row, as what is measured switches it
    result = {
        "benchmark": name,
        "command": shlex.join(["python", "scripts/benchmark.py", *words]),
        "commit": commit(),
        "date": time.strftime("%Y-%m-%d"),
        "machine": machine,
        "rounds": args.rounds,
        "quick": args.quick,
    }
    if args.out is None:
        print(json.dumps({**result, "rows": rounded(list(rows))}, indent=1))
        return

    out = Path(args.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    found: list[dict] = []
    for row in rows:
        found.append(rounded(row))
        write_json(out, {**result, "rows": found})
        print(line(row), flush=True)
    if not found:
        write_json(out, {**result, "rows": []})
    print(f"written to {out}")


def rounded(value):
    """Five significant digits are more than a measurement has."""
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [rounded(item) for item in value]
    return float(f"{value:.5g}") if isinstance(value, float) else value


def line(row: dict) -> str:
    """One row for the console."""
    if "error" in row:
        return f"{row['name']}: {row['error']}"
    times = "  ".join(f"{form} {value:.2f}" for form, value in row["ms"].items())
    factors = "  ".join(f"{value:.2f}x of {form}" for form, value in row.get("faster", {}).items())
    bars = "".join(f"  [{key}: {row[key]}]" for key in ("met", "memory_met") if key in row)
    return f"{row['name']}: {times} ms  {factors}{bars}"


if __name__ == "__main__":
    cli.run(main)
