"""What a trained network says about every target image: soft and hard pseudo-labels, prototypes, class distribution."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import Dataset

from common import console
from common.config import Config, ConfigError
from common.data import SegmentationDataset
from common.data.loading import batches, only
from common.engine.runtime import arranged, use_tf32
from common.files import follow, load_array, read_artifact, replacing
from common.ops.resize import resize_rows
from uda.base import CONFIDENCE_STEPS, network_of
from uda.config import command

# share of an image that a class needs for its mean feature to count (release: 10 cells)
FEWEST = 10 / (129 * 257)
# image-level vectors after which a prototype's running mean becomes a moving average
MEMORY = 3000


class TargetImages(Dataset):
    """Whole target training images, without labels and without augmentation."""

    def __init__(
        self,
        cfg: Config,
        stream: str = "target",
        skip: Callable[[str], bool] = lambda name: False,
    ):
        if stream not in cfg.data.streams:
            raise ConfigError(f"{cfg.name}: data.streams has no {stream!r}")

        source = replace(cfg.data.streams[stream], labels=False, maps={})
        self.dataset = SegmentationDataset(source)
        if not len(self.dataset):
            raise ValueError(f"{self.dataset.root}: no target images in split {source.split!r}")

        self.indices = [i for i, name in enumerate(self.dataset.names) if not skip(name)]

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, position: int) -> tuple[str, Tensor]:
        sample = self.dataset.load(self.indices[position])
        return sample["name"], torch.from_numpy(
            np.ascontiguousarray(sample["image"].transpose(2, 0, 1))
        )


def checkpoint_of(cfg: Config, chosen: str | None) -> Path:
    """The checkpoint that is chosen, else the newest of the stage's run. ValueError where it is not there."""
    path = Path(chosen) if chosen else follow(cfg.folder / "checkpoints" / "last")
    if not path.exists():
        raise ValueError(
            f"{path}: no checkpoint there; {command('train.py', path)} makes it, or give --checkpoint"
        )
    return path


def open_network(
    cfg: Config, checkpoint: str | None, device: torch.device, prefix: str | None = None
) -> nn.Module:
    """The stage's network in evaluation mode, from `checkpoint` or the newest of the stage's run.

    prefix: the network inside a checkpoint of ours, e.g. "teacher."; None: the one that the method predicts with.
    """
    use_tf32(cfg.train, device)
    network = network_of(cfg.model, checkpoint_of(cfg, checkpoint), prefix).to(device).eval()
    return arranged(network, cfg.train.channels_last, device)


def images(
    data: TargetImages, workers: int, device: torch.device, what: str
) -> Iterator[tuple[str, Tensor]]:
    """Name and image (1, 3, H, W) on the device, one by one, under a progress bar."""
    loaded = batches(data, only, min(workers, len(data)))
    for name, image in console.bar(loaded, what=what, total=len(data)):
        yield name, image[None].to(device)


@torch.no_grad()
def write_soft(
    model: nn.Module, data: TargetImages, folder: Path, workers: int, device: torch.device
) -> None:
    """Class probabilities float16 (C, h, w) at the network's stride, `<name>.npy`."""
    for name, image in images(data, workers, device, "soft pseudo-labels"):
        probabilities = model(image)["logits"].float().softmax(1)[0]
        with whole(folder / f"{name}.npy") as draft:
            np.save(draft, probabilities.half().cpu().numpy())


@torch.no_grad()
def write_hard(
    model: nn.Module,
    data: TargetImages,
    folder: Path,
    workers: int,
    device: torch.device,
    flip: bool = True,
) -> None:
    """`<name>.png` with class ids and `<name>_conf.png` with the confidence in 254ths, rounded down, at image size.

    Probabilities (with `flip` the mean of the image's and its mirror's) are resized bilinearly, corners aligned.
    """
    for name, image in images(data, workers, device, "hard pseudo-labels"):
        probabilities = model(image)["logits"].float().softmax(1)
        # mirroring commutes with the resize, so the mean is taken at the network's stride
        if flip:
            probabilities = (
                probabilities + model(image.flip(3))["logits"].float().softmax(1).flip(3)
            ) / 2

        label, confidence = best_class(probabilities, tuple(image.shape[-2:]))
        values = (confidence * CONFIDENCE_STEPS).floor().clamp(max=CONFIDENCE_STEPS)

        # the label last: it marks the pair as complete
        for end, value in (("_conf.png", values), (".png", label)):
            picture = Image.fromarray(value.byte().cpu().numpy())
            with whole(folder / f"{name}{end}") as draft:
                picture.save(draft)


