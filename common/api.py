"""The project from Python, in a notebook or a program of your own: what docs/api.md shows, from one place."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from torch import Tensor, nn

from common import distributed
from common.config import Config, EvalConfig, ModelConfig, SourceConfig, load_config, typed
from common.data import DatasetRow, SegmentationDataset, Statistics, class_statistics, images
from common.data.catalogue.registry import row_of
from common.engine import Method, MethodContext, fit, prepare, rehearse
from common.evaluation import evaluation_mode, mirrored_classes, network_input
from common.experiment import Experiment
from common.inference import predict_labels
from common.metrics import ConfusionMatrix, Convention, scores
from common.models import SegmentationModel, build_model, load_model, load_weights
from common.models.carried import carried_config
from common.visualize import colourise, overlay

__all__ = [
    "Opened",
    "build",
    "data_set",
    "load_config",
    "load_weights",
    "open_checkpoint",
    "overlay_of",
    "read_image",
    "score",
    "segment",
    "statistics",
    "train",
]


def build(description: Mapping[str, Any] | ModelConfig) -> SegmentationModel:
    """A network from the keys of a config's section `model`. ConfigError for an unknown key, model or option."""
    config = (
        description
        if isinstance(description, ModelConfig)
        else typed(ModelConfig, description, "model")
    )
    return build_model(config)


@dataclass(frozen=True)
class Opened:
    """A trained network in evaluation mode, the config of its run, and what its classes are."""

    model: SegmentationModel
    config: Config
    row: DatasetRow


def open_checkpoint(checkpoint: str | Path, *overrides: str) -> Opened:
    """A run, or one of its checkpoints, which brings its config; overrides: `section.key=value`."""
    config = carried_config(checkpoint, overrides)
    return Opened(load_model(config.model, checkpoint), config, row_of(config.data.val))


def read_image(path: str | Path) -> np.ndarray:
    """An image file as RGB, uint8 (H, W, 3), turned as its camera says. ValueError for a damaged one."""
    return images.read_image(Path(path))


@torch.no_grad()
def segment(
    model: nn.Module,
    image: np.ndarray,
    cfg: EvalConfig | None = None,
    row: DatasetRow | None = None,
) -> np.ndarray:
    """The class of every pixel, int32 (H, W), of an RGB image, uint8 (H, W, 3).

    cfg: how an evaluation would do it (windows, scales, mirrored passes); row: the classes, which `cfg.flip` needs
    where left and right ones change places. The model is left in the mode in which it was.
    """
    cfg = EvalConfig() if cfg is None else cfg
    device = next(model.parameters()).device
    batch = network_input(image, cfg)[None].to(device)
    mirrored = None if row is None else mirrored_classes(row)

    with evaluation_mode(model):
        labels = predict_labels(model, batch, cfg, image.shape[:2], mirrored)

    return labels[0].cpu().numpy().astype(np.int32)


def overlay_of(
    image: np.ndarray,
    labels: np.ndarray,
    palette: Sequence[Sequence[int]],
    opacity: float = 0.5,
) -> np.ndarray:
    """The colours of `labels` (H, W) over `image`, both uint8 (H, W, 3)."""
    return overlay(image, colourise(labels, palette), opacity)


def data_set(description: Mapping[str, Any] | SourceConfig) -> SegmentationDataset:
    """A data set from the keys of a config's section `data`: dataset, root, split, list, labels, folder."""
    source = (
        description
        if isinstance(description, SourceConfig)
        else typed(SourceConfig, description, "data")
    )
    return SegmentationDataset(source)


def statistics(
    dataset: SegmentationDataset, workers: int = 0, cache: str | Path | None = None
) -> Statistics:
    """Pixels of every class in every label; kept in the folder `cache`, where that is given."""
    return class_statistics(dataset, workers, None if cache is None else Path(cache))


def score(
    pairs: Iterable[tuple[np.ndarray | Tensor, np.ndarray | Tensor]],
    num_classes: int,
    convention: Convention = "nan_mean",
) -> dict[str, Any]:
    """Scores of (prediction, truth) pairs of one shape, class ids with −1 where there is no truth, by a named
    convention (`common.metrics`): `iou` and `acc` (K,), `miou`, `macc`, `aacc`, `fwiou`, fractions from 0 to 1."""
    if convention not in get_args(Convention):
        raise ValueError(
            f"convention {convention!r}: is none of {', '.join(get_args(Convention))}"
        )

    matrix = ConfusionMatrix(num_classes)
    for prediction, truth in pairs:
        matrix.update(torch.as_tensor(prediction), torch.as_tensor(truth))

    return scores(matrix.matrix, convention)


def train(
    config: Config,
    build_method: Callable[[Config, MethodContext], Method],
    *,
    counted: str = "labeled",
    device: str | None = None,
    resume: bool = False,
) -> dict[str, Any]:
    """Train as a system's program does, in this process, and return the last validation's result.

    build_method: of the system, e.g. `fully_sup.supervised.build_method`; counted: the stream whose labels say what is
    rare. Checkpoints and logs lie in `config.folder`.
    """
    rehearse(config, build_method)
    experiment = Experiment(config, counted=counted)
    place = distributed.start(device)
    experiment.begin(resume)

    method = prepare(config, build_method, experiment.context, place)
    validate = experiment.evaluator(method, place)
    fit(config, method, experiment.open, validate, device=place, resume=resume)

    return experiment.last_result()
