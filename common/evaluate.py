"""Evaluation of a model or method on a data set: one confusion matrix over all ranks, as a dict that JSON can hold."""

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from common.config import EvalConfig
from common.data import IGNORE
from common.inference import edge_size, predict_labels
from common.metrics import ConfusionMatrix, group_scores, scores, tail_miou


def evaluate(
    model: nn.Module,
    dataset: Any,
    cfg: EvalConfig,
    *,
    device: torch.device | str,
    rank: int = 0,
    world: int = 1,
    groups: Mapping[str, Sequence[str]] | None = None,
    save_predictions: str | Path | None = None,
    keep: Callable[[str, Tensor], None] | None = None,
    panels: str | Path | None = None,
) -> dict[str, Any]:
    """Scores of `model` (a network, or a method that owns one) on `dataset`, at each label's own size.

    Every rank takes every `world`-th image and gets the scores of all of them. Modules are put into evaluation mode
    and back. `dataset` gives `load(index)` (image uint8 (H, W, 3), label int16 (h, w), name) and `row`.

    groups: level -> each class's group, for the rare, common and frequent means. save_predictions: folder for one PNG
    an image in the data set's stored values. keep: is given the name and the predicted classes (H, W) of every image
    of this rank. panels: folder for `cfg.panels` images with truth and prediction, the same for every run.

    Returns scores in 0..1 (None where undefined): `convention`, `miou`, `miou_tail`, `macc`, `aacc`, `fwiou`,
    `groups`, `per_class` (id, name, color, tail, groups, iou, acc, pixels, train_pixels), `confusion` (rows truth),
    `images`, `seconds`, `ms_per_image`.
    Raises ValueError for data without labels or classes that do not fit.
    """
    row, classes = dataset.row, len(dataset.row.classes)
    if not len(dataset):
        raise ValueError(f"{row.name}: nothing to evaluate, the split is empty")
    chosen = evenly(len(dataset), cfg.max_images or len(dataset))
    shown = {chosen[i] for i in evenly(len(chosen), cfg.panels)} if panels else set()
    matrix, mirrored = ConfusionMatrix(classes, device), mirrored_classes(row)
    start = time.monotonic()
    with torch.no_grad(), evaluation_mode(model):
        for samples in _loader(dataset, chosen[rank::world], cfg):
            _raise_first(samples)
            for sample, pred in zip(samples, _predict(model, samples, cfg, device, mirrored), strict=True):
                matrix.update(pred, sample["label"].to(device))
                if keep is not None:
                    keep(sample["name"], pred)
                if save_predictions:
                    _save_prediction(Path(save_predictions), sample["name"], pred, row)
                if sample["index"] in shown:
                    _save_panel(Path(panels), sample, pred, row)
        total = matrix.reduce()
    seconds = time.monotonic() - start
    return {
        **summarise(total, row, cfg.convention, groups),
        "images": len(chosen),
        "seconds": round(seconds, 3),
        "ms_per_image": round(1000 * seconds / max(len(chosen[rank::world]), 1), 3),
    }


def summarise(
    matrix: Tensor | np.ndarray, row: Any, convention: str, groups: Mapping[str, Sequence[str]] | None = None
) -> dict[str, Any]:
    """What `evaluate` returns about a confusion matrix (K, K) of the data set `row`."""
    got, counts = scores(matrix, convention), np.asarray(matrix)
    pixels = counts.sum(1)
    per_class = [
        {
            "id": k,
            "name": name,
            "color": [int(v) for v in row.palette[k]],
            "tail": k in row.tail,
            "groups": {level: str(names[k]) for level, names in (groups or {}).items()},
            "iou": _number(got["iou"][k]),
            "acc": _number(got["acc"][k]),
            "pixels": int(pixels[k]),
            "train_pixels": row.counts[k] if row.counts else None,
        }
        for k, name in enumerate(row.classes)
    ]
    means = group_scores(matrix, groups, convention) if groups else {}
    return {
        "dataset": row.name,
        "convention": convention,
        "miou": _number(got["miou"]),
        "miou_tail": _number(tail_miou(got["iou"], row.tail)),
        "macc": _number(got["macc"]),
        "aacc": _number(got["aacc"]),
        "fwiou": _number(got["fwiou"]),
        "groups": {level: {k: _number(v) for k, v in values.items()} for level, values in means.items()},
        "per_class": per_class,
        "confusion": counts.tolist(),
    }


