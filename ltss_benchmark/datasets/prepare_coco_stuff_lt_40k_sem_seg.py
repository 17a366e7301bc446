"""COCO-Stuff-LT: python datasets/prepare_coco_stuff_lt_40k_sem_seg.py

Takes the training images that coco_stuff_lt_40k/coco-stuff-lt.txt lists from the prepared coco_stuff_118k, and its
validation set, both below $DETECTRON2_DATASETS. `scripts/make_longtail.py` makes a list.
"""

from common import cli
from ltss_benchmark.datasets import preparation


def main() -> None:
    preparation.parse(__doc__)
    preparation.sample_subset("coco_stuff_lt_40k", "coco_stuff_118k", "coco-stuff-lt.txt")


if __name__ == "__main__":
    cli.run(main)
