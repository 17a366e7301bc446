"""Train, test, or export features: `python main.py --config configs/voc_1over32_usrn.json [section.key=value …]`.

    main.py CONFIG                                  train; --resume resumes from the run's newest checkpoint
    main.py [CONFIG] --test --checkpoint FILE       evaluate, write predictions and the report
    main.py [CONFIG] --save_feature [--checkpoint FILE]    features of the labelled images, for clustering.py

FILE is a checkpoint of ours (its config is inside: CONFIG is not needed) or an official .pth file; with CONFIG alone it
is the best one of the config's run. The release's words are --config CONFIG and --resume FILE.
Runs lie in saved/<name of the config>/.
"""

import argparse
import shlex
import sys
from dataclasses import replace
from pathlib import Path

import torch

from common import cli, distributed
from common.config import Config, ConfigError
from common.data import SegmentationDataset
from common.engine import fit, prepare, rehearse
from common.engine.runtime import arranged, use_tf32
from common.evaluation.folder import folder_of_test, kept_in, write_test
from common.evaluation.pictures import prediction_files
from common.experiment import Experiment, print_result
from common.files import refuse_to_overwrite
from common.models import load_model
from common.models.carried import best_of, open_config
from common.models.pretrained.containers import weight_file
from common.report import RunFolder, write_report
from common.steps import digest_of
from semi_sup.baseline import OF_USRN
from semi_sup.config import (
    build_method,
    labelled_source,
    resolve,
    say_mined,
    single_branch,
)
from semi_sup.features import export

NEWEST = "newest"


def main() -> None:
    args = parse(sys.argv[1:])
    cfg = open_config(args.config, args.checkpoint, args.overrides)
    if args.test and args.save_feature:
        raise ValueError("--test and --save_feature are two runs")
    for flag, given in (("--save-predictions", args.save_predictions), ("--json", args.json)):
        if given and not args.test:
            raise ValueError(f"{flag} belongs to --test: nothing else predicts images")

    if args.test or args.save_feature:
        args.checkpoint = args.checkpoint or best_of(cfg)
        (test if args.test else save_features)(cfg, args)
    else:
        train(cfg, args)

    distributed.stop()


