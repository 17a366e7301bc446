"""Configurations: frozen dataclasses read from YAML or JSON, with one `base:` parent and dotted overrides.

`load_config` reads any config of the four systems. Sections that only one package understands (`method`,
`model.options`, a stream's `augment` and `sampler`) stay mappings here; their owner types them with `typed`,
so that every unknown key or wrong type gets the same one-line error.
"""

import dataclasses
import difflib
import json
import re
import types
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml


class ConfigError(ValueError):
    """A config that cannot be used; the message is one line that names the key, the value and the fix."""


@dataclass(frozen=True)
class SourceConfig:
    """Where samples come from. Empty fields of a stream are inherited from `data`."""

    dataset: str = ""  # a row of common.data.DATASETS, or "folder"
    root: str | None = None  # else $LTS_DATA/<folder of the row>, else ./datasets/<folder of the row>
    split: str = "train"
    list: str | None = None  # file with one image name a line; restricts the split
    labels: bool = True  # False: no label file is opened or needed
    maps: Mapping[str, str] = field(default_factory=dict)  # sample key -> folder with an earlier step's files
    folder: Mapping[str, Any] | None = None  # the whole description when dataset is "folder"


@dataclass(frozen=True)
class StreamConfig(SourceConfig):
    """One named stream of training samples."""

    batch_size: int = 2  # images an optimiser step, over all ranks and accumulated micro-batches
    augment: Mapping[str, Any] = field(default_factory=dict)
    sampler: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class DataConfig(SourceConfig):
    """The training streams, and the validation source."""

    streams: Mapping[str, StreamConfig] = field(default_factory=dict)
    val: SourceConfig = field(default_factory=lambda: SourceConfig(split="val"))
    workers: int = 2  # loader processes a stream
    cache: str | None = None  # folder of dataset statistics; None: <output>/.cache


@dataclass(frozen=True)
class ModelConfig:
    """All that a network needs; `options` belongs to the family and is typed by it."""

    name: str
    num_classes: int
    backbone: str = ""
    pretrained: bool | str = False  # True: timm's ImageNet weights; a path: that file; False: none
    checkpoint: str | None = None  # weights of the whole model, loaded before training
    reset_classifier: bool = False  # `checkpoint` was trained on other classes
    norm: Literal["bn", "sync_bn"] = "sync_bn"
    mean: tuple[float, float, float] = (123.675, 116.28, 103.53)
    std: tuple[float, float, float] = (58.395, 57.12, 57.375)
    align_corners: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class GroupConfig:
    """Parameters whose name matches `match` (regular expression, searched); the first rule that matches wins."""

    match: str
    lr_mult: float = 1.0
    weight_decay: float | None = None


@dataclass(frozen=True)
class OptimConfig:
    """Optimiser and learning-rate schedule."""

    name: Literal["sgd", "adamw", "adam"] = "sgd"
    lr: float = 0.01
    momentum: float = 0.9
    nesterov: bool = False
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 5e-4
    groups: tuple[GroupConfig, ...] = ()
    schedule: Literal["poly", "step", "constant"] = "poly"
    power: float = 0.9
    floor: float = 0.0  # poly: the same absolute lowest lr for every group
    milestones: tuple[int, ...] = ()  # step: 0-based steps at which the lr is multiplied by gamma
    gamma: float = 0.1
    warmup: int = 0  # steps
    warmup_ratio: float = 1e-6
    clip: float | None = None  # total L2 norm
    clip_each: float | None = None  # L2 norm of each parameter's gradient


@dataclass(frozen=True)
class TrainConfig:
    """The loop."""

    steps: int = 1000
    devices: int = 1  # the batch is stated for this many processes; fewer accumulate the rest
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    channels_last: bool = False
    compile: bool = False
    deterministic: bool = False  # on CUDA; the CPU always is
    threads: int | None = None  # CPU threads; None: torch's default
    log_every: int = 50
    save_every: int = 1000
    keep: int = 2


