"""One HTML report about a run, or about several compared: python scripts/report.py RUN [RUN ...] [--baseline RUN].

Runs whose configs differ by the seed alone are shown as one: means, and differences to the baseline seed by seed.
"""

import argparse
import shlex
import sys
from pathlib import Path

from common import cli
from common.report import RunFolder, write_report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folder, or that of a test: RUN/test/NAME")
    parser.add_argument("--baseline", metavar="RUN", help="what changes are measured against (default: the first)")
    where = "default: report.html in the run, or beside the first of several"
    parser.add_argument("--output", "--out", dest="out", metavar="FILE", help=where)
    options = parser.parse_args()
    paths = list(dict.fromkeys(Path(run) for run in options.runs))
    if options.baseline and Path(options.baseline) not in paths:
        paths.insert(0, Path(options.baseline))
    baseline = paths.index(Path(options.baseline)) if options.baseline else 0
    out = Path(options.out) if options.out else (paths[0] if len(paths) == 1 else paths[0].parent) / "report.html"
    if out.suffix != ".html":
        raise ValueError(f"--out {out}: the name has to end in .html")
    command = shlex.join(["python", "scripts/report.py", *sys.argv[1:]])
    written = write_report(out, [RunFolder.load(path) for path in paths], baseline, command=command)
    print(f"wrote {written} ({written.stat().st_size / 1e6:.1f} MB)")


if __name__ == "__main__":
    cli.run(main)
