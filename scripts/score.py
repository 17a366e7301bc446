"""Score predictions in files, anyone's: `python scripts/score.py PREDICTIONS [LABELS] --config CONFIG [key=value …]`.

PREDICTIONS is a folder of PNG files. The classes and what label values mean are those of the config's validation set,
of `--dataset NAME`, or with `--classes N` ids from 0 and 255 where there is none. Labels are the files of the folder
LABELS; without it those of the data set, by the names of its images. Files are paired by their paths in the folders, or
their names alone where these are unique in both, less the suffix and the endings that are given.

Prints the table, and writes evaluation.json and per_image.npz (the matrix of every image, unless these are too many) to
--output, which then is something that scripts/compare.py and scripts/report.py take for a run.
"""

import argparse
from dataclasses import replace
from pathlib import Path

from common import cli
from common.config import Config, EvalConfig, SourceConfig, load_config
from common.data import SegmentationDataset
from common.data.catalogue.registry import row_of
from common.data.groups import grouping, groups_config
from common.evaluation import format_table
from common.evaluation.per_image import FILE as PER_IMAGE
from common.evaluation.per_image import fits
from common.evaluation.score_files import VALUES, FilePairs, pair_dataset, pair_folders, plain_row, score_files
from common.files import refuse_to_overwrite, write_json
from common.metrics import CONVENTIONS


def main() -> None:
    args, overrides = parse()
    cfg = load_config(args.config, overrides) if args.config else None
    out = Path(args.output or Path(args.predictions) / "scores")
    refuse_to_overwrite([out / "evaluation.json", out / PER_IMAGE], args.force)

    evaluation = settings(args, cfg)
    pairs = paired(args, cfg, evaluation)
    if pairs.unlabelled:
        print(f"{pairs.unlabelled} predictions have no label and are not scored")

    groups = grouping(groups_config(cfg.data.groups if cfg else None, pairs.row), pairs.row, None)
    levels = groups.levels if groups else None
    kept = out / PER_IMAGE if fits(len(pairs), pairs.row.num_classes) else None
    if kept is None:
        print(f"{len(pairs)} images of {pairs.row.num_classes} classes are too many for {PER_IMAGE}: it is not written")
    result = score_files(pairs, evaluation, values=args.values, groups=levels, per_image=kept)
    result |= {"predictions": args.predictions} | ({"group_rule": groups.rule} if groups else {})

    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "evaluation.json", result)
    print(format_table(result))
    print(f"scores written to {out}")


def parse() -> tuple[argparse.Namespace, list[str]]:
    """The arguments, and the words that change the config."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("predictions", help="folder of PNG files")
    parser.add_argument("words", nargs="*", metavar="LABELS|KEY=VALUE", help="a folder, and values of the config")
    parser.add_argument("--config", metavar="FILE", help="take classes, label values and settings of this config")
    parser.add_argument("--dataset", metavar="NAME", help="a row of DATASETS, such as cityscapes")
    parser.add_argument("--classes", type=int, metavar="N", help="class ids from 0 to N-1, 255 where there is none")
    parser.add_argument("--split", default="val", help="of --dataset, without LABELS (default val)")
    parser.add_argument("--values", choices=VALUES, default="saved", help="what the predictions hold (default: saved)")
    parser.add_argument("--prediction-end", default="", metavar="END", help="ending of the predictions' names")
    parser.add_argument("--label-end", default="", metavar="END", help="ending of the names of LABELS")
    parser.add_argument("--convention", choices=CONVENTIONS, help="default: the config's, else nan_mean")
    parser.add_argument("--boundary", type=int, metavar="PIXELS", help="also IoU and boundary F that forgive so many")
    parser.add_argument("--output", metavar="DIR", help="default: PREDICTIONS/scores")
    cli.add_force(parser)
    cli.add_quiet(parser)
    args = parser.parse_intermixed_args()

    words, overrides = cli.split_overrides(args.words)
    if sum(value is not None for value in (args.config, args.dataset, args.classes)) != 1:
        raise ValueError("give one of --config FILE, --dataset NAME and --classes N: what label values mean")
    if len(words) > 1 or (overrides and not args.config):
        raise ValueError(f"{' '.join(args.words)}: give one folder of labels, and key=value with --config alone")
    if args.classes is not None and (args.classes < 1 or not words):
        raise ValueError(f"--classes {args.classes}: give 1 or more, and the folder of the labels")

    if args.boundary is not None and not 0 <= args.boundary <= 32:
        raise ValueError(f"--boundary {args.boundary}: give 0 to 32 pixels")

    args.labels = words[0] if words else None
    return args, overrides


def settings(args: argparse.Namespace, cfg: Config | None) -> EvalConfig:
    """How to score: the config's way, with what the arguments change."""
    given = {"convention": args.convention, "boundary": args.boundary}
    changes = {key: value for key, value in given.items() if value is not None}
    return replace(cfg.eval if cfg else EvalConfig(), **changes)


def paired(args: argparse.Namespace, cfg: Config | None, evaluation: EvalConfig) -> FilePairs:
    """The files to compare."""
    if args.classes is not None:
        row = plain_row(args.classes)
        return pair_folders(args.predictions, args.labels, row, args.prediction_end, args.label_end)

    source = cfg.data.val if cfg else SourceConfig(dataset=args.dataset, split=args.split)
    if args.labels is None:
        return pair_dataset(args.predictions, SegmentationDataset(source), evaluation, args.prediction_end)
    return pair_folders(args.predictions, args.labels, row_of(source), args.prediction_end, args.label_end)


if __name__ == "__main__":
    cli.run(main)
