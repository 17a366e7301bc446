"""What the preparation scripts share: where the sets lie, parallel jobs, whole files or none, links, checks.

Every step skips what is there already, so a script may be stopped and started again. A job is (sources …, targets …);
its function writes the targets and raises a ValueError that names a file.
"""

import argparse
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from common import console
from common.config import SourceConfig
from common.data import DATASETS, SegmentationDataset, Statistics, check, class_statistics
from common.data.catalogue.layouts import files
from common.data.catalogue.lists import read_list
from common.data.catalogue.registry import home
from common.data.catalogue.row import DatasetRow
from common.data.imbalance import gini
from common.data.loading import parallel
from common.files import remove_drafts, replacing

EXPECTED = {  # images with a label
    "ade20k": {"train": 20210, "val": 2000},
    "ade20k_full": {"train": 25574, "val": 2000},
    "coco_stuff_118k": {"train": 118287, "val": 5000},
    "coco_stuff_lt_40k": {"train": 40679, "val": 5000},
    "mhpv2_15k": {"train": 15403, "val": 5000},
    "mhpv2_lt_7k": {"train": 6931, "val": 5000},
}
_SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
_FORMATS = {".png": "PNG", ".tif": "TIFF", ".jpg": "JPEG"}


def folder(name: str) -> Path:
    """Where a row's data set lies or will lie: $DETECTRON2_DATASETS/<folder>, else ./datasets/<folder>."""
    return home(DATASETS[name])[0]


def parse(description: str) -> None:
    """Answer --help; ends with exit code 2 for any other argument, since a preparation has none."""
    formatter = argparse.RawDescriptionHelpFormatter
    argparse.ArgumentParser(description=description, formatter_class=formatter).parse_args()


def begin(name: str) -> Path:
    """`folder`, without what killed preparations left unfinished there: a set is prepared by one process at a time."""
    base = folder(name)
    remove_drafts(base, deep=True)
    return base


def listing(path: Path, suffix: str) -> list[Path]:
    """The files of a folder with this suffix, sorted. ValueError where there is none."""
    return files(path, (suffix,), f"{suffix} files")


def run(
    function: Callable[[Any], None], jobs: Sequence[Any], what: str, workers: int | None = None
) -> None:
    """`function(job)` for all jobs in parallel processes (None: one a core), with a progress bar on a terminal."""
    workers = min(os.cpu_count() or 1 if workers is None else workers, len(jobs))
    for _ in console.bar(
        parallel(function, jobs, workers), what=what, total=len(jobs), unit="file"
    ):
        pass


def convert_labels(
    name: str, sources: str, targets: str, function: Callable[[tuple[Path, Path]], None]
) -> None:
    """`function((source, target))` for every label of the set `name`: the .png files of all splits below the folder
    `sources` of the set, written below its folder `targets`; then `verify`. ValueError names what is missing."""
    base = begin(name)
    splits = DATASETS[name].layout.splits.values()
    labels = [path for split in splits for path in listing(base / sources / split, ".png")]
    run(
        function,
        [(path, base / targets / path.parent.name / path.name) for path in labels],
        f"{name} labels",
    )
    verify(name)


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A draft beside `path` to write to; it takes the place of `path` when all went well."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path, sync=False) as draft:
        yield draft


def save(array: np.ndarray, path: Path, **options) -> None:
    """An image or label file, by its suffix, whole or not at all."""
    with whole(path) as temporary:
        Image.fromarray(array).save(temporary, _FORMATS[path.suffix], **options)


def place(source: Path, target: Path) -> None:
    """`target` becomes a hard link to the file `source`, or a copy where links are not possible."""
    if target.exists():
        return
    with whole(target) as temporary:
        try:
            # of a link its file, which is there from every folder
            os.link(source.resolve(), temporary)
        except OSError:
            shutil.copyfile(source, temporary)


def place_all(job: tuple[Sequence[Path], Sequence[Path]]) -> None:
    """`place` for each pair of a job (sources, targets). ValueError names a source that is missing."""
    for source, target in zip(*job, strict=True):
        if not source.is_file():
            raise ValueError(
                f"{source}: no such file; is the set that it belongs to prepared, and the list right?"
            )
        place(source, target)