@dataclass(frozen=True)
class EvalConfig:
    """Validation and test."""

    every: int = 1000
    mode: Literal["whole", "slide"] = "whole"
    crop: tuple[int, int] | None = None  # slide: window height, width
    stride: tuple[int, int] | None = None
    window_batch: int = 4
    short_edge: int | None = None  # shorter side of the net's input; None: the image's own size
    max_edge: int | None = None  # with short_edge: the longer side's limit, which shortens both
    scales: tuple[float, ...] = (1.0,)
    scaled_max_edge: int | None = None  # with short_edge: that limit for scaled images; None: max_edge times the scale
    flip: bool = False
    batch_size: int = 1
    workers: int = 2
    convention: Literal["nan_mean", "absent_zero", "ltss", "detectron2"] = "nan_mean"
    best: str = "miou"  # the metric whose highest value marks the best checkpoint
    panels: int = 4  # images kept for the report
    max_images: int | None = None


@dataclass(frozen=True)
class Config:
    """One run, resolved."""

    model: ModelConfig
    data: DataConfig = field(default_factory=DataConfig)
    method: Mapping[str, Any] = field(default_factory=dict)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    name: str = ""  # the run's folder is <output>/<name>; empty: the config file's stem
    output: str = "runs"
    seed: int = 0

    @property
    def folder(self) -> Path:
        return Path(self.output) / self.name


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML or JSON config, merge it over its `base:`, apply `a.b=value` overrides, and type it.

    Raises ConfigError (one line) for a missing file, an unknown key, a wrong type, or a bad override.
    """
    path = Path(path)
    config = config_of(read_tree(path), overrides, path.name)
    return config if config.name else dataclasses.replace(config, name=path.stem)


def config_of(tree: dict[str, Any], overrides: Sequence[str], where: str) -> Config:
    """The config of a nested mapping, e.g. of a resolved one that a checkpoint carries; `where` begins the errors."""
    for override in overrides:
        _override(tree, override)
    config = typed(Config, tree, where)
    _check_intervals(config, where)
    return dataclasses.replace(config, data=_inherit(config.data))


def _check_intervals(config: Config, where: str) -> None:
    """ConfigError for an interval of no steps, or a division among no processes."""
    train = config.train
    intervals = {"train.log_every": train.log_every, "train.save_every": train.save_every}
    for key, value in {**intervals, "eval.every": config.eval.every}.items():
        if value < 1:
            raise ConfigError(
                f"{where}: {key}: {value} is less than 1; for the end of the run alone give train.steps ({train.steps})"
            )
    if train.devices < 1:
        raise ConfigError(f"{where}: train.devices: {train.devices} is less than 1; give 1 to leave the batch whole")


def read_tree(path: Path, seen: tuple[Path, ...] = ()) -> dict[str, Any]:
    """The nested mapping of a config file, merged over its `base:` (a path relative to the file)."""
    path = Path(path).resolve()
    if path in seen:
        raise ConfigError(f"{path}: `base` leads back to itself")
    try:
        text = path.read_text()
    except OSError as error:
        raise ConfigError(f"{path}: cannot read the config ({error.strerror})") from error
    try:
        tree = json.loads(text) if path.suffix == ".json" else yaml.load(text, Loader=_Loader)
    except (yaml.YAMLError, json.JSONDecodeError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"{path}: not valid {path.suffix.lstrip('.').upper()}: {reason}") from error
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: a config is a mapping, not {type(tree).__name__}")
    base = tree.pop("base", None)
    return _merge(read_tree(path.parent / base, (*seen, path)), tree) if base else tree


class _Loader(yaml.SafeLoader):
    """YAML in which 1e-4 is a number (YAML 1.1 asks for a dot)."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d[\d_]*\.?[\d_]*|\.\d[\d_]*)[eE][-+]?\d+$"),
    list("-+.0123456789"),
)


