"""COCO-Stuff (171 classes): python datasets/prepare_coco_stuff_118k_sem_seg.py

Reads $DETECTRON2_DATASETS/coco_stuff_118k/stuffthingmaps_trainval2017 and writes annotations beside it; the images lie
in images/{train2017,val2017}.
"""

from common import cli
from ltss_benchmark.datasets import preparation
from ltss_benchmark.datasets.conversions import coco_stuff_label


def main() -> None:
    base = preparation.folder("coco_stuff_118k")
    jobs = []
    for split in ("train2017", "val2017"):
        sources = preparation.listing(base / "stuffthingmaps_trainval2017" / split, ".png")
        jobs += [(source, base / "annotations" / split / source.name) for source in sources]
    preparation.run(coco_stuff_label, jobs, "COCO-Stuff labels")
    preparation.verify("coco_stuff_118k")


if __name__ == "__main__":
    cli.run(main)
