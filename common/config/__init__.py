"""Configurations: frozen dataclasses read from YAML or JSON, with `base:` parents and dotted overrides.

`load_config` reads any config of the four systems. schema.py: what the keys are; bounds.py: what a field allows beyond
its type; typed.py: mappings as dataclasses; text.py: YAML and JSON; layers.py: a file and its parents; references.py:
files of other steps; load.py: overrides, the resolved config.
"""

from common.config.errors import ConfigError, nearest, pick, shown
from common.config.load import config_of, load_config, read_tree, save_config, to_tree
from common.config.schema import (
    Config,
    DataConfig,
    EvalConfig,
    GroupConfig,
    LogConfig,
    ModelConfig,
    OptimConfig,
    SourceConfig,
    StreamConfig,
    TrainConfig,
)
from common.config.typed import typed, typed_keywords

__all__ = [
    "Config",
    "ConfigError",
    "DataConfig",
    "EvalConfig",
    "GroupConfig",
    "LogConfig",
    "ModelConfig",
    "OptimConfig",
    "SourceConfig",
    "StreamConfig",
    "TrainConfig",
    "config_of",
    "load_config",
    "nearest",
    "pick",
    "read_tree",
    "save_config",
    "shown",
    "to_tree",
    "typed",
    "typed_keywords",
]
