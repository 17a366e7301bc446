"""What the command lines of the four systems share: arguments, one-line errors, exit codes."""

import argparse
import os
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from common import console
from common.config import Config, SourceConfig, load_config

INTERRUPTED = 128 + signal.SIGINT


def run(main: Callable[[], int | None]) -> None:
    """Call `main` and exit with its code; whatever goes wrong is one line on stderr.

    Exit codes: 2 for what the user can fix (files, settings), 130 after Ctrl-C, 1 for the rest (memory, a dead
    process, a bug of ours). LTS_TRACEBACK=1 shows where an error came from, too.
    """
    with console.shown():
        code = _guarded(main)
    sys.exit(code)


def _guarded(main: Callable[[], int | None]) -> int:
    """`main`'s exit code, or that of the error which ended it."""
    try:
        return main() or 0
    except KeyboardInterrupt:
        return INTERRUPTED
    except Exception as error:
        return _say(error)


def _say(error: Exception) -> int:
    """Print the one line about an error; its exit code."""
    try:
        if os.environ.get("LTS_TRACEBACK"):
            traceback.print_exception(error)

        line, code = describe(error)
        print(f"error: {line}", file=sys.stderr, flush=True)
        return code
    except RuntimeError as cause:  # torch interrupts whatever runs when a loader process dies
        return _say(cause)


def describe(error: Exception) -> tuple[str, int]:
    """One line about an error, and the exit code that it means."""
    text = " ".join(str(error).split())
    kind = type(error).__name__  # names, so that no library is imported to tell its errors

    if isinstance(error, ValueError | OSError) or kind == "DecompressionBombError":
        return text, 2

    if (
        isinstance(error, MemoryError)
        or kind == "OutOfMemoryError"
        or "DefaultCPUAllocator" in text
    ):
        reason = text.split(" If reserved but", 1)[0]  # torch adds a page of general advice
        advice = "lower batch_size, the crop, or data.workers; or raise train.devices to take the batch in parts"
        return f"out of memory: {reason or 'no more to be had'}; {advice}", 1

    if text.startswith("DataLoader worker") or kind == "BrokenProcessPool":
        return (
            f"{text.rstrip('. ')}; killed processes are often out of memory: use fewer workers",
            1,
        )

    if kind.startswith("Dist") or "gloo" in text:
        rank = os.environ.get("RANK", "0")
        return f"rank {rank}: lost another rank, whose error is the cause ({text[:200]})", 1

    return (
        f"{kind}: {text} ({_place(error)}); this is a bug, LTS_TRACEBACK=1 shows the traceback for a report",
        1,
    )


def _place(error: Exception) -> str:
    """File and line that raised an error."""
    if getattr(error, "__notes__", None):  # its traceback in another process
        return "in a loader process"
    frames = traceback.extract_tb(error.__traceback__)
    return (
        f"{os.path.basename(frames[-1].filename)}:{frames[-1].lineno}"
        if frames
        else "unknown place"
    )


def _quiet_interrupt(kind: type[BaseException], error: BaseException, trace: Any) -> None:
    """Ctrl-C before `run`, while libraries are imported, is no traceback either."""
    if not issubclass(kind, KeyboardInterrupt):
        sys.__excepthook__(kind, error, trace)


sys.excepthook = _quiet_interrupt


def train_parser(description: str) -> argparse.ArgumentParser:
    """CONFIG [--resume] [--output DIR] [--device D] [--quiet] [key=value …]; `parse` reads them."""
    parser = argparse.ArgumentParser(description=description)
    add_config(parser)
    parser.add_argument(
        "--resume", action="store_true", help="resume from the run's newest checkpoint"
    )
    return parser


# One grammar ----------------------------------------------------------------------------------------------------------

CONFIGS = (".yaml", ".yml", ".json")
SCALES = (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)  # of MMSegmentation's test-time augmentation


def add_config(parser: argparse.ArgumentParser) -> None:
    """What trains or evaluates: [CONFIG] [key=value …] [--output DIR] [--device D] [--quiet]. CONFIG may stand behind
    --config, too (detectron2's --config-file)."""
    add_words(parser)
    parser.add_argument("--output", metavar="DIR", help="where runs lie: output=DIR")
    add_device(parser)
    add_quiet(parser)


