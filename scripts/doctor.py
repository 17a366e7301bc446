"""What this machine has and lacks for training: python scripts/doctor.py [--output DIR]. One line each, exit code 0."""

import argparse
import importlib.metadata
import os
import platform
import shutil
import tempfile
from pathlib import Path

from common import cli
from common.config import SourceConfig
from common.data import DATASETS, DatasetRow, resolve
from common.data.catalogue.registry import home

PACKAGES = ("torch", "torchvision", "timm", "numpy", "scipy", "scikit-learn", "pillow", "safetensors", "tensorboard")
COMPILERS = ("c++", "g++", "clang++")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", default="runs", metavar="DIR", help="where runs will be written (default runs)")
    args = parser.parse_intermixed_args()
    lines = [("python", f"{platform.python_version()} on {platform.platform()}")]
    lines += [(name, version(name)) for name in PACKAGES]
    lines += [*machine(), ("compiler", compiler()), ("triton", triton())]
    lines += data_sets()
    lines.append((f"output {args.output}", writable(Path(args.output))))
    wide = max(len(name) for name, _ in lines)
    for name, text in lines:
        print(f"{name:<{wide}}  {text}")


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
