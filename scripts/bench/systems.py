"""One training step of each system, as papers take it, on a batch that lies on the device already."""

import contextlib
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import repeat
from typing import Any

import torch

from common.config import Config, load_config
from common.engine import runtime
from common.engine.trainer import Streams, Trainer
from scripts.bench import workspace
from scripts.bench.families import family_of, official


@dataclass(frozen=True)
class System:
    """An official config, the images of each of its streams in a step, and what makes it narrow with all layers."""

    config: str
    batch: int
    tiny: tuple[str, ...]
    words: tuple[str, ...] = ()


UPERNET = System(
    "fully_sup/upernet/upernet_r50_512x1024_40k_cityscapes_blv",
    8,
    (
        "model.options.channels=32",
        "model.options.auxiliary_channels=32",
        "data.streams.labeled.augment.crop=[64,64]",
        "data.streams.labeled.augment.box=[64,128]",
    ),
)
STRONG = ("method.jitter=1", "method.blur=1")  # in every step, not in some: steps then have the same to do


def small_mit(side: int) -> tuple[str, ...]:
    """Crops of this side for a MiT-B0, which has eight blocks in the place of MiT-B5's 52: none is narrower."""
    return (
        "model.backbone=mit_b0",
        "model.options.channels=8",
        *(
            f"data.streams.{stream}.augment={{crop: [{side},{side}], box: [{side},{2 * side}]}}"
            for stream in ("source", "target")
        ),
        "method.margins={top: 2, bottom: 15}",
    )


SYSTEMS: dict[str, System] = {
    "upernet": UPERNET,
    "upernet-bf16": System(UPERNET.config, UPERNET.batch, UPERNET.tiny, ("train.precision=bf16",)),
    "mask2former": System(
        "ltss_benchmark/ade20k_full/mask2former/matcher-maskformer2_R50_bs16_200k",
        16,
        (
            "model.options={hidden_dim: 32, encoder_hidden: 32, decoder_hidden: 32}",
            "method.criterion.points=64",
            "data.streams.labeled.augment.crop=[64,64]",
        ),
        ("train.precision=bf16",),
    ),
    "deeplabv3plus": System(
        "ltss_benchmark/ade20k_full/deeplabv3p/deeplabv3p_R50_bs16_200k",
        16,
        (
            "model.options={channels: 32, lateral_channels: 8}",
            "data.streams.labeled.augment.crop=[64,64]",
        ),
    ),
    "usrn": System(
        "semi_sup/voc_1over32_usrn",
        4,
        (
            "model.options={subclasses: 177, width: 4, channels: 8, low_channels: 4}",
            "data.streams.labeled.augment.crop=[64,64]",
            "data.streams.unlabeled.augment.crop=[64,64]",
        ),
    ),
    "cpsl": System(
        "uda/gta5_to_cityscapes/stage1",
        4,
        (
            "model.options={width: 4, head_channels: 8, features: 8}",
            "method.bank=256",
            "method.samples=16",
            "data.streams.source.augment={base: [64, 128], crop: [48, 64]}",
            "data.streams.target.augment={base: [64, 128], crop: [48, 64]}",
        ),
    ),
    "daformer": System("uda/daformer/gta5_to_cityscapes", 2, small_mit(64), STRONG),
    "hrda": System("uda/hrda/gta5_to_cityscapes", 2, (*small_mit(128), "model.options.crop=[64,64]"), STRONG),
    "mic": System(
        "uda/mic/gta5_to_cityscapes_hrda",
        2,
        (*small_mit(128), "model.options.crop=[64,64]", "method.mask_block=16"),
        STRONG,
    ),
    "unimatch": System(
        "semi_sup/unimatch/pascal_366_r101",
        4,
        (
            "model.backbone=resnet50s",
            "model.options.channels=8",
            "data.streams.labeled.augment.crop=[64,64]",
            "data.streams.unlabeled.augment.crop=[64,64]",
        ),
    ),
    "unimatch_v2": System(
        "semi_sup/unimatch_v2/pascal_366_dinov2_small",
        4,
        (
            "model.options={widths: [4, 6, 8, 8], channels: 4, backbone: {dim: 16, heads: 2}}",
            "data.streams.labeled.augment.crop=[56,56]",
            "data.streams.unlabeled.augment.crop=[56,56]",
        ),
    ),
}
TINY_BATCH, TINY_SIZE = 2, (64, 128)
LOADED = 2  # batches that are timed


@dataclass
class Resident:
    """A trainer, the batch that each of its steps gets, and the images a second that one loader process makes."""

    trainer: Trainer
    streams: Streams
    images: int  # of a step
    loaded: float

    def step(self, number: int) -> None:
        self.trainer.step(number, self.streams, [])


def resident(system: System, device: torch.device, tiny: bool = False) -> Resident:
    """The system on random weights and toy scenes in the real layout, which are gone when it is made."""
    path = official()[system.config]
    words = [*system.words, *(system.tiny if tiny else ())]
    batch = TINY_BATCH if tiny else system.batch
    with tempfile.TemporaryDirectory(prefix="system_") as folder, contextlib.chdir(folder):
        plain = load_config(path, words)
        cfg = load_config(path, [*workspace.overrides(plain, batch), *words, "output=runs"])
        trainer, experiment = workspace.trainer(cfg, family_of(path), TINY_SIZE if tiny else None, device)
        opened = experiment.open(0)
        batches = {name: next(stream) for name, stream in opened.items()}
        loaded = images_per_second(cfg, opened)

    there = {name: repeat(runtime.to_device(values, device)) for name, values in batches.items()}
    return Resident(trainer, there, images_of(cfg), loaded)


def images_of(cfg: Config) -> int:
    """Images of an optimiser step, of all streams."""
    return sum(stream.batch_size for stream in cfg.data.streams.values())


def images_per_second(cfg: Config, streams: Mapping[str, Any]) -> float:
    """What this process loads and augments."""
    start = time.perf_counter()
    for _ in range(LOADED):
        for stream in streams.values():
            next(stream)

    return LOADED * images_of(cfg) / (time.perf_counter() - start)
