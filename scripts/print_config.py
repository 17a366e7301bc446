"""A config as it is run, and where its values come from: python scripts/print_config.py CONFIG [key=value …] [--given].

Printed is YAML that can be used as a config. Behind each value stands the file that gives it, `key=value` where the
command line does, `data` where a stream takes it from there, and nothing where it is the default. --given leaves the
defaults out.
"""

import argparse
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from common import cli
from common.config import load_config, to_tree
from common.config.layers import layers
from common.config.text import parse

COLUMN = 60  # where the sources begin
INHERITED = ("dataset", "root", "folder")  # what streams and `val` take from `data`


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config")
    parser.add_argument("overrides", nargs="*", default=[], help="section.key=value")
    parser.add_argument("--given", action="store_true", help="without the values that are defaults")
    args = parser.parse_intermixed_args()

    tree = to_tree(load_config(args.config, args.overrides))
    given = origins(args.config, args.overrides)
    for line in page(tree, given, args.given):
        print(line)


def origins(config: str, overrides: list[str]) -> dict[tuple[str, ...], str]:
    """Nested key → who gives it its value, of all that is no default."""
    found: dict[tuple[str, ...], str] = {}
    for layer in layers(Path(config)):
        name = os.path.relpath(layer.path)
        for key in leaves(layer.tree):
            _give(found, key, name)

    for override in overrides:
        key, _, text = override.partition("=")
        value = parse(text) if text else None
        for inner in leaves(value) if isinstance(value, dict) else [()]:
            _give(found, (*key.split("."), *inner), "key=value")

    return found


def _give(found: dict[tuple[str, ...], str], key: tuple[str, ...], by: str) -> None:
    """A value replaces those of the keys below it, and that of a section above."""
    for other in [other for other in found if other[: len(key)] == key or key[: len(other)] == other]:
        del found[other]
    found[key] = by


def leaves(tree: Mapping[str, Any], above: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """The keys of everything that is no section; an empty section counts as a value."""
    for key, value in tree.items():
        here = (*above, str(key))
        if isinstance(value, Mapping) and value:
            yield from leaves(value, here)
        else:
            yield here


def page(
    tree: Mapping[str, Any], given: Mapping[tuple[str, ...], str], only: bool, above: tuple[str, ...] = ()
) -> Iterator[str]:
    """The lines of a section. only: leave out what no one gives."""
    for key, value in tree.items():
        here = (*above, str(key))
        indent = "  " * len(above)
        if isinstance(value, Mapping) and value:
            below = list(page(value, given, only, here))
            if below:
                yield f"{indent}{_scalar(key)}:"
                yield from below
            continue

        source = source_of(here, value, given)
        if source or not only:
            line = f"{indent}{_scalar(key)}: {_scalar(value)}"
            yield f"{line:<{COLUMN}}  # {source}" if source else line


def source_of(key: tuple[str, ...], value: Any, given: Mapping[tuple[str, ...], str]) -> str:
    """Who gives a value, "" where it is the default."""
    above = [given[key[:n]] for n in range(len(key), 0, -1) if key[:n] in given]
    if above:
        return above[0]

    of_a_stream = key[:2] in (("data", "streams"), ("data", "val"))
    inherited = [name for name in INHERITED if name in key[2:] and ("data", name) in _sections(given)]
    return "data" if of_a_stream and inherited and value else ""


def _sections(given: Mapping[tuple[str, ...], str]) -> set[tuple[str, ...]]:
    """Every key that is given, and every section that one lies in."""
    return {key[:n] for key in given for n in range(1, len(key) + 1)}


def _scalar(value: Any) -> str:
    """A value in one line of YAML."""
    text = yaml.safe_dump(value, default_flow_style=True, width=10**6, allow_unicode=True)
    return text.removesuffix("\n").removesuffix("\n...")


if __name__ == "__main__":
    cli.run(main)
