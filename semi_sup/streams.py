"""Whether the streams of a config give what its method reads, told before anything is read.

A method reads keys of a stream's samples; which of them are there depends on the stream's recipe and its options.
"""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from common.config import Config, ConfigError
from common.data.recipes.recipe import Recipe
from common.data.streams import transform_of
from common.engine.method import Method
from common.losses.build import goes_by_pixels
from semi_sup.u2pl import U2PL
from semi_sup.unimatch import Consistency, UniMatch
from semi_sup.usrn import SelfTraining

VIEWS = ("views", "strong")  # the options of recipes by which views take the place of `image`


@dataclass(frozen=True)
class Wanted:
    """What a method reads of a stream. augment: the options that give it, the recipe's name among them. instead: for
    another value of one of these, the options of the method that can do with it. labels: the labels, too."""

    keys: frozenset[str]
    augment: Mapping[str, Any] = field(default_factory=dict)
    instead: Mapping[tuple[str, Any], str] = field(default_factory=dict)
    labels: bool = False


def check_streams(cfg: Config, method: type[Method]) -> None:
    """ConfigError for a stream that is missing, or whose recipe leaves out what the method reads; warns of views that
    are made and not read."""
    for name, wanted in read_by(cfg, method).items():
        if name not in cfg.data.streams:
            raise ConfigError(f"{cfg.name}: data.streams has no {name!r}")
        if wanted.labels and not cfg.data.streams[name].labels:
            raise ConfigError(
                f"{cfg.name}: data.streams.{name}.labels: false, but method {cfg.method['name']!r} learns them; set it "
                "to true"
            )

        if cfg.data.streams[name].labels and not (
            wanted.labels or issubclass(method, SelfTraining)
        ):
            text = (
                f"true, but method {cfg.method['name']!r} does not read them; set it to false"
            )
            warnings.warn(f"{cfg.name}: data.streams.{name}.labels: {text}", stacklevel=2)

        where = f"{cfg.name}: data.streams.{name}.augment"
        recipe = transform_of(cfg.data, name)
        given = {"recipe": cfg.data.streams[name].augment.get("recipe", "none"), **vars(recipe)}
        options = wanted.augment or _of_whole_crops(recipe)
        wrong = {key: value for key, value in options.items() if given.get(key) != value}
        missing = wanted.keys - recipe.gives
        if missing:
            key, value = next(iter(wrong.items()))
            other = wanted.instead.get((key, given[key]))
            raise ConfigError(
                f"{where}.{key}: {_text(given[key])} gives no {_listed(missing)}, which method {cfg.method['name']!r} "
                f"reads; set it to {_text(value)}{'' if other is None else f', or {other}'}"
            )

        unread = recipe.gives - wanted.keys
        if unread and wrong and "recipe" not in wrong:
            fix = ", ".join(f"{key}: {_text(value)}" for key, value in wrong.items())
            text = f"makes {_listed(unread)}, which method {cfg.method['name']!r} does not read; set {fix}"
            warnings.warn(f"{where}: {text}", stacklevel=2)


def read_by(cfg: Config, method: type[Method]) -> dict[str, Wanted]:
    """What the config's method reads, by stream."""
    labeled = Wanted(frozenset({"image"}), labels=True)
    options = method.options_of(cfg)
    if issubclass(method, Consistency):
        unlabeled = _views(method, options)
    elif issubclass(method, SelfTraining):
        unlabeled = Wanted(frozenset({"weak", "strong"}), {"recipe": "usrn", "views": True})
    elif issubclass(method, U2PL):
        shown = {"shown"} if options.mask_padding or counts_pseudo_labels(cfg) else set()
        unlabeled = Wanted(frozenset({"image", *shown}), {"recipe": "u2pl"})
    else:
        return {"labeled": labeled}

    return {"labeled": labeled, "unlabeled": unlabeled}


def counts_pseudo_labels(cfg: Config) -> bool:
    """Whether class counts are joined by those of pseudo-labels: where a remedy goes by them, unless `refresh` is 0."""
    refresh = cfg.remedies.get("counts", {}).get("refresh")
    return goes_by_pixels(cfg.remedies) if refresh is None else bool(refresh)


def _views(method: type[Consistency], options: Any) -> Wanted:
    """The views of FixMatch, UniMatch and UniMatch V2."""
    numbers = range(1, options.views + 1)
    strong = {f"strong{k}" for k in numbers}
    keys = {"weak", "shown", *strong, *(f"box{k}" for k in numbers)}
    partner = issubclass(method, UniMatch) and options.partner == "same"
    if partner:
        keys |= {f"partner_{key}" for key in ("weak", "shown", *strong)}

    alone = "" if issubclass(method, UniMatch) else " method.complementary=false"
    instead = {
        ("views", 1): f"method.views=1{alone}",
        ("partner", False): "method.partner=batch",
    }
    augment = {"recipe": "unimatch", "views": options.views, "partner": partner}

    return Wanted(frozenset(keys), augment, instead)


def _of_whole_crops(recipe: Recipe) -> dict[str, Any]:
    """The options by which a recipe gives one `image`."""
    return {f.name: f.default for f in fields(recipe) if f.name in VIEWS}  # type: ignore[arg-type]


def _listed(keys: frozenset[str]) -> str:
    return ", ".join(sorted(keys))


def _text(value: Any) -> str:
    """A value as a config has it."""
    return str(value).lower()
