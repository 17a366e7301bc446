"""MHP-v2-LT: python datasets/prepare_mhpv2_lt_7k_sem_seg.py

Takes the training images that mhpv2_lt_7k/mhpv2-lt.txt lists from the prepared mhpv2_15k, and its validation set, both
below $DETECTRON2_DATASETS. `scripts/make_longtail.py` makes a list.
"""

from common import cli
from ltss_benchmark.datasets import preparation


def main() -> None:
    preparation.parse(__doc__)
    preparation.sample_subset("mhpv2_lt_7k", "mhpv2_15k", "mhpv2-lt.txt")


if __name__ == "__main__":
    cli.run(main)
