"""Train or evaluate: `python train_net.py CONFIG [--num-gpus N] [--resume] [KEY VALUE | key=value …]`.

    train_net.py CONFIG                                  train; --resume resumes from the newest checkpoint
    train_net.py [CONFIG] --eval-only --checkpoint CKPT  scores into <run>/inference/; --tta: also with augmentation
    train_net.py CONFIG --eval-only --resume             the same of the run's newest checkpoint

The release's words are --config-file CONFIG, MODEL.WEIGHTS CKPT and TEST.AUG.ENABLED True.

<run>/inference/ holds the newest evaluation; those of every checkpoint and setting stay in <run>/test/.

Keys are this project's (optim.lr=1e-4) or detectron2's (SOLVER.BASE_LR 1e-4). --num-gpus starts that many processes,
on a machine without GPUs CPU ones; torchrun does as well.
"""

import argparse
import warnings
from dataclasses import replace
from functools import partial
from pathlib import Path

from common import cli, distributed
from common.config import Config, ConfigError, EvalConfig
from common.engine import fit, prepare, rehearse
from common.engine.runtime import arranged, use_tf32
from common.evaluation.folder import folder_of_test, kept_in, write_test
from common.evaluation.pictures import prediction_files
from common.experiment import Experiment, print_result
from common.files import refuse_to_overwrite
from common.models import load_model
from common.models.carried import carried_config
from ltss_benchmark import launch, results
from ltss_benchmark.detectron2_keys import changed_config, read_config
from ltss_benchmark.mask2former import STREAM
from ltss_benchmark.methods import build_method, check_options

HERE = Path(__file__).resolve().parent


def main(words: list[str] | None = None) -> int:
    args = parse(words)
    launch.check(args)
    if launch.needed(args.num_gpus, args.num_machines):
        # by one process, which also counts labels
        ready(open_config(args), args, args.num_gpus * args.num_machines)
        return launch.start(work, args)

    work(args)

    return 0


def parse(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--config-file",
        "--config",
        "-c",
        metavar="CONFIG",
        help="also relative to this file's folder; or the first word",
    )
    parser.add_argument(
        "--resume", action="store_true", help="resume from the run's newest checkpoint"
    )
    parser.add_argument("--eval-only", action="store_true", help="evaluate --checkpoint")
    cli.add_checkpoint(parser)
    parser.add_argument(
        "--tta",
        action="store_true",
        help="with --eval-only: also with the benchmark's augmentation (TEST.AUG.ENABLED)",
    )
    parser.add_argument("--output", metavar="DIR", help="where runs lie: output=DIR")
    parser.add_argument(
        "--save-predictions",
        metavar="DIR",
        help="with --eval-only: write one PNG an image; with --tta those of the augmented evaluation",
    )
    parser.add_argument(
        "--save-rle",
        action="store_true",
        help="with --eval-only: the release's masks, as COCO's RLE, into <run>/inference/",
    )
    parser.add_argument(
        "--json",
        metavar="FILE",
        help="with --eval-only: scores go here, not into RUN/test/NAME/evaluation.json; of --tta the augmented ones",
    )
    cli.add_force(parser)
    parser.add_argument("--num-gpus", type=int, default=1, help="processes on this machine")
    parser.add_argument("--num-machines", type=int, default=1)
    parser.add_argument("--machine-rank", type=int, default=0, help="of this machine, from 0")
    parser.add_argument("--dist-url", default="auto", help="tcp://HOST:PORT of machine 0")
    cli.add_device(parser)
    parser.add_argument(
        "opts", nargs="*", default=[], metavar="CONFIG | KEY VALUE", help="or key=value"
    )
    cli.add_quiet(parser)
    args = parser.parse_intermixed_args(words)
    if args.config_file is None and args.opts and cli.is_config(args.opts[0]):
        args.config_file = args.opts.pop(0)
    if args.config_file is None and not (args.eval_only and args.checkpoint):
        parser.error("the following arguments are required: CONFIG (or --config-file CONFIG)")

    args.opts += ["MODEL.WEIGHTS", args.checkpoint] if args.checkpoint else []
    args.opts += ["TEST.AUG.ENABLED", "True"] if args.tta else []
    args.opts += [f"output={args.output}"] if args.output else []
    check_flags(parser, args)

    return args