def parse(words: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    switch = {"nargs": "?", "const": True, "default": False, "type": truth}
    cli.add_config(parser)
    cli.add_checkpoint(parser, default="of a test, the best one of the config's run")
    cli.add_evaluation(parser)
    cli.add_force(parser)
    parser.add_argument(
        "-r",
        "--resume",
        nargs="?",
        const=NEWEST,
        metavar="CKPT",
        help="go on from the run's newest checkpoint; CKPT: the release's word for --checkpoint",
    )
    parser.add_argument(
        "-t", "--test", **switch, help="evaluate (also --test True, --test False)"
    )
    parser.add_argument("-sf", "--save_feature", **switch, help="export features")
    args = parser.parse_intermixed_args(release_order(words))
    if args.resume not in (None, NEWEST):
        args.checkpoint = args.checkpoint or args.resume

    args.resume = args.resume is not None
    return cli.completed(parser, args)


def release_order(words: list[str]) -> list[str]:
    """Configs and overrides first: behind a switch they would be taken for its value."""
    flags = ("-c", "--config", "--config-file", "--json")
    first = [
        word
        for before, word in zip(["", *words], words, strict=False)
        if before not in flags
        and (cli.is_config(word) or ("=" in word and not word.startswith("-")))
    ]
    return first + [word for word in words if word not in first]


def truth(word: str) -> bool:
    """A switch's value, read for what it says."""
    values = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
    if word.lower() not in values:
        raise argparse.ArgumentTypeError(f"{word!r} is neither True nor False")
    return values[word.lower()]


# Train --------------------------------------------------------------------------------------------------------------


def train(cfg: Config, args: argparse.Namespace) -> None:
    if args.checkpoint is not None:
        check_resumed(cfg, Path(args.checkpoint))

    cfg = spread(resolve(cfg))
    say_mined(cfg)
    rehearse(cfg, build_method)
    experiment = Experiment(cfg, counted="labeled")  # scans labels, so before the ranks join
    device = distributed.start(args.device)
    experiment.begin(args.resume)
    method = prepare(cfg, build_method, experiment.context, device)
    validate = experiment.evaluator(method, device)
    fit(cfg, method, experiment.open, validate, device=device, resume=args.resume)
    print_result(experiment.last_result())
    experiment.finish()


def check_resumed(cfg: Config, path: Path) -> None:
    """A run resumes from its own newest checkpoint: ValueError for any other."""
    own = cfg.folder / "checkpoints" / "last"
    if not path.exists():
        raise ValueError(f"{path}: no such checkpoint")
    if weight_file(path).resolve() != weight_file(own).resolve():
        raise ValueError(
            f"{path}: training resumes from {own}; to start from other weights set model.checkpoint, "
            "to train elsewhere set name or output"
        )


def spread(cfg: Config) -> Config:
    """The batch divided over the processes that were started, unless the config divides it itself."""
    world = distributed.world_size()
    if cfg.train.devices == 1 and world > 1:
        return replace(cfg, train=replace(cfg.train, devices=world))
    return cfg


# With a trained network ---------------------------------------------------------------------------------------------


def open_network(cfg: Config, args: argparse.Namespace) -> tuple[torch.nn.Module, torch.device]:
    """The class branch of the checkpoint, in evaluation mode."""
    device = distributed.start(args.device)
    use_tf32(cfg.train, device)
    model = load_model(single_branch(cfg).model, args.checkpoint)
    return arranged(model.to(device), cfg.train.channels_last, device), device


def test(cfg: Config, args: argparse.Namespace) -> None:
    """Scores and panels in a folder of this test; in the run's the report and, without --save-predictions, `preds/`.
    With --json the scores alone, and predictions where --save-predictions asks for them."""
    cfg = cli.with_tta(cfg) if args.tta else cfg
    experiment = Experiment(cfg, train=False)  # needs no training data
    files = prediction_files(args.save_predictions, experiment.val, cfg.eval)
    refuse_to_overwrite([*files, *filter(None, [args.json])], args.force)
    model, device = open_network(cfg, args)

    folder = folder_of_test(cfg, experiment.val, args.checkpoint)
    pictures = args.save_predictions or (cfg.folder / "preds" if args.json is None else None)
    outputs = {"save_predictions": pictures, **kept_in(folder, args.json)}
    result = experiment.score(model, device, args.checkpoint, **outputs) | {
        "checkpoint": str(args.checkpoint)
    }
    print_result(result)
    write_test(folder, cfg, result, args.json)
    if distributed.rank() == 0 and args.json is None:
        report(cfg, folder)

    distributed.barrier()


def report(cfg: Config, folder: Path) -> None:
    """`report.html` of the run, with the scores and panels of the test in `folder`, and its config without a run's."""
    tested = RunFolder.load(folder)
    run = RunFolder.load(cfg.folder) if (cfg.folder / "config.yaml").exists() else tested
    missing = tuple(part for part in run.missing if part not in ("evaluation.json", "panels"))
    run = replace(run, evaluation=tested.evaluation, panels=tested.panels, missing=missing)
    command = shlex.join(["python", *sys.argv])
    print(f"wrote {write_report(cfg.folder / 'report.html', [run], command=command)}")


def save_features(cfg: Config, args: argparse.Namespace) -> None:
    """`features/` in the run's folder; one process. ConfigError for a network whose features are not clustered."""
    if cfg.model.name not in OF_USRN:
        raise ConfigError(
            f"{cfg.name}: model.name: {cfg.model.name!r} has no features for clustering.py, which reads those of "
            "USRN's baseline; take a checkpoint of that (model.name: deeplabv3plus)"
        )

    dataset = SegmentationDataset(replace(labelled_source(cfg), labels=False))
    model, device = open_network(cfg, args)
    folder = cfg.folder / "features"
    source = {"checkpoint": args.checkpoint, "digest": digest_of(args.checkpoint)}
    features = export(model, dataset, folder, device, cfg.data.workers, source)
    print(f"features of {len(dataset)} images, {len(features.rows)} cells, in {folder}")


if __name__ == "__main__":
    cli.run(main)
