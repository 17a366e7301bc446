"""Evaluation of a model or method on a data set: one confusion matrix over all ranks, as a dict that JSON can hold."""

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from common import console
from common.config import EvalConfig
from common.evaluation.calibration import Calibration
from common.evaluation.identity import identity
from common.evaluation.per_image import PerImage
from common.evaluation.pictures import save_panel, save_prediction
from common.evaluation.samples import chosen_images, evenly, sample_batches
from common.evaluation.sums import Sums
from common.inference import predict_labels, probabilities, score_bands


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
    offsets: Tensor | None = None,
    per_image: str | Path | None = None,
) -> dict[str, Any]:
    """Scores of `model` (a network, or a method that owns one) on `dataset`, at each label's own size.

    Every rank takes every `world`-th image and gets the scores of all. Modules are in evaluation mode meanwhile.
    `dataset`: a SegmentationDataset (`load(index)`, `row`, `records`, `source`).

    groups: level -> each class's group, for the rare, common and frequent means. save_predictions: folder for one PNG
    an image in the data set's stored values. keep: is given the name and the predicted classes (H, W) of every image
    of this rank. panels: folder for `cfg.panels` images with truth and prediction, the same for every run.
    offsets: (K,), what `cfg.logit_adjustment` adds to the logits (see `adjustment.offsets_of`).
    per_image: file for the confusion matrix of every image, where `cfg.per_image` asks for it.

    Returns scores in 0..1 (None where undefined): `convention`, `miou`, `miou_tail`, `macc`, `aacc`, `fwiou`,
    `groups`, `per_class` (id, name, color, tail, groups, iou, acc, precision, recall, pixels, train_pixels),
    `confusion` (rows truth), `identity` (what was evaluated and how), `logit_adjustment` (τ), `images`, `seconds`,
    `ms_per_image`; with `cfg.boundary` and `cfg.calibration` what `with_boundaries` and `with_calibration` of
    summary.py add. ValueError for data without labels or classes that do not fit.
    """
    check(dataset, cfg, offsets)
    chosen = chosen_images(dataset, cfg)
    mine = chosen[rank::world]
    tally = Tally(dataset, chosen, cfg, device, save_predictions, keep, panels, per_image)
    start = time.monotonic()

    with prediction(model, mine) as bar:
        for samples in sample_batches(dataset, mine, cfg):
            predicted = predict_batch(
                model, samples, dataset.row, cfg, device, offsets, tally.sums.calibration
            )
            tally.add(samples, predicted)
            bar.update(len(samples))

    result = tally.result(groups)
    return result | times(time.monotonic() - start, len(mine))


class Tally:
    """What is counted of one model's predictions, and kept of them; the arguments are those of `evaluate`."""

    def __init__(
        self,
        dataset: Any,
        chosen: Sequence[int],
        cfg: EvalConfig,
        device: torch.device | str,
        save_predictions: str | Path | None = None,
        keep: Callable[[str, Tensor], None] | None = None,
        panels: str | Path | None = None,
        per_image: str | Path | None = None,
    ):
        self.dataset = dataset
        self.chosen = chosen
        self.cfg = cfg
        self.device = device
        self.save_predictions = save_predictions
        self.keep = keep
        self.panels = panels
        self.per_image = per_image

        self.sums = Sums(dataset.row, cfg, device)
        self.single = PerImage(dataset, chosen, device) if per_image and cfg.per_image else None
        self.shown = {chosen[i] for i in evenly(len(chosen), cfg.panels)} if panels else set()

    def add(self, samples: Sequence[dict[str, Any]], predicted: Sequence[Tensor]) -> None:
        """Count the predicted classes (H, W) of some samples."""
        for sample, pred in zip(samples, predicted, strict=True):
            counted = self.sums.add(pred, sample["label"].to(self.device))
            if self.single is not None:
                self.single.add(sample["index"], counted)
            if self.keep is not None:
                self.keep(sample["name"], pred)
            panels = self.panels if sample["index"] in self.shown else None
            _save_pictures(sample, pred, self.dataset.row, self.save_predictions, panels)

    def result(self, groups: Mapping[str, Sequence[str]] | None = None) -> dict[str, Any]:
        """What an evaluation says, its times apart; the counts are those of all ranks."""
        summary = self.sums.summary(groups)
        if self.single is not None:
            self.single.write(Path(self.per_image))

        return {
            **summary,
            "identity": identity(self.dataset, self.chosen, self.cfg),
            "logit_adjustment": self.cfg.logit_adjustment,
            "images": len(self.chosen),
        }


