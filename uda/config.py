"""Which config a stage of a task has, and where its files lie."""

import argparse
from pathlib import Path

from common import cli
from common.config import Config, ConfigError, load_config
from common.models.carried import open_config

STAGES = ("warm_up", "stage1", "stage2", "stage3")
SOFT = "pseudo_soft"
HARD = "pseudo_hard"
PROTOTYPES = "prototypes.pt"
DISTRIBUTION = "class_distribution.npy"


def split_name(name: str) -> tuple[str | None, str]:
    """Stage and variant that a run is named after: ("stage1", "blv") for `stage1_blv`, (None, "") where it is not."""
    for stage in STAGES:
        if name == stage or name.startswith(f"{stage}_"):
            return stage, name[len(stage) + 1 :]
    return None, ""


def run_of(path: str | Path) -> tuple[str | None, str]:
    """Stage and variant of the run in whose folder `path` lies: the last one on the way that is named after a stage."""
    names = (split_name(folder) for folder in reversed(Path(path).parent.parts))
    return next((name for name in names if name[0] is not None), (None, ""))


def command(program: str, path: str | Path) -> str:
    """The program that makes the file `path`, with the --stage and --variant of its run."""
    stage, variant = run_of(path)
    return (
        program
        + (f" --stage {stage}" if stage else "")
        + (f" --variant {variant}" if variant else "")
    )


def stage_parser(description: str | None, stage: str | None = None) -> argparse.ArgumentParser:
    """CONFIG [--stage STAGE] [--variant NAME] and what every program has; `cli.parse` reads them.

    CONFIG is a task's folder, such as configs/gta5_to_cityscapes, or one stage's file.
    """
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--stage", choices=STAGES, default=stage, help="which file of the task's folder"
    )
    parser.add_argument(
        "--variant", default="", help="e.g. blv: the stage's file <stage>_blv.yaml"
    )
    cli.add_config(parser)

    return parser


def stage_config(args: argparse.Namespace) -> Config:
    """The config that the arguments name, else the one inside their checkpoint. Raises ConfigError."""
    if args.config is None:
        return open_config(None, args.checkpoint, args.overrides)

    path = Path(args.config)
    if path.is_dir():
        if args.stage is None:
            raise ConfigError(
                f"{path}: a task has several stages; choose one by --stage {'|'.join(STAGES)}"
            )
        path = path / f"{args.stage}{'_' + args.variant if args.variant else ''}.yaml"

    return load_config(path, args.overrides)