def best_class(
    probabilities: Tensor, size: tuple[int, int], rows: int = 128
) -> tuple[Tensor, Tensor]:
    """Class and its probability (H, W) after a bilinear resize of (1, C, h, w), made in bands of rows."""
    label = []
    confidence = []

    for start in range(0, size[0], rows):
        band = resize_rows(probabilities, size, (start, min(start + rows, size[0])), True)[0]
        best = band.max(0)
        confidence.append(best.values)
        label.append(best.indices)

    return torch.cat(label), torch.cat(confidence)


@torch.no_grad()
def prototypes(
    model: nn.Module, data: TargetImages, workers: int, device: torch.device, epochs: int = 4
) -> Tensor:
    """Mean feature of each class (C, D): a running mean over image-level means, every image alike whatever its area.

    An image's mean of a class is taken over the pixels predicted as it, if there are enough. The release runs
    four identical passes over the images, which matters only beyond 3000 vectors; here the vectors are kept instead.
    A class that no image shows gets a prototype of 0, with a warning.
    """
    outs = (model(image) for _, image in images(data, workers, device, "prototypes"))
    pairs = [class_sums(out["logits"][0], out["features"][0]) for out in outs]
    sums, counts = (torch.stack(values).double().cpu() for values in zip(*pairs, strict=True))
    means = sums / counts.clamp(min=1)[..., None]
    shown = enough(counts)
    if not shown.any(0).all():
        missing = [
            data.dataset.row.classes[k] for k in torch.nonzero(~shown.any(0)).flatten().tolist()
        ]
        warn_absent(missing)

    result = torch.zeros_like(means[0])
    seen = torch.zeros(means.shape[1], dtype=torch.float64)

    for _ in range(epochs):
        for mean, here in zip(means, shown, strict=True):
            share = (here / (seen + 1))[:, None]
            result += share * (mean - result)
            seen = (seen + here.double()).clamp(max=MEMORY)

    return result.float()


def class_sums(logits: Tensor, features: Tensor) -> tuple[Tensor, Tensor]:
    """Sum of the features (C, D) and number (C,) of the pixels predicted as each class, of one image (C|D, h, w)."""
    logits = logits.flatten(1)
    features = features.flatten(1)
    onehot = F.one_hot(logits.argmax(0), len(logits)).to(features.dtype)
    return (features @ onehot).T, onehot.sum(0)


def enough(counts: Tensor) -> Tensor:
    """Which classes have enough pixels for a mean, bool (…, C), from all classes' counts (…, C) in an image.

    The release asks for 10 of the 129×257 cells of its images; another grid for the same share, and one cell at least.
    """
    fewest = (counts.sum(-1, keepdim=True) * FEWEST).round().clamp(min=1)
    return counts >= fewest


def warn_absent(classes: list[str]) -> None:
    """Rectification has nothing to say about a class without a prototype."""
    names = ", ".join(classes)
    message = f"hardly ever predicted in the target, prototype 0: {names}; stage 1 leaves them to the soft labels"
    warnings.warn(message, stacklevel=3)


@torch.no_grad()
def class_distribution(
    model: nn.Module, data: TargetImages, workers: int, device: torch.device
) -> Tensor:
    """Share of each class among the predicted pixels at the network's stride, float64 (C,)."""
    counts = torch.zeros(model.num_classes, dtype=torch.float64)
    for _, image in images(data, workers, device, "class distribution"):
        label = model(image)["logits"].argmax(1).flatten()
        counts += torch.bincount(label, minlength=len(counts)).cpu()

    return counts / counts.sum()


def distribution_of_soft(folder: Path, names: list[str], classes: int) -> Tensor:
    """The same from soft pseudo-labels on disk: no pass over the images."""
    counts = np.zeros(classes, np.int64)
    for name in console.bar(names, what="class distribution"):
        best = read_artifact(folder / f"{name}.npy", load_array).argmax(0)
        counts += np.bincount(best.ravel(), minlength=classes)

    return torch.from_numpy(counts / counts.sum())


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A draft of one of many files, which a power cut may cost: the step that writes them checks what is there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path, sync=False) as draft:
        yield draft
