"""Which of the four systems trains a config, told by its `method.name`."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from common.config import Config, pick
from common.engine import Method, MethodContext
from fully_sup import supervised
from ltss_benchmark import methods as ltss
from semi_sup import config as semi_sup
from uda import train as uda


@dataclass(frozen=True)
class System:
    """What a system's program does with a config before its first step.

    counted: the stream whose labels say what is rare. completed: the config with what files of earlier steps say,
    which is a ValueError where one of them is missing.
    """

    name: str
    methods: Mapping[str, type[Method]]
    build_method: Callable[[Config, MethodContext], Method]
    counted: str
    completed: Callable[[Config], Config]


def _as_it_is(cfg: Config) -> Config:
    return cfg


def _of_uda(cfg: Config) -> Config:
    uda.require_earlier_steps(cfg)
    return cfg


def _of_ltss(cfg: Config) -> Config:
    ltss.check_options(cfg)
    return cfg


SYSTEMS = (
    System("fully_sup", supervised.METHODS, supervised.build_method, "labeled", _as_it_is),
    System("semi_sup", semi_sup.METHODS, semi_sup.build_method, "labeled", semi_sup.resolve),
    System("uda", uda.METHODS, uda.build_method, "source", _of_uda),
    System("ltss_benchmark", ltss.METHODS, ltss.build_method, "labeled", _of_ltss),
)


def system_of(cfg: Config) -> System:
    """The system that a config belongs to. ConfigError where none has its method."""
    by_method = {method: system for system in SYSTEMS for method in system.methods}
    return pick(by_method, cfg.method.get("name", "supervised"), f"{cfg.name}: method.name")
