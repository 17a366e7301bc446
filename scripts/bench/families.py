"""The systems whose configs the full-size benchmark takes through a step. Adding a system is adding a row."""

import importlib
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file
from torch import nn

from common.config import Config
from common.data import SegmentationDataset
from common.data.dataset import map_path
from common.models import build_model
from common.ops.ring import RingBank

ROOT = Path(__file__).resolve().parents[2]
# Networks in which a batch norm sees an image pooled to 1×1: they need two images. The others train on one.
PAIRS = ("upernet", "pspnet", "knet", "deeplabv3plus", "usrn", "deeplabv3plus_unimatch", "deeplabv3plus_u2pl")
SEMI_DATA = ("cityscapes", "pascal", "coco")  # as UniMatch's configs name them


def least_batch(cfg: Config) -> int:
    """The fewest images of each stream that a config trains on."""
    halves = cfg.method.get("masked") == "separate"  # MIC to ACDC and Dark Zurich masks half of each batch
    return 2 if cfg.model.name in PAIRS or halves else 1


@dataclass(frozen=True)
class Family:
    """One system.

    configs: patterns of its official configs below its folder. build: "module:function", (cfg, context) →
    method. counted: the stream whose labels say what is rare. prepare: writes what earlier steps leave, to where the
    config looks for it (relative to the working folder). ready: brings the new method to the state of long training.
    resolve: "module:function" that fills into the config what those files say.
    """

    configs: tuple[str, ...]
    build: str
    counted: str
    prepare: Callable[[Config], None] = lambda cfg: None
    ready: Callable[[nn.Module], None] = lambda method: None
    resolve: str = ""

    def method(self) -> Callable[..., Any]:
        return named(self.build)

    def resolved(self, cfg: Config) -> Config:
        return named(self.resolve)(cfg) if self.resolve else cfg


def named(text: str) -> Callable[..., Any]:
    module, _, name = text.partition(":")
    return getattr(importlib.import_module(module), name)


