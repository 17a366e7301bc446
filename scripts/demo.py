"""Baseline against BLV on toy street scenes, in minutes on two CPU cores: trains, evaluates and writes a report.

Both runs train at once, one thread each. Everything lies under runs/demo; a second call resumes where a stopped one
ended. `--minus` adds a third run, BLV with the offset subtracted.
"""

import argparse
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

from common import cli
from common.evaluation import format_table
from common.files import read_json

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = ROOT / "fully_sup" / "configs" / "toy"
RUNS = ("upernet_r18", "upernet_r18_blv", "upernet_r18_blv_minus")
OUTPUT = Path("runs/demo")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minus", action="store_true")
    runs = RUNS if parser.parse_args().minus else RUNS[:2]
    started = time.monotonic()
    os.chdir(ROOT)
    call("scripts/make_toy.py", "cityscapes", "--root", "datasets/toy_cityscapes", "--train", "96", "--val", "32")
    slots = threading.Semaphore(os.cpu_count() or 2)
    failed: list[str] = []
    threads = [threading.Thread(target=train, args=(name, slots, failed)) for name in runs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failed:
        raise ValueError(f"training failed: {', '.join(failed)}")
    report = OUTPUT / "report.html"
    folders = [str(OUTPUT / name) for name in runs]
    call("scripts/report.py", *folders, "--baseline", folders[0], "--out", str(report))
    results = [read_json(OUTPUT / name / "evaluation.json") for name in runs]
    for name, result in zip(runs, results, strict=True):
        print(f"\n{name}" + ("" if result is results[0] else ", change against the baseline"))
        print(format_table(result, None if result is results[0] else results[0]))
    print("\nBLV adds an offset to rare classes (`--minus` subtracts it): see 'The sign of BLV' in README.md.")
    print(f"report: {report.resolve()}  ({(time.monotonic() - started) / 60:.1f} minutes)")


def call(script: str, *words: str, threads: int | None = None) -> int:
    """Run a script of the project; its failure ends the demo."""
    environment = os.environ if threads is None else {**os.environ, "OMP_NUM_THREADS": str(threads)}
    done = subprocess.run([sys.executable, script, *words], env=environment)
    if done.returncode:
        raise ValueError(f"{script} ended with exit code {done.returncode}")
    return done.returncode


def train(name: str, slots: threading.Semaphore, failed: list[str]) -> None:
    """One training run, when a core is free."""
    with slots:
        words = (str(CONFIGS / f"{name}.yaml"), "--resume", f"output={OUTPUT}", "train.threads=1")
        try:
            call("fully_sup/train.py", *words, threads=1)
        except ValueError:
            failed.append(name)


if __name__ == "__main__":
    cli.run(main)
