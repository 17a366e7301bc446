"""From a config file to one that can be trained: what depends on files of earlier steps is filled in and checked."""

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import fields, replace
from math import ceil, prod
from pathlib import Path

from common.config import Config, ConfigError, SourceConfig
from common.data import SegmentationDataset
from common.engine import Method, MethodContext
from common.engine.method import make_method, method_class
from common.files import load_json, read_artifact
from common.losses.hard_pixel import HardPixels
from semi_sup.baseline import OF_USRN, Baseline
from semi_sup.streams import check_streams, counts_pseudo_labels
from semi_sup.subclasses import check_counts, chosen_counts
from semi_sup.u2pl import U2PL
from semi_sup.unimatch import Consistency, UniMatch
from semi_sup.unimatch_v2 import UniMatchV2
from semi_sup.usrn import USRN, SelfTraining

METHODS: dict[str, type[Method]] = {
    "baseline": Baseline,
    "self_training": SelfTraining,
    "usrn": USRN,
    "unimatch": UniMatch,
    "unimatch_v2": UniMatchV2,
    "u2pl": U2PL,
}
SUB_LABEL = "sub_label"  # sample key, and map of the labelled stream
# in the folder of subclass labels: their numbers, and of which images they are
NUMBERS = "subclasses.json"


def build_method(cfg: Config, context: MethodContext) -> Method:
    """The method that `method.name` names."""
    return make_method(METHODS, cfg, context)


def labelled_source(cfg: Config) -> SourceConfig:
    """The labelled images as they are: no augmentation, no further maps."""
    if "labeled" not in cfg.data.streams:
        raise ConfigError(f"{cfg.name}: data.streams has no 'labeled'")
    return replace(cfg.data.streams["labeled"], maps={})


def resolve(cfg: Config) -> Config:
    """The config with the network that the method needs, its subclasses and the interval at which counts are refreshed.

    Subclasses come from the folder of subclass labels; numbers in the config that differ are an error, as are labels
    made for another list of images. Remedies' counts are refreshed once a pass over the unlabelled images, but
    for those that a remedy states itself. Streams that do not give what the method reads are refused before a file is.
    """
    method = method_class(METHODS, cfg)
    if method is Baseline:
        cfg = _labels_alone(cfg)

    check_streams(cfg, method)
    if method is Baseline:
        return cfg

    cfg = _with_refresh(cfg)
    if method is USRN and cfg.method.get("branch", True):
        return _with_branch(_with_subclasses(cfg))
    if issubclass(method, Consistency) and cfg.method.get("branch", False):
        return _with_subclasses(cfg)

    streams = _without_sub_labels(cfg)

    return replace(cfg, model=single_branch(cfg).model, data=replace(cfg.data, streams=streams))


def _labels_alone(cfg: Config) -> Config:
    """A config of another method by `method.name=baseline`: without its other images, and without its options, which is
    logged."""
    others = {field.name for method in METHODS.values() for field in fields(method.Options)}
    unused = others - {field.name for field in fields(Baseline.Options)}
    options = {key: value for key, value in cfg.method.items() if key not in unused}
    left = [key for key in cfg.method if key in unused]
    if left:
        logging.getLogger(__name__).info(
            "%s: supervised, without method.%s", cfg.name, ", method.".join(left)
        )

    streams = {
        key: source for key, source in _without_sub_labels(cfg).items() if key == "labeled"
    }

    return replace(
        cfg,
        method=options,
        model=single_branch(cfg).model,
        data=replace(cfg.data, streams=streams),
    )


def _without_sub_labels(cfg: Config) -> dict[str, SourceConfig]:
    return {
        key: replace(
            source, maps={name: path for name, path in source.maps.items() if name != SUB_LABEL}
        )
        for key, source in cfg.data.streams.items()
    }


def single_branch(cfg: Config) -> Config:
    """The same with the network of the baseline, which is also what predicts after USRN's training; other networks have
    one branch already."""
    if cfg.model.name not in OF_USRN:
        return cfg
    of_second = ("subclasses", "copy_branch")
    options = {key: value for key, value in cfg.model.options.items() if key not in of_second}
    return replace(cfg, model=replace(cfg.model, name="deeplabv3plus", options=options))


