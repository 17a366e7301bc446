"""`read_config`: a config under a command line of both forms, also mixed: `SOLVER.MAX_ITER 1000 optim.lr=5e-5`.

A value is read as YAML; detectron2's tuples `(512, 512)` are understood.
"""

import difflib
import re
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from common.config import Config, ConfigError, load_config
from ltss_benchmark.detectron2_keys.agreeing import AGREEING, disagreement
from ltss_benchmark.detectron2_keys.official import check_config_file
from ltss_benchmark.detectron2_keys.translated import DEPENDENT, KEYS, Typed, listed
from ltss_benchmark.detectron2_keys.untranslated import DONE_ANYWAY, REFUSED

Pairs = Sequence[tuple[str, str]]  # of the command line: key, value
Load = Callable[[Sequence[str]], Config]  # key=value words to a config
KNOWN = (*KEYS, *DEPENDENT, *AGREEING, *DONE_ANYWAY, *REFUSED)
# similarity of a key, and of its last part, from which on it is a likely misspelling
NEAR = 0.88
NEAR_NAME = 0.75


def read_config(
    path: Path, words: Sequence[str], check: Callable[[Config], None] | None = None
) -> Config:
    """The config of a file under a command line of KEY VALUE pairs and key=value words.

    check: further conditions on the config. Raises ConfigError, which names detectron2's key where that was typed.
    """
    check_config_file(path)
    return changed_config(partial(load_config, path), words, check)


def changed_config(
    load: Load, words: Sequence[str], check: Callable[[Config], None] | None = None
) -> Config:
    """The same of a config that lies elsewhere: `load` makes it of key=value words."""
    pairs = split_pairs(words)
    draft = _load(load, [pair for pair in pairs if pair[0] not in DEPENDENT], None, None)
    cfg = _load(load, pairs, draft, check)

    for key, value in pairs:
        complaint = disagreement(key, value.strip(), cfg) if key in AGREEING else None
        if complaint is not None:
            raise ConfigError(complaint)

    return cfg


def _load(
    load: Load, pairs: Pairs, draft: Config | None, check: Callable[[Config], None] | None
) -> Config:
    words = overrides(pairs, draft)
    try:
        cfg = load(words)
        if check is not None:
            check(cfg)
    except ValueError as error:
        raise ConfigError(f"{_typed_as(str(error), pairs, draft)}{error}") from error

    return cfg


def _typed_as(message: str, pairs: Pairs, draft: Config | None) -> str:
    """`KEY VALUE: ` of the detectron2 key that set what an error is about; "" where none did."""
    for key, value in reversed(pairs):
        targets = (
            [word.partition("=")[0] for word in overrides([(key, value)], draft)]
            if key.isupper()
            else []
        )
        if any(
            re.search(rf"(?<![\w.]){re.escape(target)}(?![\w])", message) for target in targets
        ):
            return f"{key} {value}: "

    return ""


def overrides(pairs: Pairs, draft: Config | None = None) -> list[str]:
    """`section.key=value` words of the pairs. draft: the config without the keys in DEPENDENT, which only they need."""
    typed = {key: value for key, value in pairs if key.isupper()}
    result: list[str] = []

    for key, value in pairs:
        result += (
            translated(key, value.strip(), typed, draft)
            if key.isupper()
            else [f"{key}={value}"]
        )

    return result


def split_pairs(words: Sequence[str]) -> Pairs:
    """(key, value) of every `key=value` and every `KEY VALUE`."""
    pairs = []
    rest = iter(words)

    for word in rest:
        key, sign, value = word.partition("=")
        if not sign:
            value = next(rest, None)
            if value is None:
                raise ConfigError(f"{key}: no value follows; write {key} VALUE or {key}=VALUE")

        pairs.append((key, value))

    return pairs


def translated(key: str, value: str, typed: Typed, draft: Config | None) -> Sequence[str]:
    """Our overrides for one of detectron2's keys; none for those that are compared with the config later."""
    if key in AGREEING:
        return []

    known, instead = DONE_ANYWAY.get(key, ((), REFUSED.get(key)))
    if instead is not None:
        if value.strip("'\"").lower() in known:
            return []
        raise ConfigError(
            f"{key}: {'not' if key in REFUSED else f'{value!r} is not'} used here: {instead}"
        )

    if key not in KEYS and key not in DEPENDENT:
        raise ConfigError(f"{key}: unknown; {advice(key)}")

    try:
        if key in DEPENDENT:
            return DEPENDENT[key](value, typed, draft)
        rule = KEYS[key]
        return [f"{rule}={listed(value)}"] if isinstance(rule, str) else rule(value, typed)
    except ValueError as error:
        raise ConfigError(f"{key}: {error}") from error


def advice(key: str) -> str:
    """After an unknown key: the known one that it misspells, if one is near; keys of a section all look alike."""

    def last(name: str) -> str:
        return name.rpartition(".")[2]

    def likeness(a: str, b: str) -> float:
        return difflib.SequenceMatcher(None, a, b).ratio()

    near = [
        name
        for name in KNOWN
        if likeness(key, name) >= NEAR and likeness(last(key), last(name)) >= NEAR_NAME
    ]
    if near:
        return f"did you mean {max(near, key=lambda name: likeness(key, name))!r}?"

    return "leave it out, or set the option of this project, section.key=value"
