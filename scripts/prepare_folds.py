"""Lists for cross-validation of a video data set: python scripts/prepare_folds.py camvid --folds 5 --block 20 --out DIR

Divides every sequence into blocks of neighbouring frames and deals these to folds, so that classes have alike shares in
all of them: each image is tested once, by a network that saw none of its block, nor the next frames at its ends. Writes
DIR/fold_N/train.txt and DIR/fold_N/test.txt, which `data.streams.*.list` and `data.val.list` (with the training split)
read, and DIR/blocks.csv, by which scripts/evidence.py puts folds together. A sequence is what --sequence says of names.
"""

import argparse
import csv
from pathlib import Path

import numpy as np

from common import cli
from common.data import SegmentationDataset, class_statistics
from common.data.catalogue.lists import listed, write_list
from common.data.folds import SEQUENCE, Folds, assigned, blocks, deviation, neighbours, sequences
from common.files import refuse_to_overwrite, replacing


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cli.add_source(parser)
    parser.add_argument("--folds", type=int, default=5, metavar="N")
    parser.add_argument("--block", type=int, required=True, metavar="FRAMES", help="frames of a block, or a few more")
    parser.add_argument("--gap", type=int, default=1, metavar="FRAMES", help="left out of training next to tested ones")
    parser.add_argument(
        "--sequence", default=SEQUENCE, metavar="REGEX",
        help="matches a name without suffix; its first group is the sequence (default: all before the last number)",
    )  # fmt: skip
    parser.add_argument("--seed", type=int, default=0, help="of the assignments that are tried")
    parser.add_argument("--workers", type=int, default=2, help="processes that count the labels")
    cli.add_out(parser, "DIR", "the folder of the lists")
    cli.add_force(parser)
    args = parser.parse_intermixed_args()
    check(args)
    out = Path(args.out)
    refuse_to_overwrite([out / "blocks.csv", *lists(out, args.folds)], args.force)

    dataset = SegmentationDataset(cli.source(args))
    names = [listed(record.image) for record in dataset.records]
    parts = sequences([record.name for record in dataset.records], args.sequence)
    pixels = class_statistics(dataset, args.workers).pixels
    folds = assigned(pixels, blocks(parts, args.block), args.folds, args.seed)
    print(f"{len(names)} images, {len(parts)} sequences, {len(folds.fold)} blocks")

    near = neighbours(parts, args.gap)
    for fold in range(folds.count):
        tested, trained = folds.tested(fold), folds.trained(fold, near)
        write_list(out / f"fold_{fold + 1}" / "test.txt", [names[place] for place in tested])
        write_list(out / f"fold_{fold + 1}" / "train.txt", [names[place] for place in trained])
        apart = farthest(dataset, pixels, folds, fold)
        print(f"fold_{fold + 1}: {len(tested)} tested, {len(trained)} trained on; {apart}")

    write_blocks(out / "blocks.csv", names, folds)
    print(out)


def check(args: argparse.Namespace) -> None:
    """ValueError for a number that is out of range."""
    for name, least in (("folds", 2), ("block", 1), ("gap", 0)):
        if getattr(args, name) < least:
            raise ValueError(f"--{name} {getattr(args, name)}: has to be {least} or more")


def lists(out: Path, folds: int) -> list[Path]:
    return [out / f"fold_{fold + 1}" / name for fold in range(folds) for name in ("train.txt", "test.txt")]


def farthest(dataset: SegmentationDataset, pixels: np.ndarray, folds: Folds, fold: int) -> str:
    """The class whose share in a fold is farthest from that in all images, in words."""
    shown = [name for name, count in zip(dataset.row.classes, pixels.sum(0), strict=True) if count]
    total = np.zeros((len(folds.fold), pixels.shape[1]))
    np.add.at(total, folds.block, pixels)
    apart = deviation(total, folds.fold, folds.count)[fold]
    k = int(apart.argmax())
    return f"farthest from its share in all is {shown[k]}, by a factor of {np.exp(apart[k]):.2f}"


def write_blocks(path: Path, names: list[str], folds: Folds) -> None:
    """Image, block, fold, a line each."""
    with replacing(path) as draft, draft.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["image", "block", "fold"])
        writer.writerows((name, b + 1, folds.fold[b] + 1) for name, b in zip(names, folds.block.tolist(), strict=True))


if __name__ == "__main__":
    cli.run(main)
