"""A smaller copy of a data set: `python scripts/shrink_dataset.py camvid --out datasets/camvid_half [--factor 2]`.

The copy has the same layout and file names, so it is used by `root` alone. Images are averaged over factor × factor
pixels, labels keep the nearest value and their own kind of file. What is there already is kept.
"""

import argparse
import os
from functools import partial
from pathlib import Path

from PIL import Image

from common import cli, console
from common.config import SourceConfig
from common.data import SegmentationDataset
from common.data.decoding import decoding
from common.data.labels import read_index
from common.data.loading import parallel
from common.files import replacing


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset")
    parser.add_argument("--root", help="where it lies; default: below LTS_DATA")
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--factor", type=int, default=2)
    parser.add_argument("--split", nargs="+", default=["train", "val"])
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    cli.add_quiet(parser)
    args = parser.parse_args()
    if args.factor < 2:
        raise ValueError(f"--factor: {args.factor} does not shrink; give 2 or more")
    work = [job for split in args.split for job in jobs(args.dataset, args.root, split, args.out)]
    done = parallel(partial(shrink, factor=args.factor), work, args.workers)
    made = sum(console.bar(done, what="shrinking", total=len(work), unit="file"))
    print(f"{len(work)} files in {args.out} ({made} new)")


def jobs(dataset: str, root: str | None, split: str, out: Path) -> list[tuple[Path, Path, bool]]:
    """Source, copy, and whether it is a label, of every file of a split."""
    data = SegmentationDataset(SourceConfig(dataset=dataset, root=root, split=split, labels=False))
    if out.resolve() == data.root.resolve():
        raise ValueError(f"--out: {out} is the data set itself; give another folder")
    files = [(file, i == 1) for record in data.records for i, file in enumerate((record.image, record.label)) if file]
    return [(file, out / file.relative_to(data.root), is_label) for file, is_label in files]


def check_copy(copy: Path, source: Path, factor: int) -> None:
    """ValueError where a copy that is there already has not the size that it would get: it is of another call."""
    try:
        with Image.open(source) as whole, Image.open(copy) as small:
            expected, found = (whole.width // factor, whole.height // factor), small.size
    except OSError as error:
        raise ValueError(f"{copy}: there already, and cannot be compared with {source} ({error})") from error
    if found != expected:
        raise ValueError(
            f"{copy}: there already with {found[0]}×{found[1]} pixels, --factor {factor} gives {expected[0]}×"
            f"{expected[1]}; remove that folder, or give another --out"
        )


def shrink(job: tuple[Path, Path, bool], factor: int) -> bool:
    """Write one copy; False where it is there. ValueError names a file that cannot be read or is too small."""
    source, copy, is_label = job
    if copy.exists():
        check_copy(copy, source, factor)
        return False

    picture, kind = _opened(source, is_label)
    width, height = picture.width // factor, picture.height // factor
    if min(width, height) < 1:
        raise ValueError(f"{source}: {picture.width}×{picture.height} pixels are too few for --factor {factor}")
    how = Image.Resampling.NEAREST if is_label else Image.Resampling.BOX
    small = picture.resize((width, height), how, box=(0, 0, width * factor, height * factor))

    copy.parent.mkdir(parents=True, exist_ok=True)
    with replacing(copy, sync=False) as draft:
        small.save(draft, format=kind, **({"quality": 95} if kind == "JPEG" else {}))
    return True


def _opened(source: Path, is_label: bool) -> tuple[Image.Image, str]:
    """The picture, and the format of its file. Labels keep their stored values, which Pillow cuts or stretches where
    they have 16 bits and several channels, or fewer than 8 bits; only a palette is kept as it is."""
    with decoding(source, "label" if is_label else "image"), Image.open(source) as picture:
        picture.load()
        kind = picture.format
    if is_label and picture.mode != "P":
        return Image.fromarray(read_index(source)), kind
    return picture, kind


if __name__ == "__main__":
    cli.run(main)