def add_model(
    parser: argparse.ArgumentParser, further: str = "", help_of_further: str = ""
) -> None:
    """What uses a trained network: [CONFIG] CHECKPOINT [further words …] [key=value …] [--quiet]."""
    names = ["CONFIG", "CHECKPOINT", *([further] if further else []), "KEY=VALUE"]
    add_words(
        parser, " | ".join(names), help_of_further or "a config, a checkpoint, values to change"
    )
    parser.set_defaults(rest=[] if further else None)
    add_checkpoint(parser)
    add_quiet(parser)


def add_words(
    parser: argparse.ArgumentParser,
    names: str = "CONFIG | KEY=VALUE",
    text: str = "a YAML or JSON config, and values to change: section.key=value",
) -> None:
    """CONFIG and key=value, alone or behind --config, for `parse`."""
    parser.add_argument("words", nargs="*", default=[], metavar=names, help=text)
    parser.add_argument("-c", "--config", "--config-file", metavar="FILE", help="the config")


def add_out(parser: argparse.ArgumentParser, kind: str, text: str) -> None:
    """--output PATH, of what makes one file or folder."""
    parser.add_argument("--output", "--out", dest="out", required=True, metavar=kind, help=text)


def add_checkpoint(parser: argparse.ArgumentParser, *aliases: str, default: str = "") -> None:
    """[CHECKPOINT], or --checkpoint FILE."""
    text = "ours (a run, its checkpoints/best, a .safetensors file; the config is inside) or an official file"
    parser.add_argument(
        "--checkpoint",
        *aliases,
        metavar="FILE",
        help=text + (f"; default: {default}" if default else ""),
    )


def add_evaluation(parser: argparse.ArgumentParser) -> None:
    """[--tta] [--save-predictions DIR] [--json FILE]"""
    parser.add_argument(
        "--tta", action="store_true", help="average six scales, each also mirrored"
    )
    parser.add_argument("--save-predictions", metavar="DIR", help="write one PNG an image")
    parser.add_argument(
        "--json", metavar="FILE", help="scores go here, not into RUN/test/NAME/evaluation.json"
    )


def add_device(parser: argparse.ArgumentParser) -> None:
    """[--device D]"""
    parser.add_argument(
        "--device", help="cpu, cuda or cuda:N; default: a GPU where there is one"
    )


def parse(
    parser: argparse.ArgumentParser, words: Sequence[str] | None = None
) -> argparse.Namespace:
    """The arguments of a parser with `add_config` or `add_model`: `config`, `checkpoint` where it has one, whether they
    stood alone or behind their option, `overrides` and `rest`. Ends the program where a word is missing or too many."""
    return completed(parser, parser.parse_intermixed_args(words))


def completed(parser: argparse.ArgumentParser, args: argparse.Namespace) -> argparse.Namespace:
    """`parse` of arguments that are read already."""
    args.overrides = [w for w in args.words if "=" in w and not Path(w).exists()]
    named = [word for word in args.words if word not in args.overrides]
    if getattr(args, "output", None):
        args.overrides.append(f"output={args.output}")

    if (
        named
        and args.config is None
        and (is_config(named[0]) or not hasattr(args, "checkpoint"))
    ):
        args.config = named.pop(0)
    if named and getattr(args, "checkpoint", "") is None:
        args.checkpoint = named.pop(0)
    if getattr(args, "rest", None) is not None:
        args.rest, named = named, []

    if named:
        parser.error(f"unrecognized arguments: {' '.join(named)}")
    if args.config is None and getattr(args, "checkpoint", None) is None:
        wanted = "CONFIG or CHECKPOINT" if hasattr(args, "checkpoint") else "CONFIG"
        parser.error(f"the following arguments are required: {wanted}")

    return args


def is_config(word: str) -> bool:
    """Whether a word names a config, or a task's folder of them, and no checkpoint or run."""
    path = Path(word)
    if path.is_dir():
        return any(path.glob("*.yaml")) and not (path / "config.yaml").exists()
    return path.suffix in CONFIGS