def _merge(base: dict[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`over` wins; mappings merge key by key, anything else (lists too) is replaced whole."""
    merged = dict(base)
    for key, value in over.items():
        both = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = _merge(merged[key], value) if both else value
    return merged


def _override(tree: dict[str, Any], override: str) -> None:
    key, sign, text = override.partition("=")
    if not sign or not key:
        raise ConfigError(f"override {override!r} is not of the form section.key=value")
    *sections, last = key.split(".")
    for section in sections:
        tree = tree.setdefault(section, {})
        if not isinstance(tree, dict):
            raise ConfigError(f"override {override!r}: {section!r} holds a value, not a section")
    value = yaml.load(text, Loader=_Loader) if text else None
    if isinstance(value, dict) and isinstance(tree.get(last), dict):
        value = _merge(tree[last], value)
    tree[last] = value


def _inherit(data: DataConfig) -> DataConfig:
    """Streams and `val` take dataset, root and folder from `data` where they give no dataset of their own."""

    def complete(source: SourceConfig) -> SourceConfig:
        if source.dataset:
            return source
        root = data.root if source.root is None else source.root
        return dataclasses.replace(source, dataset=data.dataset, root=root, folder=source.folder or data.folder)

    streams = {name: complete(stream) for name, stream in data.streams.items()}
    return dataclasses.replace(data, streams=streams, val=complete(data.val))


def typed(cls: type, mapping: Mapping[str, Any], where: str) -> Any:
    """`mapping` as the dataclass `cls`; `where` begins the error messages (file, or file:section)."""
    if not isinstance(mapping, Mapping):
        raise ConfigError(f"{where}: expected a section, got {mapping!r}")
    hints, fields = get_type_hints(cls), {f.name: f for f in dataclasses.fields(cls)}
    for key in mapping:
        if key not in fields:
            raise ConfigError(f"{where}: unknown key {key!r}; {nearest(str(key), fields)}")
    missing = [n for n, f in fields.items() if n not in mapping and _required(f)]
    if missing:
        raise ConfigError(f"{where}: missing key {missing[0]!r}")
    return cls(**{key: _convert(hints[key], value, f"{where}: {key}") for key, value in mapping.items()})


def _required(item: dataclasses.Field) -> bool:
    return item.default is dataclasses.MISSING and item.default_factory is dataclasses.MISSING


def nearest(key: str, known: Mapping[str, Any]) -> str:
    close = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}?" if close else f"known keys: {', '.join(known)}"


def _convert(hint: Any, value: Any, where: str) -> Any:
    """`value` as the annotation `hint` wants it, or a ConfigError."""
    origin, args = get_origin(hint), get_args(hint)
    if hint is Any:
        return value
    if origin in (Union, types.UnionType):
        return _convert_union(args, value, where)
    if origin is Literal:
        if value not in args:
            raise ConfigError(f"{where}: {value!r} is not one of {', '.join(map(str, args))}")
        return value
    if dataclasses.is_dataclass(hint):
        return value if isinstance(value, hint) else typed(hint, value, where)
    if origin is tuple:
        return _convert_tuple(args, value, where)
    if origin is not None and issubclass(origin, Mapping):
        if not isinstance(value, Mapping):
            raise ConfigError(f"{where}: expected a mapping, got {value!r}")
        return {str(k): _convert(args[1], v, f"{where}.{k}") for k, v in value.items()}
    return _convert_scalar(hint, value, where)


def _convert_scalar(hint: type, value: Any, where: str) -> Any:
    if hint is float and type(value) is int:
        return float(value)
    if type(value) is not hint:
        raise ConfigError(f"{where}: expected {hint.__name__}, got {value!r}")
    return value


def _convert_tuple(args: tuple, value: Any, where: str) -> tuple:
    if not isinstance(value, list | tuple):
        raise ConfigError(f"{where}: expected a list, got {value!r}")
    if args[-1] is Ellipsis:
        return tuple(_convert(args[0], item, f"{where}[{i}]") for i, item in enumerate(value))
    if len(args) != len(value):
        raise ConfigError(f"{where}: expected {len(args)} values, got {value!r}")
    return tuple(_convert(arg, item, f"{where}[{i}]") for i, (arg, item) in enumerate(zip(args, value, strict=True)))


def _convert_union(args: tuple, value: Any, where: str) -> Any:
    if value is None and type(None) in args:
        return None
    members = [arg for arg in args if arg is not type(None)]
    for arg in members:
        try:
            return _convert(arg, value, where)
        except ConfigError:
            if len(members) == 1:
                raise
    names = " or ".join(getattr(arg, "__name__", str(arg)) for arg in members)
    raise ConfigError(f"{where}: expected {names}, got {value!r}")


def to_tree(config: Any) -> Any:
    """Plain mappings, lists and scalars of a dataclass, fit for YAML and JSON."""
    if dataclasses.is_dataclass(config):
        return {f.name: to_tree(getattr(config, f.name)) for f in dataclasses.fields(config)}
    if isinstance(config, Mapping):
        return {key: to_tree(value) for key, value in config.items()}
    return [to_tree(item) for item in config] if isinstance(config, list | tuple) else config


def save_config(config: Config, path: Path) -> None:
    """Write the resolved config; reading it again gives an equal one."""
    path.write_text(yaml.safe_dump(to_tree(config), sort_keys=False, width=120))
