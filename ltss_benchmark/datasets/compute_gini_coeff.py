"""Class imbalance of a data set: python datasets/compute_gini_coeff.py [--dataset ade20k_full] [--set train]

Prints the largest and smallest class count and the Gini coefficient, of images that show a class (image level) and of
image shares summed over images (pixel level). Counts are kept in the data set's folder .cache.
"""

import argparse
import os

from common import cli
from common.config import SourceConfig
from common.data import SegmentationDataset, class_statistics
from common.data.imbalance import gini
from ltss_benchmark.datasets import preparation

ROWS = {
    "ade20k": "ade20k",
    "ade20k_full": "ade20k_full",
    "coco_stuff": "coco_stuff_118k",
    "coco_stuff_lt": "coco_stuff_lt_40k",
    "mhpv2": "mhpv2_15k",
    "mhpv2_lt": "mhpv2_lt_7k",
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dataset", choices=ROWS, default="ade20k")
    parser.add_argument("--set", choices=("train", "val"), default="train")
    parser.add_argument(
        "--workers", type=int, default=os.cpu_count() or 1, help="default: one a core"
    )
    parser.add_argument(
        "--cache", metavar="DIR", help="where counts are kept (default: .cache of the data set)"
    )
    args = parser.parse_args()
    name = ROWS[args.dataset]
    dataset = SegmentationDataset(SourceConfig(dataset=name, split=args.set))
    statistics = class_statistics(
        dataset, args.workers, args.cache or preparation.folder(name) / ".cache"
    )
    print(
        f"{name} {args.set}: {statistics.num_images} images, {dataset.row.num_classes} classes"
    )

    for level, digits in (("image", 0), ("pixel", 4)):
        counts = statistics.count(level)
        print(
            f"{level} level: max {counts.max():.{digits}f}, min {counts.min():.{digits}f}, Gini {gini(counts):.4f}"
        )


if __name__ == "__main__":
    cli.run(main)
