"""Which config a stage of a task has, and where its files lie."""

import argparse
from pathlib import Path

from common.config import Config, ConfigError, load_config

STAGES = ("warm_up", "stage1", "stage2", "stage3")
SOFT, HARD = "pseudo_soft", "pseudo_hard"
PROTOTYPES, DISTRIBUTION = "prototypes.pt", "class_distribution.npy"


def stage_parser(description: str | None, stage: str | None = None) -> argparse.ArgumentParser:
    """CONFIG [--stage STAGE] [--variant NAME] [--checkpoint FILE] [--device D] [key=value …]"""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", help="a task's folder, e.g. configs/gta5_to_cityscapes, or one stage's file")
    parser.add_argument("overrides", nargs="*", help="values to change, as section.key=value")
    parser.add_argument("--stage", choices=STAGES, default=stage, help="which file of the task's folder")
    parser.add_argument("--variant", default="", help="e.g. blv: the stage's file <stage>_blv.yaml")
    parser.add_argument("--device", help="cpu, cuda or cuda:N; default: a GPU where there is one")
    return parser


def stage_config(args: argparse.Namespace) -> Config:
    """The config that the arguments name. Raises ConfigError."""
    path = Path(args.config)
    if path.is_dir():
        if args.stage is None:
            raise ConfigError(f"{path}: a task has several stages; choose one by --stage {'|'.join(STAGES)}")
        path = path / f"{args.stage}{'_' + args.variant if args.variant else ''}.yaml"
    return load_config(path, args.overrides)
