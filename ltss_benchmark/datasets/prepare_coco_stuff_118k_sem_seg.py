"""COCO-Stuff (171 classes): python datasets/prepare_coco_stuff_118k_sem_seg.py

Reads $DETECTRON2_DATASETS/coco_stuff_118k/stuffthingmaps_trainval2017 and writes annotations beside it; the images lie
in images/{train2017,val2017}.
"""

from common import cli
from ltss_benchmark.datasets import preparation
from ltss_benchmark.datasets.conversions import coco_stuff_label


def main() -> None:
    preparation.parse(__doc__)
    preparation.convert_labels(
        "coco_stuff_118k", "stuffthingmaps_trainval2017", "annotations", coco_stuff_label
    )


if __name__ == "__main__":
    cli.run(main)
