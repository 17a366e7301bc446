"""STAGE2: every remedy after training by name, and the words of a command line as such remedies.

A new one is one file with a frozen dataclass of its options that does what `Stage2` asks for (`given.py`), and a row.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from common.config import ConfigError, pick, typed
from common.config.text import parse
from common.rebalance.crt import ClassifierRetraining
from common.rebalance.disalign import DisAlign
from common.rebalance.gcl import GaussianClouds
from common.rebalance.given import Stage2
from common.rebalance.logit_adjustment import FoldedAdjustment
from common.rebalance.tau_norm import TauNorm

STAGE2: dict[str, type] = {
    "logit_adjustment": FoldedAdjustment,
    "tau_norm": TauNorm,
    "crt": ClassifierRetraining,
    "disalign": DisAlign,
    "gcl": GaussianClouds,
}


def build_stage2(name: str, words: Sequence[str]) -> dict[str, Stage2]:
    """Strength → remedy, of the options `key=value` of a command line. ConfigError for what is unknown or unfit.

    One of the options may have several values, `tau=0.1,0.2`, and makes as many remedies: their names are tau_0.1 and
    tau_0.2. A single remedy's name is "".
    """
    remedy = pick(STAGE2, name, "remedy")
    values = _values(words)
    several = [key for key, value in values.items() if len(value) > 1]
    if len(several) > 1:
        raise ConfigError(
            f"{name}: {' and '.join(several)} have several values; give them to one"
        )

    fixed = {key: value[0] for key, value in values.items() if key not in several}
    if not several:
        return {"": typed(remedy, _parsed(fixed), name)}

    (key,) = several
    found: dict[str, Stage2] = {
        f"{key}_{text}": typed(remedy, _parsed({**fixed, key: text}), name)
        for text in values[key]
    }
    if len(set(found.values())) < len(values[key]):
        raise ConfigError(f"{name}: {key}: a value stands twice in {','.join(values[key])}")

    return found


def _values(words: Sequence[str]) -> dict[str, list[str]]:
    """Option → the texts of its values."""
    found: dict[str, list[str]] = {}
    for word in words:
        key, _, text = word.partition("=")
        if key in found:
            raise ConfigError(f"{word}: {key} is given twice; give its values as {key}=A,B")
        found[key] = text.split(",")

    return found


def _parsed(texts: Mapping[str, str]) -> dict[str, Any]:
    return {key: parse(text) if text else None for key, text in texts.items()}
