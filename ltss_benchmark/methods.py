"""METHODS: what trains the networks of the benchmark."""

from common.config import Config, ConfigError, nearest
from common.data.statistics import Statistics
from common.engine.method import Method
from ltss_benchmark.deeplabv3plus import DeepLabV3PlusMethod
from ltss_benchmark.mask2former import Mask2FormerMethod

METHODS: dict[str, type[Method]] = {"mask2former": Mask2FormerMethod, "deeplabv3plus": DeepLabV3PlusMethod}


def build_method(cfg: Config, statistics: Statistics | None) -> Method:
    """The method that `method.name` names. Raises ConfigError."""
    name = cfg.method.get("name")
    if name not in METHODS:
        raise ConfigError(f"{cfg.name}: method.name: unknown {name!r}; {nearest(str(name), METHODS)}")
    return METHODS[name](cfg, statistics)
