"""MHP-v2: python datasets/prepare_mhpv2_15k_sem_seg.py

Reads $DETECTRON2_DATASETS/mhpv2_15k/LV-MHP-v2: images in {train,val}_img (or {train,val}/images), and merged labels in
{train,val}_seg, else one parsing file per person in {train,val}_parsing (or {train,val}/parsing_annos). Images become
links; a truncated one is written anew. Merged labels become links; else the people of an image are merged. Prints which
classes are in fewer images than the published counts of MHP-v2-LT, a part of this set, allow.
"""

from pathlib import Path

from common import cli
from ltss_benchmark.datasets import preparation
from ltss_benchmark.datasets.conversions import mhp_image, mhp_label, mhp_people


def main() -> None:
    preparation.parse(__doc__)
    base = preparation.begin("mhpv2_15k")
    raw = base / "LV-MHP-v2"

    for split in ("train", "val"):
        images = first_folder(raw / f"{split}_img", raw / split / "images")
        target = base / "images" / split
        if target.is_symlink():
            raise ValueError(
                f"{target}: is a link, but checked images are to be placed in a folder there; remove it"
            )

        jobs = [
            (path, target / f"{path.stem}.jpg") for path in preparation.listing(images, ".jpg")
        ]
        preparation.run(mhp_image, jobs, f"MHP-v2 {split} images")
        merged = raw / f"{split}_seg"
        if merged.is_dir():
            preparation.link(merged, base / "annotations" / split)
            continue

        parsing = first_folder(raw / f"{split}_parsing", raw / split / "parsing_annos")
        people = mhp_people(preparation.listing(parsing, ".png"))
        jobs = [
            (paths, base / "annotations" / split / f"{image}.png")
            for image, paths in people.items()
        ]
        preparation.run(mhp_label, jobs, f"MHP-v2 {split} labels")

    preparation.verify("mhpv2_15k")
    preparation.compare_with_subset("mhpv2_15k", "mhpv2_lt_7k")


def first_folder(*choices: Path) -> Path:
    """The first of the folders that exists. ValueError names all."""
    for path in choices:
        if path.is_dir():
            return path
    raise ValueError(f"{choices[0]}: no such folder, nor {choices[1]}; unpack LV-MHP-v2 there")


if __name__ == "__main__":
    cli.run(main)
