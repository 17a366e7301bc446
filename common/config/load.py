"""Reading a config: a file over its `base:` parents, under dotted overrides, as a `Config`; and writing one."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml

from common.config.errors import ConfigError, shown
from common.config.layers import layers, merge, merged
from common.config.references import resolved, run_of
from common.config.schema import Config, DataConfig, SourceConfig
from common.config.text import parse
from common.config.typed import typed_section
from common.files import replacing

Source = TypeVar("Source", bound=SourceConfig)


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML or JSON config, merge it over its `base:`, apply `a.b=value` overrides, and type it.

    References to files of other steps, `run:STEP/FILE`, become paths (see `common.config.references`).
    Raises ConfigError (one line) for a missing file, an unknown key, a wrong type, a value out of its bounds, a key
    that stands twice, or a bad override.
    """
    path = Path(path)
    config = config_of(read_tree(path), overrides, path.name, path)
    return (
        config
        if config.name
        else dataclasses.replace(config, name=config.runs.get(path.stem, path.stem))
    )


def config_of(
    tree: dict[str, Any], overrides: Sequence[str], where: str, file: Path | None = None
) -> Config:
    """The config of a nested mapping, e.g. of a resolved one that a checkpoint carries; `where` begins the errors.

    file: where it was read, which says what its references to other steps mean.
    """
    for override in overrides:
        _override(tree, override)

    config = typed_section(Config, tree, where, prefix=f"{where}: ")
    config = _with_paths(config, where, file)
    return dataclasses.replace(config, data=_inherit(config.data))


def _with_paths(config: Config, where: str, file: Path | None) -> Config:
    """The config with paths in place of references to other steps."""

    def folder(step: str) -> Path:
        return Path(config.output) / run_of(step, file, config.runs)

    try:
        return resolved(config, folder)
    except (ValueError, OSError) as error:
        raise ConfigError(f"{where}: {error}") from error


def read_tree(path: Path) -> dict[str, Any]:
    """The nested mapping of a config file, merged over its `base:` parents (see `common.config.layers`)."""
    return merged(layers(path))


def _override(tree: dict[str, Any], override: str) -> None:
    """Apply `section.key=value` to the tree, in place; a value that is a mapping merges into the one that is there."""
    key, sign, text = override.partition("=")
    if not sign or not key:
        raise ConfigError(f"override {shown(override)} is not of the form section.key=value")

    *sections, last = key.split(".")

    for section in sections:
        tree = tree.setdefault(section, {})
        if not isinstance(tree, dict):
            raise ConfigError(
                f"override {shown(override)}: {shown(section)} holds a value, not a section"
            )

    try:
        value = parse(text) if text else None
    except ConfigError as error:
        raise ConfigError(f"override {shown(override)}: {error}") from error

    if isinstance(value, dict) and isinstance(tree.get(last), dict):
        value = merge(tree[last], value)

    tree[last] = value


def _inherit(data: DataConfig) -> DataConfig:
    """Streams and `val` take dataset, root and folder from `data` where they give no dataset of their own; what they
    say of `folder` themselves lies over that."""

    def complete(source: Source) -> Source:
        if source.dataset:
            return source
        root = data.root if source.root is None else source.root
        folder = source.folder or data.folder
        if source.folder and data.folder:
            folder = {**data.folder, **source.folder}
        return dataclasses.replace(source, dataset=data.dataset, root=root, folder=folder)

    streams = {name: complete(stream) for name, stream in data.streams.items()}
    return dataclasses.replace(data, streams=streams, val=complete(data.val))


def to_tree(config: Any) -> Any:
    """Plain mappings, lists and scalars of a dataclass, fit for YAML and JSON."""
    if dataclasses.is_dataclass(config):
        return {f.name: to_tree(getattr(config, f.name)) for f in dataclasses.fields(config)}
    if isinstance(config, Mapping):
        return {key: to_tree(value) for key, value in config.items()}
    return [to_tree(item) for item in config] if isinstance(config, list | tuple) else config


def save_config(config: Config, path: Path) -> None:
    """Write the resolved config; reading it again gives an equal one."""
    text = yaml.safe_dump(to_tree(config), sort_keys=False, width=120)
    with replacing(path) as draft:
        draft.write_text(text, encoding="utf-8")