def _number(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def evenly(length: int, count: int) -> list[int]:
    """At most `count` of `length` indices, evenly spread: frames of a video differ more than neighbours do."""
    count = min(count, length)
    return [i * length // count for i in range(count)]


@contextlib.contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Put every module into evaluation mode; afterwards each is as it was (a frozen teacher stays frozen)."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def mirrored_classes(row: Any) -> list[int] | None:
    """The class that each one is in a mirrored image; None where left and right are not told apart."""
    if not row.flip_pairs:
        return None
    classes = list(range(len(row.classes)))
    for left, right in row.flip_pairs:
        classes[left], classes[right] = right, left
    return classes


def network_input(image: np.ndarray, cfg: EvalConfig) -> Tensor:
    """The tensor (3, h, w) uint8 that the network gets of an image (H, W, 3): at its own size or, where the config
    gives `short_edge`, resized by `edge_size` with Pillow, as detectron2 does."""
    if cfg.short_edge is not None:
        height, width = edge_size(image.shape[:2], cfg.short_edge, cfg.max_edge or math.inf)
        image = np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR))
    return torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)))


class _Samples(Dataset):
    """The chosen images as tensors, ready for the device."""

    def __init__(self, dataset: Any, indices: Sequence[int], cfg: EvalConfig):
        self.dataset, self.indices, self.cfg = dataset, indices, cfg

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, position: int) -> dict[str, Any] | Exception:
        try:
            return self._load(self.indices[position])
        except (ValueError, OSError) as error:  # raised in a loader process it would arrive with a whole traceback
            return ValueError(str(error))

    def _load(self, index: int) -> dict[str, Any]:
        sample = self.dataset.load(index)
        if sample.get("label") is None:
            raise ValueError(f"{sample['name']}: evaluation needs labels; set `labels: true` for this split")
        return {
            "image": network_input(sample["image"], self.cfg),
            "label": torch.from_numpy(sample["label"]),
            "name": sample["name"],
            "index": index,
        }


def _loader(dataset: Any, indices: Sequence[int], cfg: EvalConfig) -> DataLoader:
    return DataLoader(
        _Samples(dataset, indices, cfg),
        batch_size=cfg.batch_size,
        num_workers=min(cfg.workers, len(indices)),
        collate_fn=list,
        generator=torch.Generator(),  # its own, so that the training's random numbers do not move
    )


def _raise_first(samples: Sequence[dict[str, Any] | Exception]) -> None:
    for sample in samples:
        if isinstance(sample, Exception):
            raise sample


def _predict(
    model: Any,
    samples: list[dict[str, Any]],
    cfg: EvalConfig,
    device: torch.device | str,
    mirrored: Sequence[int] | None,
) -> list[Tensor]:
    """Predicted classes of every sample at its label's size; one pass for the whole batch where all sizes agree."""
    together = len({(s["image"].shape, s["label"].shape) for s in samples}) == 1
    batches = [samples] if together else [[sample] for sample in samples]
    result: list[Tensor] = []
    for batch in batches:
        images = torch.stack([sample["image"] for sample in batch]).to(device)
        result += predict_labels(model, images, cfg, tuple(batch[0]["label"].shape), mirrored).unbind()
    return result


def _save_prediction(folder: Path, name: str, pred: Tensor, row: Any) -> None:
    """`<folder>/<name>.png` in the data set's stored values, so that its own tools read it."""
    values = stored_values(row)
    colours = dict(zip(values.tolist(), row.palette, strict=True))
    write_label(folder / f"{name}.png", values[pred.cpu().numpy()], colours)


