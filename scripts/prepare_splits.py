"""Lists of labelled and unlabelled images: python scripts/prepare_splits.py CONFIG [key=value …] [--labelled N]
[--among LIST].

Writes those of the files that the config names in data.streams.{labeled,unlabeled}.list which do not exist. N is the
number that begins the name of the labelled list, or the name of its folder (366/labeled.txt), or the share that ends
that (1_16/labeled.txt, u2pl_1_16/labeled.txt; rounded as in the published lists: up, of ADE20K mostly down), unless it
is given. The training split, or the images of LIST alone, is put into one order that depends on the seed alone: first a
few images that together show every class, then the others at random. The labelled images are its first N, so the lists
of one seed are nested and every list shows every class. They are not the published ones.

Four published lists follow a rule, which makes them unless --labelled, --among or --seed is given: pascal/1_16, 1_8 and
1_4 of VOC are every 16th, 8th and 4th image by name, pascal/1464 is VOC's own train.
"""

import argparse
import re
from dataclasses import replace
from pathlib import Path

import numpy as np

from common import cli
from common.config import Config, SourceConfig, load_config
from common.data import SegmentationDataset, class_statistics
from common.data.catalogue.layouts import Record, visible_files
from common.data.catalogue.lists import listed, write_list

# by images of a training split and share: published numbers that are not rounded up
PUBLISHED = {20_210: {32: 631, 16: 1263, 8: 2526, 4: 5052}}  # ADE20K


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cli.add_words(parser)
    parser.add_argument("--labelled", type=int, metavar="N", help="number of labelled images")
    parser.add_argument("--among", metavar="LIST", help="list of the images to divide; default: the whole split")
    parser.add_argument("--seed", type=int, help="of the order; default: 0")
    args = cli.parse(parser)
    cfg = load_config(args.config, args.overrides)
    labelled, unlabelled = (list_of(cfg, name) for name in ("labeled", "unlabeled"))
    if labelled.exists():
        print(f"{labelled}: there already")
    if labelled.exists() and (unlabelled is None or unlabelled.exists()):
        return
    # where the labelled images are chosen already, the others need no label
    dataset = whole(cfg.data.streams["labeled"], args.among, labels=not labelled.exists())
    if labelled.exists():
        chosen = SegmentationDataset(replace(dataset.source, list=str(labelled), labels=True)).records
    else:
        ruled = all(given is None for given in (args.labelled, args.among, args.seed))
        chosen = by_rule(dataset, labelled, cfg) if ruled else None
        if chosen is None:
            seed = args.seed or 0
            chosen = first(dataset, args.labelled or number(labelled, len(dataset)), seed, cfg)
            print(f"{labelled}: drawn with seed {seed}, these are not the images of a published list")
        write(labelled, chosen)

    if unlabelled is not None and not unlabelled.exists():
        taken = {record.name for record in chosen}
        write(unlabelled, [record for record in dataset.records if record.name not in taken])


def list_of(cfg: Config, stream: str) -> Path | None:
    """The stream's list. ValueError where the labelled stream has none."""
    config = cfg.data.streams.get(stream)
    if config is not None and config.list is not None:
        return Path(config.list)
    if stream == "labeled":
        raise ValueError(f"{cfg.name}: data.streams.labeled.list names no file")
    return None


def number(path: Path, images: int) -> int:
    """The number of labelled images, of so many, that a list is named after."""
    match = re.match(r"\d+", path.name) or re.fullmatch(r"\d+", path.parent.name)
    if match:
        return int(match[0])

    share = re.search(r"(?:^|_)1_([1-9]\d*)$", path.parent.name)
    if not share:
        raise ValueError(f"{path}: neither file nor folder is named after the number of images; give --labelled")

    part = int(share[1])
    return PUBLISHED.get(images, {}).get(part) or -(-images // part)


def whole(source: SourceConfig, among: str | None = None, labels: bool = True) -> SegmentationDataset:
    """The images to divide: those of the list `among`, or all of the training split. VOC without a list of train_aug:
    all labelled ones that are not in val. labels: whether each of them has to have one."""
    plain = replace(source, list=among, maps={}, labels=labels)
    try:
        return SegmentationDataset(plain)
    except ValueError:
        if plain.dataset != "voc" or among is not None:
            raise
    dataset = SegmentationDataset(replace(plain, split="val"))
    folder, held_out = dataset.records[0].label.parent, set(dataset.names)
    names = sorted(path.stem for path in visible_files(folder, (".png",)) if path.stem not in held_out)
    if not names:
        raise ValueError(f"{folder}: no labels besides those of the val split")
    dataset.names, dataset.records = names, dataset.row.layout(dataset.root, "train", names)
    return dataset


def by_rule(dataset: SegmentationDataset, path: Path, cfg: Config) -> list[Record] | None:
    """The images of a published list that a rule gives, sorted by name; None where `path` names no such list."""
    name = path.parent.name
    if dataset.row.name != "voc" or path.parent.parent.name != "pascal":
        return None

    records = sorted(dataset.records, key=lambda record: record.name)
    if share := re.fullmatch(r"1_(16|8|4)", name):
        return records[:: int(share[1])]
    if name != "1464":
        return None

    source = cfg.data.streams["labeled"]
    clean = set(SegmentationDataset(replace(source, split="train", list=None, maps={}, labels=False)).names)
    chosen = [record for record in records if record.name in clean]
    check_number(len(chosen), len(dataset))

    return chosen


def check_number(count: int, images: int) -> None:
    """ValueError where so many labelled images leave none of all without a label, or there are none."""
    if not 0 < count < images:
        raise ValueError(f"{count} labelled images of {images}: take between 1 and {images - 1}")


def first(dataset: SegmentationDataset, count: int, seed: int, cfg: Config) -> list[Record]:
    """The first `count` images of the seed's order, sorted by name."""
    check_number(count, len(dataset))
    cache = Path(cfg.data.cache or Path(cfg.output) / ".cache")
    pixels = class_statistics(dataset, cfg.data.workers, cache).pixels
    ranking, needed = order(pixels, seed)
    if count < needed:
        raise ValueError(f"{count} labelled images cannot show every class; this seed needs {needed}")
    return sorted((dataset.records[i] for i in ranking[:count]), key=lambda record: record.name)


def order(pixels: np.ndarray, seed: int) -> tuple[list[int], int]:
    """An order of the images (rows of `pixels`, (N, C)), and how many of its first ones show every class that occurs.

    Class by class, rarest first, the first image of a random order joins that shows the class at its median size or
    larger, unless an earlier one does; then come all others in the random order.
    """
    shuffled = np.random.default_rng(seed).permutation(len(pixels))
    chosen: list[int] = []
    shown = (pixels > 0).sum(0)
    for c in np.argsort(shown, kind="stable"):
        if not shown[c]:
            continue
        enough = pixels[:, c] >= np.median(pixels[pixels[:, c] > 0, c])
        if not enough[chosen].any():
            chosen.append(next(int(i) for i in shuffled if enough[i]))
    others = set(range(len(pixels))) - set(chosen)
    return chosen + [int(i) for i in shuffled if i in others], len(chosen)


def write(path: Path, records: list[Record]) -> None:
    write_list(path, [listed(record.image) for record in records])
    print(f"{path}: {len(records)} images")


if __name__ == "__main__":
    cli.run(main)
