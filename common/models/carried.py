"""The config that a checkpoint of ours carries, so that what is done with one needs no other file."""

import json
from collections.abc import Sequence
from pathlib import Path

from common.config import Config, ConfigError, config_of, load_config
from common.files import follow
from common.models.pretrained.containers import read_metadata, weight_file


def open_config(
    config: str | Path | None, checkpoint: str | Path | None, overrides: Sequence[str] = ()
) -> Config:
    """The config that is named, else the one inside the checkpoint. Raises ConfigError."""
    if config is not None:
        return load_config(config, overrides)
    if checkpoint is None:
        raise ConfigError(
            "neither a config nor a checkpoint is named; give CONFIG, or --checkpoint with one of ours"
        )

    return carried_config(checkpoint, overrides)


def best_of(cfg: Config) -> str:
    """The best checkpoint of a config's run. ConfigError where the run has none."""
    best = follow(cfg.folder / "checkpoints" / "best")
    if not best.exists():
        raise ConfigError(
            f"{best}: no checkpoint there; train {cfg.name} first, or name a checkpoint: --checkpoint FILE"
        )

    return str(best)


def carried_config(checkpoint: str | Path, overrides: Sequence[str] = ()) -> Config:
    """The config of the run that left a checkpoint. ConfigError where there is none inside, as in official files."""
    file = weight_file(checkpoint)
    if not file.is_file():
        raise ConfigError(f"{checkpoint}: no such checkpoint")

    text = read_metadata(file).get("config")
    if text is None:
        raise ConfigError(
            f"{file}: an official or converted checkpoint has no config inside; give --config FILE"
        )

    return config_of(json.loads(text), overrides, str(file))