def link(source: Path, target: Path) -> None:
    """The folder `target` becomes a link to the folder `source`, or a copy where links are not possible. A folder that
    is there gets the files that it lacks. ValueError where `source` is missing or `target` leads elsewhere."""
    if not source.is_dir():
        raise ValueError(
            f"{source}: no such folder; {target} is to be a link to it, prepare that data set first"
        )

    if target.is_symlink():
        if target.resolve() != source.resolve():
            raise ValueError(
                f"{target}: is a link to {os.readlink(target)}, not to {source}; remove it"
            )
        return

    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            target.symlink_to(
                os.path.relpath(source.resolve(), target.parent.resolve()),
                target_is_directory=True,
            )
            return
        except OSError:
            pass  # a file system without links: copy

    for path in sorted(source.iterdir()):
        place(path, target / path.name)


def verify(name: str, expected: Mapping[str, int] | None = None) -> None:
    """Every split pairs all its images with labels, and has the expected number of them; says what it found."""
    wrong = []
    for split, count in (expected or EXPECTED[name]).items():
        dataset = SegmentationDataset(
            SourceConfig(dataset=name, root=str(folder(name)), split=split)
        )
        check(dataset)
        print(f"{name} {split}: {len(dataset)} images with labels, expected {count}")
        if len(dataset) != count:
            wrong.append(f"{split} has {len(dataset)} images with labels, expected {count}")

    if wrong:
        raise ValueError(f"{folder(name)}: {'; '.join(wrong)}; is the download complete?")


def compare(name: str) -> None:
    """Prints how the training set's class counts compare with the published ones, and its Gini coefficients."""
    row, statistics = counted(name)
    found = statistics.image_count
    published = np.array(row.published.image_count)
    image, pixel = (gini(statistics.count(level)) for level in ("image", "pixel"))
    print(f"{name}: Gini coefficient {image:.4f} at image level, {pixel:.4f} at pixel level")
    print(
        f"{name}: {(found == published).sum()} of {len(found)} classes have the published number of images"
    )
    apart = np.argsort(-np.abs(found - published), kind="stable")[:5]

    for k in apart[found[apart] != published[apart]]:
        print(f"  {row.classes[k]}: {found[k]} images, published {published[k]}")


def compare_with_subset(name: str, subset: str) -> None:
    """Prints which classes fewer training images of a set show than the published counts of a subset of it."""
    row, statistics = counted(name)
    found = statistics.image_count
    least = np.array(DATASETS[subset].published.image_count)
    enough = (found >= least).sum()
    print(
        f"{name}: {enough} of {len(found)} classes have at least the images of the published {subset}, expected all"
    )

    for k in np.argsort(found - least, kind="stable")[: min(5, len(found) - enough)]:
        print(f"  {row.classes[k]}: {found[k]} images, at least {least[k]} expected")


def counted(name: str) -> tuple[DatasetRow, Statistics]:
    """The row (with the names that the set's files bring) and the statistics of a training set, kept in its folder."""
    dataset = SegmentationDataset(SourceConfig(dataset=name, root=str(folder(name))))
    workers = min(os.cpu_count() or 1, 1 + len(dataset) // 64)
    return dataset.row, class_statistics(dataset, workers, folder(name) / ".cache")


def sample_subset(name: str, whole_set: str, list_file: str) -> None:
    """A long-tailed set from its list: training files of the listed images, validation folders as links."""
    base = begin(name)
    source = folder(whole_set)
    path = base / list_file
    if not path.is_file():
        count = EXPECTED[name]["train"]
        published = gini(np.array(DATASETS[name].published.image_count))
        script = os.path.relpath(_SCRIPTS / "make_longtail.py")
        raise ValueError(
            f"{path}: no such list (one image name per line); the authors' list is not public, make one: "
            f"python {script} {whole_set} --images {count} --gini {published:.3f} --out {path}"
        )

    records = DATASETS[whole_set].layout(source, "train", read_list(path))
    unlabelled = [record.name for record in records if record.label is None]
    if unlabelled:
        raise ValueError(
            f"{source}: image {unlabelled[0]!r} of {path} has no label; is that set prepared?"
        )

    if len(records) != EXPECTED[name]["train"]:
        print(
            f"{path}: lists {len(records)} images, the published set has {EXPECTED[name]['train']}"
        )

    layout = DATASETS[name].layout
    train, val = (layout.splits.get(split, split) for split in ("train", "val"))
    folders = [base / kind / train for kind in ("images", "annotations")]
    jobs = [
        (
            (record.image, record.label),
            [target / file.name for target, file in zip(folders, record[1:], strict=True)],
        )
        for record in records
    ]
    run(place_all, jobs, name)

    for kind in ("images", "annotations"):
        link(source / kind / val, base / kind / val)

    verify(name, {"train": len(records), "val": EXPECTED[name]["val"]})
    compare(name)
