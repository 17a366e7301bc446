"""From the text of a config to plain mappings, lists and scalars: YAML or JSON, of which neither can say a thing twice.

Whatever the text is, reading it ends within a second or two, in a tree of bounded size or in a ConfigError of one line.
"""

import json
import re
from collections.abc import Mapping
from typing import Any

import yaml

from common.config.errors import LARGEST, ConfigError, shown

LONGEST = 1 << 20  # characters of a config
# in a config, those that aliases repeat included: a palette of 32768 classes has 160 000
MOST_VALUES = 300_000
DEEPEST = 50  # levels of nesting

_TAG = "tag:yaml.org,2002:"
_PLAIN = {f"{_TAG}{name}" for name in ("null", "bool", "int", "float", "str")}
_MERGE = f"{_TAG}merge"


def parse(text: str, kind: str = "YAML") -> Any:
    """The tree of a text; `kind`: YAML or JSON. Keys become strings. Raises ConfigError, with the line if known."""
    if len(text) > LONGEST:
        raise ConfigError(f"{len(text)} characters; a config has at most {LONGEST}")

    tree = _parse_json(text) if kind == "JSON" else _parse_yaml(text)
    _check(tree)
    return tree


# YAML -----------------------------------------------------------------------------------------------------------------


# PyYAML may be built without the parser in C
_SafeLoader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class _Loader(_SafeLoader):
    """YAML's plain types, in which 1e-4 is a number (YAML 1.1 asks for a dot) and 2001-12-31 is text."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag in _PLAIN or tag == _MERGE]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    f"{_TAG}float",
    re.compile(r"^[-+]?(\d[\d_]*\.?[\d_]*|\.\d[\d_]*)[eE][-+]?\d+$"),
    list("-+.0123456789"),
)


def _parse_yaml(text: str) -> Any:
    try:
        _check_depth(text)  # the parser in C would follow any depth, and fall
        loader = _Loader(text)

        try:
            node = loader.get_single_node()
            if node is None:
                return None

            tree = _Tree(loader)
            tree.check_size(node)
            return tree.value(node)
        finally:
            loader.dispose()
    except (
        yaml.YAMLError,
        ValueError,
        OverflowError,
    ) as error:  # a ValueError: \UFFFFFFFF is no character
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"not valid YAML: {_one_line(error)}") from error


def _check_depth(text: str) -> None:
    depth = 0
    for event in yaml.parse(text, Loader=_Loader):
        depth += isinstance(event, yaml.CollectionStartEvent)
        depth -= isinstance(event, yaml.CollectionEndEvent)
        if depth > DEEPEST:
            line = "" if event.start_mark is None else f"line {event.start_mark.line + 1}: "
            raise ConfigError(f"{line}nested more than {DEEPEST} levels deep")


class _Tree:
    """Builds the tree of YAML's nodes. What an alias names is built anew, so that no two places share a mapping."""

    def __init__(self, loader: _Loader):
        self.loader = loader
        self.sizes: dict[int, int] = {}

    def check_size(self, node: yaml.Node, depth: int = 0) -> int:
        """How many values a node stands for, those that aliases repeat included; each node is looked at once.

        ConfigError for more than MOST_VALUES, so that none of them is built in vain.
        """
        _check_level(node, depth)
        if id(node) in self.sizes:
            return self.sizes[id(node)]

        parts: list[yaml.Node] = []
        if isinstance(node, yaml.MappingNode):
            parts = [value for _, value in node.value]
        elif isinstance(node, yaml.SequenceNode):
            parts = node.value

        size = 1 + sum(self.check_size(part, depth + 1) for part in parts)
        if size > MOST_VALUES:
            line = node.start_mark.line + 1
            raise ConfigError(
                f"line {line}: more than {MOST_VALUES} values, with those that aliases repeat"
            )

        self.sizes[id(node)] = size
        return size

    def value(self, node: yaml.Node, depth: int = 0) -> Any:
        _check_level(node, depth)
        if isinstance(node, yaml.MappingNode) and node.tag == f"{_TAG}map":
            return self.mapping(node, depth)
        if isinstance(node, yaml.SequenceNode) and node.tag == f"{_TAG}seq":
            return [self.value(item, depth + 1) for item in node.value]

        return self.scalar(node)

    def mapping(self, node: yaml.MappingNode, depth: int) -> dict[str, Any]:
        lines: dict[str, int] = {}
        own: dict[str, Any] = {}
        merged: dict[str, Any] = {}

        for key_node, value_node in node.value:
            line = key_node.start_mark.line + 1
            key = self.key(key_node)
            if key in lines:
                raise ConfigError(_repeated(key, lines[key], line))

            lines[key] = line
            value = self.value(value_node, depth + 1)
            if key_node.tag == _MERGE:
                merged = _merge_of(value, line)
            else:
                own[key] = value

        return merged | own

    def key(self, node: yaml.Node) -> str:
        return "<<" if node.tag == _MERGE else str(self.scalar(node))

    def scalar(self, node: yaml.Node) -> Any:
        line = node.start_mark.line + 1
        if node.tag in (f"{_TAG}map", f"{_TAG}seq"):
            raise ConfigError(f"line {line}: a key is no plain value")
        if node.tag not in _PLAIN or not isinstance(node, yaml.ScalarNode):
            raise ConfigError(f"line {line}: unknown tag {shown(node.tag)}")

        try:
            return self.loader.construct_object(node)
        except (ValueError, LookupError) as error:  # `!!bool zz`, an integer of 5000 digits
            kind = node.tag.removeprefix(_TAG)
            raise ConfigError(
                f"line {line}: {shown(node.value)} cannot be read as {kind}"
            ) from error