def stored_values(row: Any) -> np.ndarray:
    """The value that stands for each class in the data set's own label files (K,); of several the lowest.

    Where labels are coded by colour, or a class has no value of its own, these are the class ids.
    """
    ids = np.arange(len(row.classes))
    if not row.label_maps or row.encoding == "rgb":
        return ids
    _, mapping = row.label_maps[-1]  # the last entry is the files' general form
    lowest = {k: value for value, k in sorted(mapping.items(), reverse=True)}
    return np.array([lowest[k] for k in ids]) if set(ids.tolist()) <= lowest.keys() else ids


def _save_panel(folder: Path, sample: dict[str, Any], pred: Tensor, row: Any) -> None:
    """`<index>_{image,truth,prediction}.png`; labels as class ids, 255 (65535 in 16 bits) where ignored."""
    stem, colours = f"{sample['index']:05d}", dict(enumerate(row.palette))
    folder.mkdir(parents=True, exist_ok=True)
    Image.fromarray(sample["image"].permute(1, 2, 0).numpy()).save(folder / f"{stem}_image.png")
    write_label(folder / f"{stem}_truth.png", sample["label"].numpy(), colours)
    write_label(folder / f"{stem}_prediction.png", pred.cpu().numpy(), colours)


def write_label(path: Path, values: np.ndarray, colours: Mapping[int, Sequence[int]]) -> None:
    """Write values (H, W) as an 8-bit palette PNG, or 16-bit grey where they need it; IGNORE becomes the highest."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if max(colours) > 254:
        Image.fromarray(np.where(values == IGNORE, 65535, values).astype(np.uint16)).save(path)
        return
    image = Image.fromarray(np.where(values == IGNORE, 255, values).astype(np.uint8), mode="P")
    palette = np.zeros((256, 3), np.uint8)
    palette[255] = 255
    palette[list(colours)] = list(colours.values())
    image.putpalette(palette.tobytes())
    image.save(path)


def format_table(result: Mapping[str, Any], baseline: Mapping[str, Any] | None = None) -> str:
    """The scores as a console table in percent, with the change against `baseline` (another result) in points.

    `*` marks a tail class. A baseline of another convention is refused (ValueError): the difference means nothing.
    """
    if baseline is not None and baseline["convention"] != result["convention"]:
        raise ValueError(
            f"baseline was scored by {baseline['convention']}, this run by {result['convention']}; "
            "evaluate both with the same eval.convention"
        )
    names = {"mIoU": "miou", "mIoU(tail)": "miou_tail", "mAcc": "macc", "aAcc": "aacc", "FreqW": "fwiou"}
    lines = [(name, result[key], baseline and baseline[key]) for name, key in names.items()]
    for level, means in result["groups"].items():
        before = (baseline or {}).get("groups", {}).get(level, {})
        lines += [(f"mIoU {level}-level {group}", value, before.get(group)) for group, value in means.items()]
    count = len(lines)
    before = {item["name"]: item["iou"] for item in (baseline or {}).get("per_class", ())}
    lines += [(_marked(item), item["iou"], before.get(item["name"])) for item in result["per_class"]]
    wide = max(len(name) for name, *_ in lines)
    text = [_line(wide, *line, compared=baseline is not None) for line in lines]
    rule = "-" * len(text[0])
    title = f"{result['dataset']}: {result['images']} images, convention {result['convention']}, in percent"
    return "\n".join([title, rule, *text[:count], rule, *text[count:]])


def _marked(item: Mapping[str, Any]) -> str:
    return item["name"] + (" *" if item["tail"] else "")


def _line(wide: int, name: str, value: float | None, before: float | None, compared: bool) -> str:
    text = f"{name:<{wide}}  {'-' if value is None else f'{100 * value:.2f}':>6}"
    if compared:
        change = "-" if value is None or before is None else f"{100 * (value - before):+.2f}"
        text += f"  {change:>7}"
    return text