def uda_files(cfg: Config) -> None:
    """Pseudo-labels, prototypes, class distribution and teacher of CPSL's earlier steps, with made-up values."""
    rng, generator = np.random.default_rng(0), torch.Generator().manual_seed(0)
    classes, method, target = cfg.model.num_classes, cfg.method, cfg.data.streams["target"]
    dataset = SegmentationDataset(replace(target, labels=False, maps={}))
    for index, name in enumerate(dataset.names):
        height, width = dataset.open(index)["image"].size
        for key, folder in target.maps.items():
            path = map_path(folder, name)
            path.parent.mkdir(parents=True, exist_ok=True)
            if key == "soft":
                scores = torch.randn(classes, height // 8 + 1, width // 8 + 1, generator=generator)
                np.save(path.with_suffix(".npy"), (3 * scores).softmax(0).half().numpy())
            else:
                blocks = rng.integers(0, classes if key == "pseudo" else 255, (-(-height // 32), -(-width // 32)))
                pixels = np.kron(blocks, np.ones((32, 32)))[:height, :width]
                Image.fromarray(pixels.astype(np.uint8)).save(path)
    if "prototypes" in method:
        width = cfg.model.options.get("features", 256)
        _save(torch.save, torch.randn(classes, width, generator=generator), method["prototypes"])
        shares = torch.rand(classes, generator=generator, dtype=torch.float64) + 0.05
        _save(lambda values, path: np.save(path, values.numpy()), shares / shares.sum(), method["class_distribution"])
    if "teacher" in method:
        plain = replace(cfg.model, pretrained=False, checkpoint=None)
        _save(save_file, build_model(plain).state_dict(), Path(method["teacher"]) / "model.safetensors")


def uda_weights(cfg: Config) -> Config:
    """DAFormer and what is built on it with a file of random weights, in place of ImageNet's, for feature distance."""
    if not issubclass(named("uda.train:METHODS")[cfg.method["name"]], named("uda.daformer:DAFormer")):
        return cfg
    path = Path.cwd() / f"{cfg.model.backbone}.pth"
    backbone = build_model(replace(cfg.model, pretrained=False, checkpoint=None)).get_submodule("backbone")
    _save(torch.save, backbone.state_dict(), path)
    return replace(cfg, model=replace(cfg.model, pretrained=str(path)))


def full_banks(method: nn.Module) -> None:
    """Fill the feature banks: self-labelling costs more from then on, which is after 64 of 90 000 steps."""
    generator = torch.Generator().manual_seed(0)
    for bank in (module for module in method.modules() if isinstance(module, RingBank)):
        rows = torch.zeros_like(bank.rows, device="cpu")
        if rows.is_floating_point():
            rows = F.normalize(rows.normal_(generator=generator), dim=1)
        bank.push(rows.to(bank.rows.device))


def semi_files(cfg: Config) -> None:
    """Lists of labelled and unlabelled images, half of them each, and the former's subclass labels."""
    streams = cfg.data.streams
    names = SegmentationDataset(replace(streams["labeled"], list=None, maps={})).names
    half = len(names) // 2
    for key, chosen in (("labeled", names[:half]), ("unlabeled", names[half:])):
        if key in streams:
            _save(lambda text, path: path.write_text(text), "\n".join(chosen), streams[key].list)
    if "sub_label" in streams["labeled"].maps:
        numbers = named("semi_sup.subclasses:PRESETS")[cfg.method["subclasses"]]
        dataset = SegmentationDataset(replace(streams["labeled"], maps={}))
        subclass_labels(dataset, numbers, Path(streams["labeled"].maps["sub_label"]))


def subclass_labels(dataset: SegmentationDataset, numbers: tuple[int, ...], folder: Path) -> None:
    """A random subclass of its pixels' class for each block of 8×8, and the numbers of subclasses beside them."""
    rng, counts, starts = np.random.default_rng(0), np.array(numbers), np.cumsum(numbers) - numbers
    for index, name in enumerate(dataset.names):
        label = dataset.label(index)
        height, width = label.shape
        part = np.kron(rng.random((-(-height // 8), -(-width // 8))), np.ones((8, 8)))[:height, :width]
        values = np.where(label < 0, 255, starts[label] + (part * counts[label]).astype(np.int64))
        _save(lambda array, path: Image.fromarray(array).save(path), values.astype(np.uint8), folder / f"{name}.png")
    _save(lambda tree, path: path.write_text(json.dumps(tree)), {"counts": numbers}, folder / "subclasses.json")


def _save(write: Callable[[Any, Path], None], value: Any, path: str | Path) -> None:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    write(value, Path(path))


FAMILIES: dict[str, Family] = {
    "fully_sup": Family(
        ("*/*_cityscapes*.yaml",),
        "fully_sup.supervised:Supervised",
        "labeled",
    ),
    "ltss_benchmark": Family(
        ("ade20k_full/*/*R50*.yaml",),
        "ltss_benchmark.methods:build_method",
        "labeled",
    ),
    "semi_sup": Family(
        (
            *(f"{data}_1over*_{method}.json" for data in ("voc", "city") for method in ("baseline", "usrn")),
            # ADE20K's 150 classes have no toy scenes
            *(f"{folder}/{data}_*.yaml" for folder in ("unimatch", "unimatch_v2") for data in SEMI_DATA),
            "u2pl_base/cityscapes_*.yaml",
        ),
        "semi_sup.config:build_method",
        "labeled",
        semi_files,
        resolve="semi_sup.config:resolve",
    ),
    "uda": Family(
        (
            *("*_to_cityscapes/warm_up.yaml", "*_to_cityscapes/stage?.yaml"),
            *("[dhm]*/[gs]*_to_cityscapes*.yaml", "[dhm]*/cityscapes_to_*.yaml"),
        ),
        "uda.train:build_method",
        "source",
        uda_files,
        full_banks,
        resolve="scripts.bench.families:uda_weights",
    ),
}


def official() -> dict[str, Path]:
    """Every official config by its name: family, folder and stem."""
    found: dict[str, Path] = {}
    for name, family in FAMILIES.items():
        base = ROOT / name / "configs"
        paths = sorted({path for pattern in family.configs for path in base.glob(pattern)})
        found |= {f"{name}/{path.relative_to(base).with_suffix('')}": path for path in paths}
    return found


def family_of(path: Path) -> Family:
    """The family of a config file, by the folder that it lies in. ValueError for any other."""
    for name, family in FAMILIES.items():
        if ROOT / name in path.resolve().parents:
            return family
    raise ValueError(f"{path}: not a config of {', '.join(FAMILIES)}; it has to lie in one of their folders")
