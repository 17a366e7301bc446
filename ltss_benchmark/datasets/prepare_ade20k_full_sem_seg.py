"""ADE20K-Full (847 classes): python datasets/prepare_ade20k_full_sem_seg.py [--png]

Reads the release 2021_17_01 in $DETECTRON2_DATASETS/ADE20K_2021_17_01 (index_ade20k.pkl, images and their *_seg.png)
and writes images_detectron2, annotations_detectron2 and the names of the classes beside them.
"""

import argparse
from pathlib import Path

from common import cli
from common.data.catalogue.ltss import class_table
from common.data.catalogue.row import NAMES_FILE
from ltss_benchmark.datasets import preparation
from ltss_benchmark.datasets.conversions import ade20k_full_pair
from ltss_benchmark.datasets.index_file import read_index

_WALL = 2978  # object index of the first class


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--png", action="store_true", help="images without loss (the benchmark's are JPEG)"
    )
    end = ".png" if parser.parse_args().png else ".jpg"
    base = preparation.begin("ade20k_full")
    index = read_index(base / "index_ade20k.pkl")
    names = class_names(index["objectnames"], base)
    jobs = []

    for folder, name in zip(index["folder"], index["filename"], strict=True):
        image = base.parent / folder / name
        split = "validation" if name.split("_")[1:2] == ["val"] else "training"
        targets = [
            base / f"{kind}_detectron2" / split / name for kind in ("images", "annotations")
        ]
        targets = [
            path.with_suffix(suffix)
            for path, suffix in zip(targets, (end, ".tif"), strict=True)
        ]
        jobs.append((image, image.with_name(f"{image.stem}_seg.png"), *targets))

    preparation.run(ade20k_full_pair, jobs, "ADE20K-Full")

    with preparation.whole(base / NAMES_FILE) as temporary:
        temporary.write_text("".join(f"{name}\n" for name in names), encoding="utf-8")

    preparation.verify("ade20k_full")
    preparation.compare("ade20k_full")


def class_names(objects: list[str], base: Path) -> list[str]:
    """The names of the 847 classes among the release's objects. ValueError where these are of another release."""
    ids = class_table("ade20k_full").ids
    if len(objects) < max(ids) or not objects[_WALL - 1].startswith("wall"):
        raise ValueError(
            f"{base / 'index_ade20k.pkl'}: object {_WALL} is not the wall; use the release 2021_17_01"
        )
    return [" ".join(objects[k - 1].split()) for k in ids]


if __name__ == "__main__":
    cli.run(main)