def _check_level(node: yaml.Node, depth: int) -> None:
    if depth > DEEPEST:
        line = node.start_mark.line + 1
        raise ConfigError(
            f"line {line}: nested more than {DEEPEST} levels deep, or an alias inside what it names"
        )


def _merge_of(value: Any, line: int) -> dict[str, Any]:
    """What `<<` brings: a mapping, or a list of them of which the first wins."""
    result: dict[str, Any] = {}
    for part in reversed(value if isinstance(value, list) else [value]):
        if not isinstance(part, dict):
            raise ConfigError(f"line {line}: `<<` takes a mapping, not {shown(part)}")
        result |= part

    return result


# JSON -----------------------------------------------------------------------------------------------------------------

_JSON_TOKEN = re.compile(r'"(?:[^"\\]|\\.)*"|[{}\[\],:]')


def _parse_json(text: str) -> Any:
    try:
        tree = json.loads(text)
    except RecursionError as error:
        raise ConfigError(f"nested more than {DEEPEST} levels deep") from error
    except ValueError as error:  # JSONDecodeError, or an integer of 5000 digits
        raise ConfigError(f"not valid JSON: {_one_line(error)}") from error

    _check_json_keys(text)
    return tree


def _check_json_keys(text: str) -> None:
    """ConfigError where two keys of one object are equal: `json` keeps the last. The text is valid JSON."""
    # the open ones: where each key stands; None for a list
    objects: list[dict[str, int] | None] = []
    previous = ""

    for token in _JSON_TOKEN.finditer(text):
        word = token.group()
        if word in "{[":
            objects.append({} if word == "{" else None)
        elif word in "}]":
            objects.pop()
        elif (
            word.startswith('"')
            and previous in ("{", ",")
            and objects
            and objects[-1] is not None
        ):
            key = json.loads(word)
            places = objects[-1]
            if key in places:
                lines = (
                    text.count("\n", 0, place) + 1 for place in (places[key], token.start())
                )
                raise ConfigError(_repeated(key, *lines))

            places[key] = token.start()

        previous = word


# Both -----------------------------------------------------------------------------------------------------------------


def _repeated(key: str, first: int, second: int) -> str:
    where = f"twice in line {first}" if first == second else f"in lines {first} and {second}"
    return f"key {shown(key)} stands {where}; keep one"


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= 300 else f"{text[:300]}…"


def _check(tree: Any, depth: int = 0) -> None:
    """ConfigError for what no key takes: other depths, integers and texts than files, folders and tensors have."""
    if depth > DEEPEST:
        raise ConfigError(f"nested more than {DEEPEST} levels deep")
    if isinstance(tree, Mapping):
        for key, value in tree.items():
            _check(key, depth + 1)
            _check(value, depth + 1)
    elif isinstance(tree, list):
        for value in tree:
            _check(value, depth + 1)
    elif isinstance(tree, str):
        _check_text(tree)
    elif isinstance(tree, int) and abs(tree) > LARGEST:
        raise ConfigError(f"{shown(tree)}: an integer beyond 64 bits")


def _check_text(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ConfigError(f"{shown(text)} holds half a character (a lone surrogate)") from error

    if "\0" in text:
        raise ConfigError(f"{shown(text)} holds a NUL character")
