"""Run the jobs of a file side by side: `python scripts/run_many.py CONFIG… [--seeds 0 1 2] [--at-once N]`.

CONFIG is a YAML file such as those of scripts/jobs: one command, named runs with their settings, seeds, the output
(`common/jobs/plan.py`). A finished run is skipped, a stopped one goes on (its command says `--resume`), a failed one is
tried again; a run that was finished or begun with other settings is refused. After `--minutes M`, at Ctrl-C and at
SIGTERM all commands are asked to save and end. The folder of each run has its log, job.log, and its mark, job.json.

Exit codes: 0 all done, 1 a run failed, 3 unfinished (call it again), 2 a mistake in the file, 130 Ctrl-C, 143 SIGTERM.
"""

import argparse
import os
import shlex

from common import cli
from common.jobs import Ended, plan, refuse_others, run_all, table

UNFINISHED = 3


def main() -> int:
    args = parse()
    runs = [run for path in args.configs for run in plan(path, args.seeds, args.device, args.threads, args.only)]
    if args.dry_run:
        refuse_others(runs)
        print(table(runs))
        for run in runs:
            print(f"{run.title}: {shlex.join(run.command)}")
        return 0

    ended = run_all(runs, args.at_once, args.minutes, args.show)
    print(table(runs))
    return exit_code(ended)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("configs", nargs="+", metavar="CONFIG")
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="these runs of the file alone")
    parser.add_argument("--dry-run", action="store_true", help="say what would be run, and how far all is")
    parser.add_argument("--show", action="store_true", help="commands write to the console, not to files")
    add_pool(parser)
    args = parser.parse_args()
    check_pool(args)
    return args


def add_pool(parser: argparse.ArgumentParser) -> None:
    """[--seeds …] [--at-once N] [--threads T] [--minutes M] [--device D] [--quiet]"""
    cores = os.cpu_count() or 1
    parser.add_argument("--seeds", nargs="+", type=int, help="in place of the file's")
    parser.add_argument("--at-once", type=int, default=cores, metavar="N", help="default: the number of cores")
    parser.add_argument("--threads", type=int, help="CPU threads of a run, in place of the file's")
    parser.add_argument("--minutes", type=float, help="stop after so many; the next call goes on")
    parser.add_argument("--device", help="cpu, cuda or cuda:N, for commands with {device}")
    cli.add_quiet(parser)


def check_pool(args: argparse.Namespace) -> None:
    """ValueError for numbers by which nothing would be run."""
    for name in ("at_once", "threads", "minutes"):
        value = getattr(args, name)
        if value is not None and not value > 0:  # NaN neither
            raise ValueError(f"--{name.replace('_', '-')}: {value}; give more than 0")


def exit_code(ended: Ended) -> int:
    if ended.signal:
        return 128 + ended.signal
    if ended.failed:
        return 1
    return UNFINISHED if ended.unfinished else 0


if __name__ == "__main__":
    cli.run(main)