def times(seconds: float, images: int) -> dict[str, float]:
    """How long this rank took for its images."""
    pace = 1000 * seconds / max(images, 1)
    return {"seconds": round(seconds, 3), "ms_per_image": round(pace, 3)}


@contextlib.contextmanager
def prediction(model: nn.Module, indices: Sequence[int]) -> Iterator[Any]:
    """A bar for the images that are evaluated; the model is in evaluation mode meanwhile, and makes no graph."""
    with (
        torch.no_grad(),
        evaluation_mode(model),
        console.bar(what="evaluating", total=len(indices)) as bar,
    ):
        yield bar


def _save_pictures(
    sample: dict[str, Any],
    pred: Tensor,
    row: Any,
    predictions: str | Path | None,
    panels: str | Path | None,
) -> None:
    """The PNG files of one image, in the folders that are given."""
    if predictions:
        save_prediction(Path(predictions), sample["name"], pred, row)
    if panels:
        save_panel(Path(panels), sample, pred, row)


def check(dataset: Any, cfg: EvalConfig, offsets: Tensor | None) -> None:
    if cfg.logit_adjustment and offsets is None:
        raise ValueError(
            f"eval.logit_adjustment: {cfg.logit_adjustment:g} needs the offsets that it stands for"
        )
    if not len(dataset):
        raise ValueError(f"{dataset.row.name}: nothing to evaluate, the split is empty")


@contextlib.contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Put every module into evaluation mode; afterwards each is as it was (a frozen teacher stays frozen).

    Meanwhile cuDNN does not time its algorithms, which it would do for every convolution at each new size of image.
    """
    training = [module for module in model.modules() if module.training]
    timed = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = False
    model.eval()

    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = timed
        for module in training:
            module.training = True


def mirrored_classes(row: Any) -> list[int] | None:
    """The class that each one is in a mirrored image; None where left and right are not told apart."""
    if not row.flip_pairs:
        return None

    classes = list(range(len(row.classes)))

    for left, right in row.flip_pairs:
        classes[left] = right
        classes[right] = left

    return classes


def predict_batch(
    model: Any,
    samples: Sequence[dict[str, Any]],
    row: Any,
    cfg: EvalConfig,
    device: torch.device | str,
    offsets: Tensor | None,
    calibration: Calibration | None = None,
) -> list[Tensor]:
    """Predicted classes of every sample at its label's size; one pass for the whole batch where all sizes agree.

    What the probabilities were is counted in `calibration`, if there is one.
    """
    mirrored = mirrored_classes(row)
    together = len({(s["image"].shape, s["label"].shape) for s in samples}) == 1
    batches = [samples] if together else [[sample] for sample in samples]
    result: list[Tensor] = []

    for batch in batches:
        images = torch.stack([sample["image"] for sample in batch]).to(device)
        size = tuple(batch[0]["label"].shape)
        if calibration is None:
            labels = predict_labels(model, images, cfg, size, mirrored, offsets)
        else:
            truth = torch.stack([sample["label"] for sample in batch]).to(device)
            bands = score_bands(model, images, cfg, size, mirrored, offsets)
            labels = _calibrated(bands, truth, partial(probabilities, model, cfg), calibration)

        result += labels.unbind()

    return result


def _calibrated(
    bands: Iterator[tuple[tuple[int, int], Tensor]],
    truth: Tensor,
    to_probabilities: Callable[[Tensor], Tensor],
    calibration: Calibration,
) -> Tensor:
    """The classes (B, H, W) with the highest scores of each band, whose probabilities are counted on the way."""
    labels = []

    for rows, scores in bands:
        calibration.update(to_probabilities(scores), truth[:, slice(*rows)])
        labels.append(scores.argmax(1))

    return torch.cat(labels, 1)
