"""What stands against training: python scripts/doctor.py [CONFIG] [--images 8] [key=value …].

Without a config: what this machine has and lacks, and which data sets are found; exit code 0. With one, of any of the
four systems: whether its files are there (else the exact path or link that is not), what some of its labels hold
against its list of classes, and one training step on two images a stream. The last line is the verdict, `ready` or what
to do first; the exit code 0 or 2. Nothing is left behind but the counts of the labels, which training would make too.
"""

import argparse
import importlib.metadata
import os
import platform
import shutil
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for the other scripts, which are not installed

from common import cli
from common.config import Config, SourceConfig, load_config
from common.data import DATASETS, DatasetRow, resolve
from common.data.catalogue.registry import home
from scripts.checkup import UNTRIED, Finding, look_at_labels, look_for, sources, try_a_step

PACKAGES = ("torch", "torchvision", "timm", "numpy", "scipy", "scikit-learn", "pillow", "safetensors", "tensorboard")
COMPILERS = ("c++", "g++", "clang++")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cli.add_words(parser)
    parser.add_argument("--output", metavar="DIR", help="where runs will be written (default: runs, or the config's)")
    parser.add_argument("--images", type=int, default=8, help="labels to look at in each set (default 8)")
    cli.add_device(parser)
    cli.add_quiet(parser)
    args = parser.parse_intermixed_args()
    alone = args.config is None and not args.words
    args = args if alone else cli.completed(parser, args)
    if args.images < 1:
        raise ValueError(f"--images {args.images}: give 1 or more")

    cfg = None if alone else load_config(args.config, args.overrides)
    output = Path(args.output or (cfg.output if cfg else "runs"))
    lines = [("python", f"{platform.python_version()} on {platform.platform()}")]
    lines += [(name, version(name)) for name in PACKAGES]
    lines += [*machine(), ("compiler", compiler()), ("triton", triton())]
    lines += [] if cfg else data_sets()
    lines.append((f"output {output}", writable(output)))
    wide = max(len(name) for name, _ in lines)
    for name, text in lines:
        print(f"{name:<{wide}}  {text}")

    faults = [f"{name}: {text}" for name, text in lines if text.startswith(("MISSING", "NOT WRITABLE"))]
    return verdict(faults + checkup(cfg, args.images, args.device, wide)) if cfg else 0


def checkup(cfg: Config, images: int, device: str | None, wide: int) -> list[str]:
    """Look at a config's files and labels and try a step, a line each; returns what stands against training."""
    faults: list[str] = []

    def say(finding: Finding) -> None:
        print(f"{finding.name:<{wide}}  {finding.text}", flush=True)
        faults.extend([finding.fault] if finding.fault else [])

    for name, source in sources(cfg).items():
        finding, dataset = look_for(name, source)
        say(finding)
        if dataset is not None and source.labels:
            lines, finding = look_at_labels(name, dataset, images)
            say(finding)
            print("\n".join(lines), flush=True)

    say(Finding("step", UNTRIED) if faults else try_a_step(cfg, device))
    return faults


def verdict(faults: list[str]) -> int:
    """The last line, and the exit code."""
    more = f" (and {len(faults) - 1} more above)" if len(faults) > 1 else ""
    print(f"verdict: not ready: {faults[0]}{more}" if faults else "verdict: ready")
    return 2 if faults else 0


def version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return f"MISSING: pip install {package}"


def machine() -> list[tuple[str, str]]:
    """Processor, memory and accelerators."""
    import torch

    memory = ""
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        memory = f", {os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE') / 2**30:.0f} GiB of memory"
    lines = [("cpu", f"{os.cpu_count()} cores, torch uses {torch.get_num_threads()} threads{memory}")]
    if not torch.cuda.is_available():
        return [*lines, ("gpu", "none that torch can use: training runs on the CPU")]
    for i in range(torch.cuda.device_count()):
        found = torch.cuda.get_device_properties(i)
        lines.append((f"cuda:{i}", f"{found.name}, {found.total_memory / 2**30:.0f} GiB, CUDA {torch.version.cuda}"))
    return lines


def compiler() -> str:
    """Only `train.compile` on the CPU needs one."""
    wanted = os.environ.get("CXX")
    found = shutil.which(wanted) if wanted else next(filter(None, map(shutil.which, COMPILERS)), None)
    return found or "none: train.compile does not work on the CPU, all else does"


def triton() -> str:
    try:
        return importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return "none: train.compile does not work on GPUs, and deformable attention takes its PyTorch form"


def data_sets() -> list[tuple[str, str]]:
    """Every folder that a row of DATASETS looks for."""
    rows: dict[tuple[str, str], DatasetRow] = {}
    for row in DATASETS.values():
        rows.setdefault((row.env, row.folder), row)
    return [(f"data {row.folder}", data_set(row)) for row in rows.values()]


def data_set(row: DatasetRow) -> str:
    try:
        _, root = resolve(SourceConfig(dataset=row.name))
    except ValueError:
        return f"missing: no {home(row)[0]} (${row.env} is {os.environ.get(row.env) or 'not set'})"
    try:
        records = row.layout(root, "train", None)
    except (ValueError, OSError) as error:
        return f"incomplete: {' '.join(str(error).split())}"
    labelled = sum(record.label is not None for record in records)
    return f"{len(records)} training images, {labelled} with labels, in {root}"


def writable(folder: Path) -> str:
    """Whether a file can be made there; nothing is left behind."""
    place = folder
    while not place.exists() and place != place.parent:
        place = place.parent
    try:
        with tempfile.TemporaryFile(dir=place):
            pass
    except OSError as error:
        return f"NOT WRITABLE: {error.strerror}; set `output` to another folder"
    return f"writable, {shutil.disk_usage(place).free / 2**30:.0f} GiB free"


if __name__ == "__main__":
    cli.run(main)
