"""The files that a config is made of: the parents that `base:` names, theirs, and the file itself.

`base:` is one file or a list in which later ones win. A parent is looked for beside the file that names it, then below
the project's own folder, so that a config anywhere may be built on `uda/configs/…`. A file that several others are
built on counts once, below them all.
"""

import os.path  # whose functions call a name that is too long no file, where those of Path fail
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from common.config.errors import ConfigError, shown
from common.config.text import parse
from common.files import PROJECT


class Layer(NamedTuple):
    """A file of a config: what it says itself, and the parents that it names."""

    path: Path
    tree: dict[str, Any]
    bases: tuple[Path, ...]


def layers(path: Path) -> list[Layer]:
    """The files of a config, lowest first; the last is `path`.

    Raises ConfigError for a file that cannot be read, one that is built on itself, and parents whose order
    contradicts another `base:`.
    """
    found: dict[Path, Layer] = {}
    _collect(_resolved(path), found, ())
    _check_order(found)
    return list(found.values())


def merged(files: Sequence[Layer]) -> dict[str, Any]:
    """The mapping that the files say together. ConfigError where a section of one is a plain value of another."""
    tree: dict[str, Any] = {}

    for k, layer in enumerate(files):
        key = _conflict(tree, layer.tree)
        if key is not None:
            other = next(below for below in reversed(files[:k]) if _has(below.tree, key))
            raise ConfigError(
                f"{layer.path}: {'.'.join(key)}: is a section here or in {other.path}, and a plain value in the other; "
                "write it in one way"
            )

        tree = merge(tree, layer.tree)

    return tree


def merge(base: dict[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`over` wins; mappings merge key by key, anything else (lists too) is replaced whole."""
    result = dict(base)
    for key, value in over.items():
        both = isinstance(value, Mapping) and isinstance(result.get(key), Mapping)
        result[key] = merge(result[key], value) if both else value

    return result


def _collect(path: Path, found: dict[Path, Layer], way: tuple[Path, ...]) -> None:
    """Add the file and all that it is built on, parents first. way: the files that led to it."""
    if path in way:
        by = " → ".join(str(file) for file in way[way.index(path) + 1 :])
        raise ConfigError(f"{path}: `base` leads back to itself{f' by {by}' if by else ''}")
    if path in found:
        return

    layer = _read(path, f"{way[-1]}: base: " if way else "")
    for base in layer.bases:
        _collect(base, found, (*way, path))

    found[path] = layer


def _check_order(found: Mapping[Path, Layer]) -> None:
    """Every `base:` list has its files in the order in which they are laid over each other."""
    place = {path: k for k, path in enumerate(found)}

    for layer in found.values():
        for lower, upper in zip(layer.bases, layer.bases[1:], strict=False):
            if place[lower] >= place[upper]:
                raise ConfigError(
                    f"{layer.path}: base: lists {lower.name} before {upper.name}, but {lower} lies over {upper} by "
                    "another `base`; list them in that order"
                )


def _read(path: Path, named_by: str) -> Layer:
    text = _text(path, named_by)
    kind = "JSON" if path.suffix == ".json" else "YAML"

    try:
        tree = parse(text, kind)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error

    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: a config is a mapping, not {type(tree).__name__}")

    names = _names(tree.pop("base", None), path)
    return Layer(path, tree, tuple(_parent(name, path) for name in names))


def _names(base: Any, path: Path) -> list[str]:
    """The parents as a file names them."""
    names = base if isinstance(base, list) else [] if base is None else [base]

    for k, name in enumerate(names):
        if not isinstance(name, str) or not name:
            raise ConfigError(
                f"{path}: base: expected the name of a config file or a list of them, got {shown(base)}"
            )
        if name in names[:k]:
            raise ConfigError(f"{path}: base: names {shown(name)} twice; keep one")

    return names


def _parent(name: str, path: Path) -> Path:
    """The file that the config `path` means by `name`: beside it, else in the project."""
    beside = _resolved(path.parent / name)
    inside = _resolved(PROJECT / name)
    return inside if os.path.isfile(inside) and not os.path.exists(beside) else beside


def _resolved(path: Path) -> Path:
    try:
        return Path(path).resolve()
    except (OSError, RuntimeError) as error:  # RuntimeError: links that lead in a circle
        raise ConfigError(
            f"{str(path)[:300]}: cannot read the config ({error.__class__.__name__})"
        ) from error


def _text(path: Path, named_by: str) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise ConfigError(
            f"{named_by}{str(path)[:300]}: cannot read the config ({error.strerror})"
        ) from error
    except UnicodeDecodeError as error:
        place = f"byte {error.start} is 0x{error.object[error.start]:02x}"
        raise ConfigError(
            f"{named_by}{path}: the config is not UTF-8 text ({place}); save it as UTF-8"
        ) from error


# Conflicts ------------------------------------------------------------------------------------------------------------


def _conflict(
    base: Mapping[str, Any], over: Mapping[str, Any], above: tuple[str, ...] = ()
) -> tuple[str, ...] | None:
    """The first key that is a section on one side and a plain value on the other; null takes a section away."""
    for key, value in over.items():
        other = base.get(key)
        here = (*above, key)
        if value is None or other is None:
            continue
        if isinstance(value, Mapping) != isinstance(other, Mapping):
            return here

        found = _conflict(other, value, here) if isinstance(value, Mapping) else None
        if found is not None:
            return found

    return None


def _has(tree: Any, key: Sequence[str]) -> bool:
    """Whether a mapping gives the nested `key` a value."""
    for name in key:
        if not isinstance(tree, Mapping) or tree.get(name) is None:
            return False
        tree = tree[name]

    return True