def check_flags(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """End the program where a flag of an evaluation is given to a training."""
    for flag, given in (
        ("--save-predictions", args.save_predictions),
        ("--save-rle", args.save_rle),
        ("--json", args.json),
    ):
        if given and not args.eval_only:
            parser.error(
                f"{flag} belongs to --eval-only: training evaluates into its own folder"
            )


def open_config(args: argparse.Namespace) -> Config:
    if args.config_file is None:
        cfg = changed_config(partial(carried_config, args.checkpoint), args.opts, check_options)
    else:
        path = Path(args.config_file)
        beside = HERE / path
        file = beside if beside.is_file() and not path.exists() else path
        cfg = read_config(file, args.opts, check_options)

    if args.eval_only and cfg.model.reset_classifier:
        raise ConfigError(
            f"{cfg.name}: model.reset_classifier: --eval-only cannot score a new classifier; set it to false, and "
            "give a checkpoint with the config's classes"
        )

    return cfg


def work(args: argparse.Namespace) -> None:
    """What every rank does."""
    cfg = open_config(args)
    (evaluate_only if args.eval_only else train)(cfg, args)
    distributed.stop()


def ready(cfg: Config, args: argparse.Namespace, world: int) -> tuple[Config, Experiment]:
    """The config as `world` processes run it, and its data. What can be refused is refused here: ValueError."""
    if args.eval_only:
        weights = weights_of(cfg, args.resume)
        if not weights.exists():
            raise ValueError(f"{weights}: no such checkpoint")
        experiment = open_experiment(cfg, eval_only=True)
        files = prediction_files(args.save_predictions, experiment.val, cfg.eval)
        refuse_to_overwrite([*files, *filter(None, [args.json])], args.force)
        return cfg, experiment

    cfg = divided(replace(cfg, eval=plain(cfg.eval)), world)
    rehearse(cfg, build_method)
    return cfg, open_experiment(cfg, eval_only=False)


def open_experiment(cfg: Config, eval_only: bool) -> Experiment:
    """The data. Training labels are counted for training, and for groups that the data set itself does not define."""
    if not eval_only:
        return Experiment(cfg, counted=STREAM)

    experiment = Experiment(cfg, train=False)
    if experiment.levels() is None and results.is_long_tailed(cfg.eval.convention):
        return Experiment(cfg, counted=STREAM, train=False)

    return experiment


# Train --------------------------------------------------------------------------------------------------------------


def train(cfg: Config, args: argparse.Namespace) -> None:
    cfg, experiment = ready(cfg, args, distributed.world_size())
    device = distributed.start(args.device)
    experiment.begin(args.resume)
    method = prepare(cfg, build_method, experiment.context, device)
    validate = experiment.evaluator(method, device)
    fit(cfg, method, experiment.open, validate, device=device, resume=args.resume)
    result = experiment.last_result()
    print_result(result)
    results.print_groups(result)
    results.write_results(cfg.folder, result, experiment.val.row, experiment.levels())
    experiment.finish()


def plain(cfg: EvalConfig) -> EvalConfig:
    """Without test-time augmentation: as in the release, only --eval-only augments."""
    return replace(cfg, scales=(1.0,), flip=False)


def divided(cfg: Config, world: int) -> Config:
    """The batch divided over `train.devices`, or the next lower number that fits it and the processes started.

    The other number changes batch norm and the normaliser of the mask losses, so it is said. Raises ConfigError.
    """
    batch = cfg.data.streams[STREAM].batch_size
    stated = cfg.train.devices
    fitting = [n for n in range(1, max(stated, world) + 1) if batch % n == 0 and n % world == 0]
    if not fitting:
        raise ConfigError(
            f"{cfg.name}: {batch} images per step cannot be divided over {world} processes"
        )

    devices = fitting[-1]
    if devices != stated and distributed.rank() == 0:
        warnings.warn(
            f"train.devices: {devices} in place of {stated}, to divide {batch} images",
            stacklevel=2,
        )

    return replace(cfg, train=replace(cfg.train, devices=devices))


# Evaluate -----------------------------------------------------------------------------------------------------------


def evaluate_only(cfg: Config, args: argparse.Namespace) -> None:
    """Scores of a checkpoint: as they are, then, if the config asks for it, with test-time augmentation."""
    weights = weights_of(cfg, args.resume)
    cfg, experiment = ready(cfg, args, distributed.world_size())
    device = distributed.start(args.device)
    use_tf32(cfg.train, device)
    model = load_model(cfg.model, weights).to(device)
    model = arranged(model, cfg.train.channels_last, device)
    single = plain(cfg.eval)

    for options in [cfg.eval] if single == cfg.eval else [single, cfg.eval]:
        augmented = options != single
        tested = replace(cfg, eval=options)
        folder = folder_of_test(tested, experiment.val, weights)
        name = results.file_name(options.convention, "predictions")
        inference = results.inference_folder(cfg.folder, augmented)
        keep = results.Predictions(inference / name) if args.save_rle else None
        # the files of both would have the same names
        pictures, scores = (
            (args.save_predictions, args.json) if options is cfg.eval else (None, None)
        )

        outputs = {"save_predictions": pictures, "keep": keep, **kept_in(folder, scores)}
        result = experiment.score(model, device, weights, cfg=options, **outputs)
        result |= {"checkpoint": str(weights)}
        if keep is not None:
            keep.close()

        print_result(result)
        results.print_groups(result)
        write_test(folder, tested, result, scores)
        results.write_results(
            cfg.folder, result, experiment.val.row, experiment.levels(), augmented
        )


def weights_of(cfg: Config, resume: bool) -> Path:
    """The checkpoint to evaluate: with `resume` the run's newest if there is one. ConfigError where none is named."""
    newest = cfg.folder / "checkpoints" / "last"
    if resume and newest.exists():
        return newest
    if cfg.model.checkpoint:
        return Path(cfg.model.checkpoint)

    raise ConfigError(
        f"{cfg.name}: --eval-only needs MODEL.WEIGHTS FILE, or --resume and a run in {cfg.folder}"
    )


if __name__ == "__main__":
    cli.run(main)
