"""What the command lines of the four systems share: arguments, one-line errors, exit codes."""

import argparse
import contextlib
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from common.config import Config, SourceConfig, load_config

PROJECT = ("common", "fully_sup", "semi_sup", "uda", "ltss_benchmark")  # whose log is shown


def run(main: Callable[[], int | None]) -> None:
    """Call `main` and exit with its code; bad input ends in one line and exit code 2.

    What the project logs goes to stderr, on rank 0. LTS_TRACEBACK=1 shows where an error came from.
    """
    warnings.showwarning = _one_line_warning
    try:
        with _shown_log():
            code = main()
    except (ValueError, OSError) as error:
        if os.environ.get("LTS_TRACEBACK"):
            raise
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
        code = 2
    sys.exit(code or 0)


@contextlib.contextmanager
def _shown_log() -> Iterator[None]:
    """Messages of the project's loggers, from INFO on, as plain lines; other libraries keep their own settings."""
    if os.environ.get("RANK", "0") != "0":
        yield
        return
    handler, loggers = logging.StreamHandler(), [logging.getLogger(name) for name in PROJECT]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.removeHandler(handler)
            logger.setLevel(level)


def _one_line_warning(message, category, filename, lineno, file=None, line=None) -> None:
    print(f"warning: {message}", file=sys.stderr)


def train_parser(description: str) -> argparse.ArgumentParser:
    """CONFIG [--resume] [key=value …]"""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("config", help="YAML or JSON config")
    parser.add_argument("overrides", nargs="*", help="values to change, as section.key=value")
    parser.add_argument("--resume", action="store_true", help="go on from the run's newest checkpoint")
    parser.add_argument("--device", help="cpu, cuda or cuda:N; default: a GPU where there is one")
    return parser


def add_source(parser: argparse.ArgumentParser) -> None:
    """[NAME] or --config FILE [--stream NAME] [key=value …], and [--root DIR] [--split NAME] [--list FILE].

    The parser's `parse_intermixed_args` reads them, `source` says what they name.
    """
    parser.add_argument("dataset", nargs="?", help="a row of DATASETS, such as cityscapes; not with --config")
    parser.add_argument("overrides", nargs="*", help="section.key=value, with --config")
    parser.add_argument("--config", metavar="FILE", help="take the data set of this config, `folder` ones too")
    parser.add_argument("--stream", help="which stream of the config (default: its first with labels)")
    parser.add_argument("--root", help="default: the folder of the row below its environment variable or ./datasets")
    parser.add_argument("--split", help="default: train, or the stream's")
    parser.add_argument("--list", metavar="FILE", help="only the images that it names")


def source(args: argparse.Namespace) -> SourceConfig:
    """What the arguments of `add_source` name. ValueError where they name nothing, or two things."""
    words, overrides = split_overrides([word for word in (args.dataset, *args.overrides) if word])
    if bool(words) == bool(args.config) or len(words) > 1 or (overrides and not args.config):
        raise ValueError("name one data set, such as camvid, or a --config with its overrides")
    chosen = _labelled(load_config(args.config, overrides), args.stream) if args.config else None
    chosen = chosen or SourceConfig(dataset=words[0])
    given = {"root": args.root, "split": args.split, "list": args.list}
    return replace(chosen, **{key: value for key, value in given.items() if value is not None})


def _labelled(cfg: Config, stream: str | None) -> SourceConfig:
    """The images and labels of a config's stream: of its first with labels where none is named."""
    labelled = [name for name, item in cfg.data.streams.items() if item.labels]
    name = stream or next(iter(labelled), None)
    if name not in cfg.data.streams:
        known = ", ".join(cfg.data.streams) or "none"
        raise ValueError(f"{cfg.name}: data.streams has no {name or 'stream with labels'!r}; streams: {known}")
    item = cfg.data.streams[name]
    return SourceConfig(dataset=item.dataset, root=item.root, split=item.split, list=item.list, folder=item.folder)


def split_overrides(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Separate key=value words from the others."""
    return [w for w in words if "=" not in w], [w for w in words if "=" in w]
