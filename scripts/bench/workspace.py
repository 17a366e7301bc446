"""Files for a config to run on: toy scenes in the layout and at the size of the real data, in a folder of their own."""

import os
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch

from common.config import Config, SourceConfig
from common.data import DATASETS, toy
from common.engine import prepare, runtime
from common.engine.trainer import Trainer
from common.experiment import Experiment
from scripts.bench.families import Family

Size = tuple[int, int]
REAL_SIZE: dict[str, Size] = {  # height, width of an image, by the data set's folder
    "cityscapes": (1024, 2048),
    "acdc": (1080, 1920),
    "dark_zurich": (1080, 1920),
    "gta5": (1052, 1914),
    "synthia": (760, 1280),
    "voc": (375, 500),
    "coco": (480, 640),
    "ade20k_full": (512, 683),
}
SPLITLESS = ("gta5", "synthia")


def sources(cfg: Config) -> Iterator[SourceConfig]:
    """Every source of images that the config reads."""
    yield cfg.data.val
    for stream in cfg.data.streams.values():
        yield stream
        other = stream.augment.get("colour_from")
        if other:
            yield SourceConfig(dataset=other["dataset"])


def write_scenes(cfg: Config, folder: Path, size: Size | None = None, train: int = 2) -> None:
    """Toy scenes below `folder` for every data set of the config, at its real size or `size`; kept if there already.

    ValueError for a data set whose layout the toy writer does not know.
    """
    for source in sources(cfg):
        row = DATASETS.get(source.dataset)
        name = source.dataset if row is None or source.dataset in toy.LAYOUTS else row.folder
        if name not in toy.LAYOUTS or name not in REAL_SIZE:
            known = ", ".join(REAL_SIZE)
            raise ValueError(f"{cfg.name}: no toy scenes in the layout of {source.dataset!r}; known: {known}")
        val = {} if name in SPLITLESS else {"val": 1}
        toy.make(name, folder / (name if row is None else row.folder), train=train, size=size or REAL_SIZE[name], **val)


def use(folder: Path) -> None:
    """Look for data sets below `folder`, whatever the rows' environment variables said."""
    for name in {row.env for row in DATASETS.values()}:
        os.environ[name] = str(folder)


def overrides(cfg: Config, batch: int) -> list[str]:
    """One process, one micro-batch of `batch` images per stream, nothing downloaded."""
    streams = [f"data.streams.{name}.batch_size={batch}" for name in cfg.data.streams]
    # what one or two scenes show of a rare class is little
    streams += [
        f"data.streams.{name}.sampler.min_pixels=1"
        for name, stream in cfg.data.streams.items()
        if stream.sampler.get("order") == "rare_class"
    ]
    roots = ["data.root=", "data.val.root=", *(f"data.streams.{name}.root=" for name in cfg.data.streams)]
    return [*streams, *roots, "data.workers=0", "train.devices=1", "model.pretrained=false", "model.checkpoint="]


def trainer(cfg: Config, family: Family, size: Size | None, device: torch.device) -> tuple[Trainer, Experiment]:
    """The config's trainer on random weights, and its data, which are written to the working folder."""
    use(Path.cwd())
    write_scenes(cfg, Path.cwd(), size)
    family.prepare(cfg)
    cfg = family.resolved(cfg)
    if cfg.train.compile:
        runtime.rehearse(cfg, family.method())  # a method may refuse it
    runtime.configure(cfg.train, device)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        experiment = Experiment(cfg, counted=family.counted)
        method = prepare(cfg, family.method(), experiment.context, device)
    family.ready(method)
    method.train()
    return Trainer(cfg, method, device), experiment


def settle(trainer: Trainer) -> int:
    """Allocate the gradients and the optimisers' state, all zero; returns the bytes that these and the weights hold.

    What a step needs beyond is then its own. The weights stay as they are.
    """
    for parameter in trainer.parameters:
        parameter.grad = torch.zeros_like(parameter)
    state = []
    for optimizer in trainer.optimizers.values():
        rates = [group["lr"] for group in optimizer.param_groups]
        for group in optimizer.param_groups:
            group["lr"] = 0.0
        optimizer.step()
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        state += [t for values in optimizer.state.values() for t in values.values() if isinstance(t, torch.Tensor)]
    for tensor in state:
        tensor.zero_()
    tensors = [*trainer.method.state_dict().values(), *trainer.parameters, *state]
    distinct = {t.data_ptr(): t.numel() * t.element_size() for t in tensors}
    return sum(distinct.values()) + sum(p.numel() * p.element_size() for p in trainer.parameters)
