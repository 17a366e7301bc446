"""ADE20K (150 classes): python datasets/prepare_ade20k_sem_seg.py

Reads $DETECTRON2_DATASETS/ADEChallengeData2016/annotations and writes annotations_detectron2 beside it.
"""

from common import cli
from ltss_benchmark.datasets import preparation
from ltss_benchmark.datasets.conversions import ade20k_label


def main() -> None:
    base = preparation.folder("ade20k")
    jobs = []
    for split in ("training", "validation"):
        sources = preparation.listing(base / "annotations" / split, ".png")
        jobs += [(source, base / "annotations_detectron2" / split / source.name) for source in sources]
    preparation.run(ade20k_label, jobs, "ADE20K labels")
    preparation.verify("ade20k")


if __name__ == "__main__":
    cli.run(main)
