"""A long-tailed subset of any data set: python scripts/make_longtail.py coco_stuff_118k --images 40679 --out FILE

Removes training images one at a time so that the Gini coefficient of the class counts rises as fast as it can, and
writes the names of those that remain, one per line. With --images and --gini the number is exact and the coefficient
ends at the second. No class loses its last image. With --config the data set is the config's (its training stream's,
or that of --stream), which is how `folder` data sets are named.
"""

import argparse
from collections import Counter
from pathlib import Path

from common import cli
from common.data import SegmentationDataset, Statistics, class_statistics
from common.data.catalogue.lists import write_list
from common.data.groups import named
from common.data.imbalance import ABSENT, GROUPS, gini, groups
from common.data.subset import greedy_subset, presence_weights
from common.files import refuse_to_overwrite


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cli.add_source(parser)
    parser.add_argument("--images", type=int, metavar="N", help="how many images remain")
    parser.add_argument("--gini", type=float, metavar="G", help="Gini coefficient to reach, at the level")
    parser.add_argument(
        "--level", choices=("image", "pixel"), default="image", help="which class counts (default image)"
    )
    parser.add_argument("--seed", type=int, default=0, help="decides between equally good images")
    parser.add_argument("--workers", type=int, default=2, help="processes that count the labels")
    parser.add_argument("--cache", metavar="DIR", help="keep the counts there")
    cli.add_out(parser, "FILE", "the list to write")
    cli.add_force(parser)
    args = parser.parse_intermixed_args()
    if args.images is None and args.gini is None:
        raise ValueError("give --images, --gini, or both")
    refuse_to_overwrite([args.out], args.force)
    dataset = SegmentationDataset(cli.source(args))
    statistics = class_statistics(dataset, args.workers, args.cache)
    print(describe("whole set", statistics))
    weights = presence_weights(statistics, args.level)
    kept = greedy_subset(weights, images=args.images, goal=args.gini, seed=args.seed).kept
    print(describe("subset", Statistics(statistics.pixels[kept], statistics.ignored[kept])))
    path = Path(args.out)
    write_list(path, [dataset.records[k].image.name for k in kept])
    print(f"{path}: {len(kept)} images")


def describe(what: str, statistics: Statistics) -> str:
    """Images, extremes, Gini coefficients and group sizes at both levels."""
    lines = [f"{what}: {statistics.num_images} images"]
    for level in ("image", "pixel"):
        counts = statistics.count(level)
        sizes = Counter(named(groups(counts)))
        shown = ", ".join(f"{sizes[name]} {name}" for name in (*GROUPS, ABSENT) if sizes[name] or name != ABSENT)
        lines.append(
            f"  {level} level: Gini {gini(counts):.4f}, counts {counts.min():.4g} to {counts.max():.6g}, {shown}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    cli.run(main)
