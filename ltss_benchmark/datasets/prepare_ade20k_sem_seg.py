"""ADE20K (150 classes): python datasets/prepare_ade20k_sem_seg.py

Reads $DETECTRON2_DATASETS/ADEChallengeData2016/annotations and writes annotations_detectron2 beside it.
"""

from common import cli
from ltss_benchmark.datasets import preparation
from ltss_benchmark.datasets.conversions import ade20k_label


def main() -> None:
    preparation.parse(__doc__)
    preparation.convert_labels("ade20k", "annotations", "annotations_detectron2", ade20k_label)


if __name__ == "__main__":
    cli.run(main)
