"""Whole-image, sliding-window and multi-scale inference over a model's (or method's) `predict` and `labels`.

Images are (B, 3, h, w) in 0–255; scores are (B, K, H, W) at `size`, the original image's, or at the input's size.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from common.config import ConfigError, EvalConfig
from common.ops.resize import resize, resize_rows

Size = tuple[int, int]
Span = tuple[int, int]  # pixels [a, b) of an axis
Predict = Callable[[Tensor, Size | None], Tensor]
Rescale = Callable[[Tensor, float], Tensor]
NARROW = 16  # pixels that a window has at least where the border cuts it
BAND = 1 << 22  # scores that a band of rows holds at most


def whole(model: Any, images: Tensor, size: Size | None = None) -> Tensor:
    """Class scores from one pass over the whole image."""
    return model.predict(images, size)


def slide(
    model: Any,
    images: Tensor,
    crop: Size,
    stride: Size,
    size: Size | None = None,
    window_batch: int = 4,
    softmax: bool = False,
    cut: bool = False,
) -> Tensor:
    """Mean of the class scores of overlapping windows, then resized to `size` (MMSegmentation's rule).

    softmax: of the windows' probabilities instead, as UniMatch averages.

    crop, stride: height and width of a window and of its steps. An axis has max(⌈(length − crop) / stride⌉, 0) + 1
    windows; the last one is shifted back to fit, and an image smaller than the crop is one window, unpadded.
    cut: a window begins at every step within the image, and what lies beyond the border is cut off, as in UniMatch V1.
    `window_batch` windows of one size (of any images of the batch) go through the model at once.
    """
    height, width = images.shape[-2:]
    rows = window_spans(height, crop[0], stride[0], cut)
    columns = window_spans(width, crop[1], stride[1], cut)
    alike = _of_one_size(len(images), rows, columns)
    total: Tensor | None = None

    for places in (part for group in alike for part in _split(group, window_batch)):
        windows = torch.stack(
            [images[b, :, y:bottom, x:right] for b, (y, bottom), (x, right) in places]
        )
        scores = model.predict(windows, None)
        scores = scores.softmax(1) if softmax else scores
        if total is None:
            total = scores.new_zeros((len(images), scores.shape[1], height, width))

        for (b, (y, bottom), (x, right)), window in zip(places, scores, strict=True):
            total[b, :, y:bottom, x:right] += window

    assert total is not None, "a batch holds at least one image"
    if len(rows) * len(columns) > 1:
        total /= _coverage(rows, height, total)[:, None] * _coverage(columns, width, total)

    return total if size is None else resize(total, size, network(model).align_corners)


def window_spans(length: int, crop: int, stride: int, cut: bool = False) -> list[Span]:
    """The windows along one axis, in pixels; see `slide`."""
    if crop < 1 or stride < 1:
        raise ValueError(
            f"a window of {crop} pixels with a stride of {stride}: both must be at least 1"
        )
    if cut:
        spans = [(start, min(start + crop, length)) for start in range(0, length, stride)]
        narrow = spans[-1][1] - spans[-1][0]
        if len(spans) > 1 and narrow < NARROW:
            raise ValueError(
                f"eval.windows: cut leaves {narrow} of {length} pixels to the last window, too few for a network; "
                f"change eval.stride ({stride}), or take windows: shifted"
            )
        return spans

    last = max(length - crop, 0)
    starts = [min(i * stride, last) for i in range(-(-last // stride) + 1)]
    return [(start, start + min(crop, length)) for start in starts]


Place = tuple[int, Span, Span]  # of a window: number of the image, rows, columns


def _of_one_size(
    images: int, rows: Sequence[Span], columns: Sequence[Span]
) -> list[list[Place]]:
    """All windows, those of one size together."""
    groups: dict[Size, list[Place]] = {}
    for b, row, column in product(range(images), rows, columns):
        size = (row[1] - row[0], column[1] - column[0])
        groups.setdefault(size, []).append((b, row, column))

    return list(groups.values())


def _split(places: list[Place], most: int) -> list[list[Place]]:
    return [places[first : first + most] for first in range(0, len(places), most)]


def _coverage(spans: Sequence[Span], length: int, like: Tensor) -> Tensor:
    """How many windows cover each of `length` positions; the windows of an image are a product of two axes."""
    counts = torch.zeros(length, dtype=like.dtype)
    for start, end in spans:
        counts[start:end] += 1

    return counts.to(like.device)


def by_factor(images: Tensor, factor: float) -> Tensor:
    """Images resized bilinearly without antialiasing, to sides rounded half up."""
    height, width = images.shape[-2:]
    return resize(images.float(), (int(height * factor + 0.5), int(width * factor + 0.5)))


def edge_size(size: Size, short: float, longest: float) -> Size:
    """detectron2's rule: the shorter side becomes `short`, unless the longer would exceed `longest`."""
    scale = short / min(size)
    if scale * max(size) > longest:
        scale = longest / max(size)

    return int(size[0] * scale + 0.5), int(size[1] * scale + 0.5)


def multi_scale(
    predict: Predict,
    images: Tensor,
    scales: Sequence[float],
    flip: bool,
    size: Size | None = None,
    *,
    softmax: bool = True,
    rescale: Rescale = by_factor,
    mirrored_classes: Sequence[int] | None = None,
) -> Tensor:
    """Mean of the softmax maps at `size` over scaled and, with `flip`, also mirrored images.

    `predict(images, size)` gives scores, by `whole` or `slide`. Without `softmax` the scores themselves are averaged,
    as detectron2 does (a query model's are sums of probabilities already); a network says so by `average_softmax`.
    mirrored_classes: (K,) the class that each one is in a mirrored image, where left and right are told apart.
    """
    size = size or tuple(images.shape[-2:])
    total: Tensor | None = None

    for scale in scales:
        scaled = rescale(images, scale)
        for mirrored in (False, True) if flip else (False,):
            scores = predict(scaled.flip(-1) if mirrored else scaled, size)
            scores = scores.softmax(1) if softmax else scores
            if mirrored:
                scores = scores.flip(-1)
                scores = (
                    scores if mirrored_classes is None else scores[:, list(mirrored_classes)]
                )

            total = scores if total is None else total.add_(scores)

    if total is None:
        raise ValueError("eval.scales is empty; give at least one scale")

    return total / (len(scales) * (2 if flip else 1))


def predict_scores(
    model: Any,
    images: Tensor,
    cfg: EvalConfig,
    size: Size | None = None,
    mirrored_classes: Sequence[int] | None = None,
) -> Tensor:
    """Class scores (B, K, H, W) as the config's mode, scales and flip ask for."""
    predict = _single(model, cfg)
    if not _augmented(cfg):
        return predict(images, size)

    options = {
        "softmax": _softmaxed(network(model), cfg),
        "rescale": _rescale(cfg),
        "mirrored_classes": mirrored_classes,
    }

    return multi_scale(predict, images, cfg.scales, cfg.flip, size, **options)


def predict_labels(
    model: Any,
    images: Tensor,
    cfg: EvalConfig,
    size: Size | None = None,
    mirrored_classes: Sequence[int] | None = None,
    offsets: Tensor | None = None,
) -> Tensor:
    """Predicted classes (B, H, W), int64: the argmax of `predict_scores`.

    Without test-time augmentation no K-channel map is made at `size`: whole mode leaves that to the model, and of the
    mean of the windows only a band of rows is resized at a time (`score_bands`).
    offsets: (K,), of post-hoc logit adjustment (`common.evaluation.adjustment`); see `adjusted`.
    """
    if cfg.mode == "whole" and not _augmented(cfg):
        return (
            model.labels(images, size)[0]
            if offsets is None
            else model.labels(images, size, offsets)[0]
        )

    bands = score_bands(model, images, cfg, size, mirrored_classes, offsets)
    return torch.cat([scores.argmax(1) for _, scores in bands], 1)


def score_bands(
    model: Any,
    images: Tensor,
    cfg: EvalConfig,
    size: Size | None = None,
    mirrored_classes: Sequence[int] | None = None,
    offsets: Tensor | None = None,
) -> Iterator[tuple[Size, Tensor]]:
    """Rows [a, b) after rows, each with the scores (B, K, b−a, W) whose argmax `predict_labels` gives."""
    net = network(model)
    if _augmented(cfg):
        scores = predict_scores(model, images, cfg, size, mirrored_classes)
        logits = _logits(net, cfg) and not _softmaxed(net, cfg)
        yield (0, scores.shape[-2]), adjusted(scores, offsets, logits)
    elif cfg.mode == "whole":
        yield from model.bands(images, size, offsets)
    else:
        scores = _single(model, cfg)(images, None)
        scores = adjusted(scores, offsets, _logits(net, cfg))
        yield from _bands(scores, size, net.align_corners)


def probabilities(model: Any, cfg: EvalConfig, scores: Tensor) -> Tensor:
    """Class probabilities, float32, of the scores (B, K, h, w) of `score_bands`."""
    net = network(model)
    if cfg.window_softmax or _augmented(cfg) and _softmaxed(net, cfg):
        return F.normalize(scores.float(), p=1)  # their sum is 1 unless they were adjusted
    return net.probabilities(scores)


def adjusted(scores: Tensor, offsets: Tensor | None, logits: bool) -> Tensor:
    """Scores (B, K, h, w) with offsets (K,) added to them where they are logits. Where they are probabilities or sums
    of them these are added to their logarithm, up to a constant: multiplying them instead commutes with resizing."""
    if offsets is None:
        return scores

    offsets = offsets.to(scores.device).view(-1, 1, 1)
    return scores + offsets if logits else scores * (offsets - offsets.max()).exp()


def _bands(
    scores: Tensor, size: Size | None, align_corners: bool
) -> Iterator[tuple[Size, Tensor]]:
    """Scores (B, K, h, w) resized to `size`, a band of rows at a time."""
    batch, classes = scores.shape[:2]
    height, width = size = size or tuple(scores.shape[-2:])
    step = max(BAND // (batch * classes * width), 1)

    for start in range(0, height, step):
        rows = (start, min(start + step, height))
        yield rows, resize_rows(scores, size, rows, align_corners)


def _logits(net: Any, cfg: EvalConfig) -> bool:
    """Whether the scores of one pass over an image, by windows or whole, are logits."""
    return getattr(net, "scores_are_logits", True) and not cfg.window_softmax


def _softmaxed(net: Any, cfg: EvalConfig) -> bool:
    """Whether test-time augmentation averages the softmax of such scores."""
    return getattr(net, "average_softmax", True) and not cfg.window_softmax


def _single(model: Any, cfg: EvalConfig) -> Predict:
    if cfg.mode == "whole":
        return partial(whole, model)

    net = network(model)
    if cfg.window_softmax and not getattr(net, "scores_are_logits", True):
        raise ConfigError(
            f"eval.window_softmax: the scores of {type(net).__name__} are no logits; set it to false"
        )

    crop = cfg.crop
    stride = cfg.stride or cfg.crop
    options = (cfg.window_batch, cfg.window_softmax, cfg.windows == "cut")

    return lambda images, size: slide(model, images, crop, stride, size, *options)


def _rescale(cfg: EvalConfig) -> Rescale:
    """How test-time augmentation scales the net's input: by a factor or, with `short_edge`, to a shorter side.

    The latter is detectron2's way, which resizes bytes with antialiasing.
    """
    if cfg.short_edge is None:
        return by_factor

    def to_edge(images: Tensor, scale: float) -> Tensor:
        limit = cfg.scaled_max_edge or (cfg.max_edge or math.inf) * scale
        size = edge_size(tuple(images.shape[-2:]), cfg.short_edge * scale, limit)
        if size == tuple(images.shape[-2:]):
            return images

        return F.interpolate(images.float(), size, mode="bilinear", antialias=True).round_()

    return to_edge


def _augmented(cfg: EvalConfig) -> bool:
    return cfg.flip or tuple(cfg.scales) != (1.0,)


def network(model: Any) -> Any:
    """The network of a method, or the model itself; it owns the upsampling rule."""
    return getattr(model, "network", model)