def _with_refresh(cfg: Config) -> Config:
    counts = cfg.remedies.get("counts", {})
    if "refresh" in counts or not counts_pseudo_labels(cfg):
        return cfg

    unlabeled = cfg.data.streams["unlabeled"]
    images = SegmentationDataset(replace(unlabeled, labels=False))
    steps = ceil(len(images) / unlabeled.batch_size)

    return replace(cfg, remedies={**cfg.remedies, "counts": {**counts, "refresh": steps}})


def say_mined(cfg: Config) -> None:
    """Log how much of a batch `hard_pixels` keeps at least, where that is a number of pixels: of a batch that is
    divided over another number of processes it is another share."""
    focus = cfg.remedies.get("focus") or {}
    crop = cfg.data.streams["labeled"].augment.get("crop")
    if focus.get("name") != "hard_pixels" or focus.get("threshold") is None or crop is None:
        return

    kept = focus.get("min_kept", HardPixels.min_kept)
    pixels = prod(crop) * cfg.data.streams["labeled"].batch_size // cfg.train.devices
    text = (
        "%s: remedies.focus.min_kept: at least %d of the %d pixels of a batch are kept, %.1f %%"
    )
    logging.getLogger(__name__).info(
        text, cfg.name, min(kept, pixels), pixels, 100 * min(kept / pixels, 1)
    )


def _with_subclasses(cfg: Config) -> Config:
    labeled = cfg.data.streams.get("labeled")
    if labeled is None or SUB_LABEL not in labeled.maps:
        raise ConfigError(
            f"{cfg.name}: data.streams.labeled.maps has no {SUB_LABEL!r}: the folder of subclass labels"
        )

    names = SegmentationDataset(labelled_source(cfg)).names
    counts = read_numbers(Path(labeled.maps[SUB_LABEL]), names, cfg.model.num_classes)
    chosen = cfg.method.get("subclasses", "rule")
    if (
        chosen != "rule"
        and chosen_counts(chosen, cfg.model.num_classes, f"{cfg.name}: method: subclasses")
        != counts
    ):
        raise ValueError(
            f"{labeled.maps[SUB_LABEL]}: made with {_text(counts)} subclasses, {cfg.name} wants {_text(chosen)}; "
            "set data.streams.labeled.maps.sub_label to this split's folder, or run clustering.py again"
        )

    return replace(cfg, method={**cfg.method, "subclasses": list(counts)})


def _with_branch(cfg: Config) -> Config:
    """The config with USRN's network for the subclasses that `_with_subclasses` found."""
    k = cfg.model.options.get("subclasses", 0) or sum(cfg.method["subclasses"])
    model = replace(cfg.model, name="usrn", options={**cfg.model.options, "subclasses": k})
    return replace(cfg, model=model)


def _text(counts: str | Sequence[int]) -> str:
    return counts if isinstance(counts, str) else " ".join(map(str, counts))


def read_numbers(folder: Path, names: Sequence[str], num_classes: int) -> tuple[int, ...]:
    """Subclasses of each class, from beside the labels of the images `names`. ValueError names the fix."""
    path = folder / NUMBERS
    if not path.is_file():
        raise ValueError(
            f"{path}: no subclass labels there; clustering.py makes them (beside labels of the release's program "
            'write {"counts": [its numbers of subclasses]} to this file)'
        )

    def parse(path: Path) -> tuple[tuple[int, ...], str | None, int | None]:
        record = load_json(path)
        return (
            check_counts(record["counts"], num_classes),
            record.get("list"),
            record.get("images"),
        )

    counts, made_for, images = read_artifact(
        path, parse, "not the numbers of subclasses; run clustering.py again"
    )
    if made_for not in (None, digest(names)):
        raise ValueError(
            f"{path}: made for {images} other images than the {len(names)} of data.streams.labeled; "
            "set data.streams.labeled.maps.sub_label to this split's folder, or run clustering.py again"
        )

    return counts


def digest(names: Sequence[str]) -> str:
    """A short name of a set of images."""
    return hashlib.sha256("\n".join(sorted(names)).encode()).hexdigest()[:16]