def with_tta(cfg: Config) -> Config:
    """The config with `--tta`."""
    return replace(cfg, eval=replace(cfg.eval, scales=SCALES, flip=True))


def add_quiet(parser: argparse.ArgumentParser) -> None:
    """[--quiet]: it takes effect while the arguments are read."""
    parser.add_argument(
        "--quiet", action=_Quiet, nargs=0, help="only results, warnings and errors"
    )


def add_force(parser: argparse.ArgumentParser) -> None:
    """[--force]: for `common.files.refuse_to_overwrite`."""
    parser.add_argument(
        "--force", action="store_true", help="replace files that are there already"
    )


class _Quiet(argparse.Action):
    def __call__(
        self, parser: Any, namespace: Any, values: Any, option: str | None = None
    ) -> None:
        console.silence()


def add_source(parser: argparse.ArgumentParser) -> None:
    """[NAME] or --config FILE [--stream NAME] [key=value …], and [--root DIR] [--split NAME] [--list FILE].

    The parser's `parse_intermixed_args` reads them, `source` says what they name.
    """
    parser.add_argument(
        "dataset", nargs="?", help="a row of DATASETS, such as cityscapes, or a config"
    )
    parser.add_argument(
        "overrides", nargs="*", default=[], help="section.key=value, with --config"
    )
    parser.add_argument(
        "-c",
        "--config",
        "--config-file",
        metavar="FILE",
        help="take the data set of this config, `folder` ones too",
    )
    parser.add_argument(
        "--stream", help="which stream of the config (default: its first with labels)"
    )
    parser.add_argument(
        "--root",
        help="default: the folder of the row below its environment variable or ./datasets",
    )
    parser.add_argument("--split", help="default: train, or the stream's")
    parser.add_argument("--list", metavar="FILE", help="only the images that it names")
    add_quiet(parser)


def source(args: argparse.Namespace) -> SourceConfig:
    """What the arguments of `add_source` name. ValueError where they name nothing, or two things."""
    words, overrides = _source_words(args)
    if bool(words) == bool(args.config) or len(words) > 1 or (overrides and not args.config):
        raise ValueError("name one data set, such as camvid, or a --config with its overrides")

    cfg = source_config(args)
    chosen = SourceConfig(dataset=words[0]) if cfg is None else _labelled(cfg, args.stream)
    given = {"root": args.root, "split": args.split, "list": args.list}

    return replace(chosen, **{key: value for key, value in given.items() if value is not None})


def source_config(args: argparse.Namespace) -> Config | None:
    """The config that the arguments of `add_source` name; None where they name a row."""
    _, overrides = _source_words(args)
    return load_config(args.config, overrides) if args.config else None


def _source_words(args: argparse.Namespace) -> tuple[list[str], list[str]]:
    """The words that name rows, and overrides; a config among them is taken as --config's."""
    words, overrides = split_overrides([w for w in (args.dataset, *args.overrides) if w])
    if args.config is None and words and is_config(words[0]):
        args.config, args.dataset = words.pop(0), None

    return words, overrides


def _labelled(cfg: Config, stream: str | None) -> SourceConfig:
    """The images and labels of a config's stream: of its first with labels where none is named."""
    item = cfg.data.streams[labelled_stream(cfg, stream)]
    return SourceConfig(
        dataset=item.dataset,
        root=item.root,
        split=item.split,
        list=item.list,
        folder=item.folder,
    )


def labelled_stream(cfg: Config, stream: str | None = None) -> str:
    """The name of a config's stream: of its first with labels where none is named. ValueError where there is none."""
    labelled = [name for name, item in cfg.data.streams.items() if item.labels]
    name = stream or next(iter(labelled), None)
    if name not in cfg.data.streams:
        known = ", ".join(cfg.data.streams) or "none"
        raise ValueError(
            f"{cfg.name}: data.streams has no {name or 'stream with labels'!r}; streams: {known}"
        )

    return name


def split_overrides(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Separate key=value words from the others."""
    return [w for w in words if "=" not in w], [w for w in words if "=" in w]
