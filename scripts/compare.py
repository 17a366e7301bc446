"""Compare runs, seeds together: `python scripts/compare.py RUN… [--baseline NAME|RUN] [--format …] [--output FILE]`.

RUN is a run's folder, that of a test (RUN/test/NAME), or a folder of runs. Runs whose configs differ by the seed alone
are one method. Of several seeds the differences to the baseline (default: the first) are taken seed by seed, with a
95 % interval by Student's t; of two single runs with the interval of 10,000 resamples of the images, where both were
evaluated with eval.per_image=true. Frames of a video are not independent: resample them together, by --block.
Runs that were evaluated on other images or otherwise are refused.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from common import cli
from common.evaluation.identity import has_identity
from common.evaluation.per_image import FILE as PER_IMAGE
from common.files import refuse_to_overwrite, replacing
from common.report.compared import Compared, compare
from common.report.groups import Group, check_alike, choose, find_runs, grouped
from common.report.text_tables import FORMATS, SUFFIXES, write


def main() -> None:
    args = parse()
    if args.output:
        refuse_to_overwrite([args.output], args.force)

    runs, left = find_runs(args.runs)
    groups = grouped(runs)
    baseline = choose(groups, args.baseline)
    check_alike(groups, baseline)

    compared = compare(groups, baseline, args.block)
    text = write(args.format, baseline, compared, [*left, *notes(groups, baseline, compared, args.block)])
    if args.output is None:
        print(text, end="")
        return

    path = Path(args.output)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as draft:
        draft.write_text(text, encoding="utf-8")
    print("\n".join(item.sentence for item in compared))
    print(f"wrote {path}")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="a run's or a test's folder, or a folder of runs")
    parser.add_argument("--baseline", metavar="NAME|RUN", help="a method as the table names it, or one of its runs")
    parser.add_argument("--format", choices=FORMATS, help="default: what the suffix of --output says, else markdown")
    parser.add_argument("--output", metavar="FILE", help="default: the console")
    parser.add_argument("--block", default="1", metavar="N|folder", help="images that are resampled together")
    cli.add_force(parser)
    args = parser.parse_args()

    if args.block != "folder":
        if not args.block.isdecimal() or int(args.block) < 1:
            raise ValueError(f"--block {args.block}: give a number of neighbouring images, or folder")
        args.block = int(args.block)

    suffix = Path(args.output or "x.md").suffix
    if args.format is None and suffix not in SUFFIXES:
        raise ValueError(f"--output {args.output}: ends in none of {', '.join(SUFFIXES)}; give --format")
    args.format = args.format or SUFFIXES[suffix]
    return args


def notes(groups: Sequence[Group], baseline: Group, compared: Sequence[Compared], block: int | str) -> list[str]:
    """What the reader of the tables has to know."""
    convention = baseline.first.evaluation["convention"]
    lines = [f"In percent, convention {convention}; `*` marks the tail, head is what is not of it."]
    over_images = [item for item in compared if "images" in item.over]
    over_seeds = [item for item in compared if "seeds" in item.over]

    if over_seeds:
        lines.append(
            "± is half of the 95 % interval over seeds (Student's t of paired differences): it speaks of other seeds "
            "on the same images."
        )
    for item in compared:
        shared = [str(seed) for seed in item.group.runs if seed in baseline.runs]
        if item in over_seeds and not len(shared) == len(item.group.runs) == len(baseline.runs):
            lines.append(
                f"{item.group.name} and {baseline.name} have other seeds: changes are of seeds {', '.join(shared)}, "
                "which both have; means of scores are of all that each has."
            )
    if over_images:
        single = "; frames of a video are not independent, which makes it too narrow (--block N)" if block == 1 else ""
        lines.append(
            "± is half of the 95 % interval over images (10,000 resamples, more of many classes): it speaks of other "
            f"images and the same two trainings{single}."
        )
    if any(item.over == "one pair" for item in compared):
        lines.append(
            f"One pair says nothing of other seeds; for an interval over images both runs need {PER_IMAGE} "
            "(eval.per_image=true)."
        )
    if over_seeds or over_images:
        lines.append("Within noise: Holm's p is not below 0.05, over the methods or over the classes of one.")
    if not all(has_identity(run.evaluation) for group in groups for run in group.runs.values()):
        lines.append("Some runs do not say what they were evaluated on: it may differ.")
    return [line for text in lines for line in (text, "")][:-1]


if __name__ == "__main__":
    cli.run(main)
