"""Baseline against BLV on toy street scenes, in minutes on two CPU cores: trains, evaluates and writes a report.

Both runs train at once, one thread each. Everything lies under runs/demo; a second call resumes where a stopped one
ended. `--minus` adds a third run, BLV with the offset subtracted.
"""

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

from common import cli
from common.evaluation import format_table
from common.files import read_json
from common.jobs import Run, plan, run_all

ROOT = Path(__file__).resolve().parent.parent
JOBS = ROOT / "scripts" / "jobs" / "demo.yaml"
RUNS = ("upernet_r18", "upernet_r18_blv", "upernet_r18_blv_minus")
OUTPUT = Path("runs/demo")


def main() -> int | None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minus", action="store_true")
    runs = RUNS if parser.parse_args().minus else RUNS[:2]
    started = time.monotonic()
    os.chdir(ROOT)
    call("scripts/make_toy.py", "cityscapes", "--root", "datasets/toy_cityscapes", "--train", "96", "--val", "32")
    stopped = train(plan(JOBS, only=runs))
    if stopped:
        return stopped

    report = OUTPUT / "report.html"
    folders = [str(OUTPUT / name) for name in runs]
    call("scripts/report.py", *folders, "--baseline", folders[0], "--out", str(report))
    results = [read_json(OUTPUT / name / "evaluation.json") for name in runs]
    for name, result in zip(runs, results, strict=True):
        print(f"\n{name}" + ("" if result is results[0] else ", change against the baseline"))
        print(format_table(result, None if result is results[0] else results[0]))

    print("\nBLV adds an offset to rare classes (`--minus` subtracts it): see 'The sign of BLV' in README.md.")
    print(f"report: {report.resolve()}  ({(time.monotonic() - started) / 60:.1f} minutes)")
    return None


def train(runs: list[Run]) -> int:
    """Train what is not trained yet, one run a core; the exit code where a signal stopped it, else 0."""
    ended = run_all(runs, at_once=os.cpu_count() or 2, show=True)
    if ended.signal:
        return 128 + ended.signal
    if ended.failed:
        raise ValueError(f"training failed: {', '.join(run.name for run in ended.failed)}")
    if ended.unfinished:
        raise ValueError(f"not finished, call it again: {', '.join(run.name for run in ended.unfinished)}")
    return 0


def call(script: str, *words: str) -> None:
    """Run a script of the project; its failure ends the demo."""
    done = subprocess.run([sys.executable, script, *words])
    if done.returncode:
        raise ValueError(f"{script} ended with exit code {done.returncode}")


if __name__ == "__main__":
    cli.run(main)
