"""Sliding windows, test-time augmentation and label maps against loops and closed forms."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from common.config import ConfigError, EvalConfig
from common.inference import (
    multi_scale,
    predict_labels,
    predict_scores,
    probabilities,
    score_bands,
    slide,
    whole,
    window_spans,
)
from common.models.segmentor import SegmentationModel


class Pixelwise(SegmentationModel):
    """Logits that depend on one pixel each, so that every window agrees with the whole image."""

    def __init__(self, align_corners=False):
        super().__init__(4, (0.0, 0.0, 0.0), (255.0, 255.0, 255.0), align_corners)
        self.conv = nn.Conv2d(3, 4, 1)
        self.seen = []

    def segment(self, x):
        self.seen.append(tuple(x.shape))
        return {"logits": self.conv(x)}


class Contextual(Pixelwise):
    """Logits that also depend on the window's mean."""

    def segment(self, x):
        out = super().segment(x)["logits"]
        return {"logits": out + 3 * out.mean((2, 3), keepdim=True).sin()}


def windows_by_a_loop(model, images, crop, stride, size):
    """Averages window by window, in the plainest form."""
    h, w = images.shape[-2:]
    total, count = torch.zeros(len(images), 4, h, w), torch.zeros(1, 1, h, w)
    for row in range(max(math.ceil((h - crop[0]) / stride[0]), 0) + 1):
        for column in range(max(math.ceil((w - crop[1]) / stride[1]), 0) + 1):
            bottom, right = min(row * stride[0] + crop[0], h), min(column * stride[1] + crop[1], w)
            top, left = max(bottom - crop[0], 0), max(right - crop[1], 0)
            total[:, :, top:bottom, left:right] += model.predict(images[:, :, top:bottom, left:right])
            count[..., top:bottom, left:right] += 1
    return F.interpolate(total / count, size, mode="bilinear", align_corners=model.align_corners)


@pytest.mark.parametrize(
    ("length", "crop", "stride", "starts"),
    [
        (10, 4, 3, [0, 3, 6]),
        (11, 4, 3, [0, 3, 6, 7]),  # the last one is shifted back
        (4, 4, 3, [0]),
        (3, 4, 3, [0]),  # smaller than the crop
        (5, 4, 3, [0, 1]),
        (2048, 769, 513, [0, 513, 1026, 1279]),
    ],
)
def test_windows_of_an_axis(length, crop, stride, starts):
    assert window_spans(length, crop, stride) == [(start, start + min(crop, length)) for start in starts]


def test_windows_that_the_border_cuts():
    """The numbers of UniMatch V1 on Cityscapes."""
    assert window_spans(1024, 801, 534, cut=True) == [(0, 801), (534, 1024)]
    assert window_spans(2048, 801, 534, cut=True) == [(0, 801), (534, 1335), (1068, 1869), (1602, 2048)]
    assert window_spans(801, 801, 534, cut=True) == [(0, 801), (534, 801)]
    assert window_spans(5, 8, 8, cut=True) == [(0, 5)], "a small image is one window, as elsewhere"
    with pytest.raises(
        ValueError, match=r"cut leaves 1 of 65 pixels to the last window, .*; change eval.stride \(64\)"
    ):
        window_spans(65, 64, 64, cut=True)


@pytest.mark.parametrize("softmax", [False, True])
@pytest.mark.parametrize("window_batch", [1, 3])
@torch.no_grad()
def test_cut_windows_equal_a_loop_over_them(window_batch, softmax):
    """As the release sums them: a window at every step within the image, each of its own size."""
    model, images = Contextual(), torch.randint(256, (2, 3, 58, 70), dtype=torch.uint8)
    crop, stride = (30, 36), (20, 24)
    total, count = torch.zeros(2, 4, 58, 70), torch.zeros(58, 70)
    y = 0
    while y < 58:
        x = 0
        while x < 70:
            scores = model.predict(images[:, :, y : y + 30, x : x + 36], None)
            total[:, :, y : y + 30, x : x + 36] += scores.softmax(1) if softmax else scores
            count[y : y + 30, x : x + 36] += 1
            x += 24
        y += 20

    got = slide(model, images, crop, stride, (58, 70), window_batch, softmax, cut=True)
    torch.testing.assert_close(got, total / count)
    assert got.argmax(1).equal(total.argmax(1)), "the mean has the sum's classes"
    options = {"mode": "slide", "crop": crop, "stride": stride, "window_softmax": softmax, "window_batch": window_batch}
    assert torch.equal(predict_labels(model, images, EvalConfig(**options, windows="cut"), (58, 70)), got.argmax(1))
    assert not torch.equal(predict_labels(model, images, EvalConfig(**options), (58, 70)), got.argmax(1))


def test_cut_windows_without_windows():
    with pytest.raises(ValueError, match="windows: cut has no effect in mode: whole; set mode: slide"):
        EvalConfig(windows="cut")


@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize("window_batch", [1, 3, 100])
@pytest.mark.parametrize(("crop", "stride"), [((8, 10), (5, 6)), ((8, 40), (8, 40)), ((50, 50), (20, 20))])
@torch.no_grad()
def test_slide_equals_a_loop_over_windows(crop, stride, window_batch, align_corners):
    model, images = Contextual(align_corners), torch.randint(256, (2, 3, 21, 30), dtype=torch.uint8)
    for size in [(21, 30), (42, 51)]:
        expected = windows_by_a_loop(model, images, crop, stride, size)
        torch.testing.assert_close(slide(model, images, crop, stride, size, window_batch), expected)
        cfg = EvalConfig(mode="slide", crop=crop, stride=stride, window_batch=window_batch)
        assert torch.equal(predict_labels(model, images, cfg, size), expected.argmax(1))


@torch.no_grad()
def test_windows_are_batched_and_a_small_image_is_one_unpadded_window():
    model = Pixelwise()
    slide(model, torch.zeros(2, 3, 16, 16), (8, 8), (8, 8), None, window_batch=3)
    assert model.seen == [(3, 3, 8, 8), (3, 3, 8, 8), (2, 3, 8, 8)]
    model.seen.clear()
    slide(model, torch.zeros(1, 3, 5, 6), (8, 8), (8, 8))
    assert model.seen == [(1, 3, 5, 6)]


@torch.no_grad()
def test_slide_of_a_pixelwise_model_is_the_whole_image():
    model, images = Pixelwise(), torch.rand(1, 3, 19, 23) * 255
    torch.testing.assert_close(slide(model, images, (8, 8), (5, 5)), whole(model, images))


@torch.no_grad()
def test_multi_scale_averages_the_softmax_of_every_pass():
    model, images = Contextual(), torch.rand(2, 3, 13, 18) * 255
    size, total = (20, 25), 0
    for scaled in [(7, 9), (13, 18), (20, 27)]:  # 0.5 rounds 6.5 up; 1.5 gives 19.5 and 27
        x = F.interpolate(images, scaled, mode="bilinear", align_corners=False)
        total = total + model.predict(x, size).softmax(1)
        total = total + model.predict(x.flip(-1), size).softmax(1).flip(-1)
    got = multi_scale(model.predict, images, (0.5, 1.0, 1.5), True, size)
    torch.testing.assert_close(got, total / 6)
    cfg = EvalConfig(scales=(0.5, 1.0, 1.5), flip=True)
    assert torch.equal(predict_labels(model, images, cfg, size), (total / 6).argmax(1))


@torch.no_grad()
def test_flip_of_a_pixelwise_model_changes_nothing():
    model, images = Pixelwise(), torch.rand(1, 3, 6, 7) * 255
    torch.testing.assert_close(multi_scale(model.predict, images, (1.0,), True), model.predict(images).softmax(1))


@torch.no_grad()
def test_scores_that_are_no_logits_are_averaged_as_they_are():
    model, images = Contextual(), torch.rand(1, 3, 6, 8) * 255
    model.average_softmax = False
    mirrored = model.predict(images.flip(-1)).flip(-1)
    expected = (model.predict(images) + mirrored) / 2
    torch.testing.assert_close(predict_scores(model, images, EvalConfig(flip=True)), expected)


@torch.no_grad()
def test_scales_and_windows_go_together():
    model, images = Contextual(), torch.rand(1, 3, 16, 20) * 255
    cfg = EvalConfig(mode="slide", crop=(8, 8), stride=(6, 6), scales=(1.0, 2.0))
    large = F.interpolate(images, (32, 40), mode="bilinear", align_corners=False)
    small = windows_by_a_loop(model, images, (8, 8), (6, 6), (16, 20)).softmax(1)
    expected = (small + windows_by_a_loop(model, large, (8, 8), (6, 6), (16, 20)).softmax(1)) / 2
    torch.testing.assert_close(predict_scores(model, images, cfg, (16, 20)), expected)


class Wide(SegmentationModel):
    """Says how large a score map it was asked for."""

    def __init__(self):
        super().__init__(400, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
        self.conv = nn.Conv2d(3, 400, 1)
        self.rows = []

    def segment(self, x):
        return {"logits": self.conv(F.avg_pool2d(x, 8))}

    def scores(self, out, geometry, rows):
        self.rows.append(rows[1] - rows[0])
        return super().scores(out, geometry, rows)


@torch.no_grad()
def test_labels_of_many_classes_never_make_the_full_score_map():
    model, images = Wide(), torch.rand(1, 3, 64, 96) * 255
    expected = model.predict(images, (128, 192)).argmax(1)
    model.rows.clear()
    assert torch.equal(predict_labels(model, images, EvalConfig(), (128, 192)), expected)
    assert sum(model.rows) == 128 and max(model.rows) < 64


def test_wrong_settings_are_named():
    model, images = Pixelwise(), torch.zeros(1, 3, 8, 8)
    with pytest.raises(ValueError, match="mode: slide needs crop"):
        EvalConfig(mode="slide")
    with pytest.raises(ValueError, match="stride of 0"):
        slide(model, images, (4, 4), (0, 4))
    with pytest.raises(ValueError, match="eval.scales is empty"):
        multi_scale(model.predict, images, (), False)


class Given(SegmentationModel):
    """The logits of each window are those that its first pixel asks for."""

    def __init__(self, table):
        super().__init__(2, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
        self.table = torch.tensor(table)

    def segment(self, x):
        logits = self.table[x[:, 0, 0, 0].long()]
        return {"logits": logits[..., None, None].expand(-1, -1, *x.shape[2:])}


def test_windows_are_averaged_as_logits_or_as_probabilities():
    """Three windows over the third pixel: one sure of class 0, two less sure of class 1."""
    model = Given([[4.0, 0.0], [0.0, 1.5], [0.0, 1.5]])
    image = torch.zeros(1, 3, 1, 5)
    image[0, 0, 0] = torch.arange(5.0)
    plain = EvalConfig(mode="slide", crop=(1, 3), stride=(1, 1))
    soft = EvalConfig(mode="slide", crop=(1, 3), stride=(1, 1), window_softmax=True)

    torch.testing.assert_close(predict_scores(model, image, plain)[0, :, 0, 2], torch.tensor([4.0, 3.0]) / 3)
    high, low = 1 / (1 + math.exp(-4)), 1 / (1 + math.exp(1.5))
    expected = torch.tensor([high + 2 * low, 3 - high - 2 * low]) / 3
    torch.testing.assert_close(predict_scores(model, image, soft)[0, :, 0, 2], expected)
    assert predict_labels(model, image, plain)[0, 0, 2] == 0 and predict_labels(model, image, soft)[0, 0, 2] == 1

    once_more = EvalConfig(mode="slide", crop=(1, 5), window_softmax=True, scales=(1.0, 1.0))
    torch.testing.assert_close(predict_scores(model, image, once_more)[0, 0, 0, 0], torch.tensor(high))
    offsets = torch.tensor([0.0, 3.0])  # of post-hoc adjustment, which adds to logits
    once = EvalConfig(mode="slide", crop=(1, 5), window_softmax=True)
    assert predict_labels(model, image, once, offsets=offsets)[0, 0, 0] == 0
    assert predict_labels(model, image, once, offsets=1.5 * offsets)[0, 0, 0] == 1


def test_softmax_of_windows_that_cannot_be():
    with pytest.raises(ValueError, match="window_softmax: has no effect in mode: whole"):
        EvalConfig(window_softmax=True)
    model = Given([[0.0, 1.0]])
    model.scores_are_logits = False
    with pytest.raises(ConfigError, match="window_softmax: the scores of Given are no logits"):
        predict_labels(model, torch.zeros(1, 3, 2, 2), EvalConfig(mode="slide", crop=(2, 2), window_softmax=True))


def test_probabilities_of_windows_that_were_averaged_as_such():
    model, image = Given([[4.0, 0.0], [0.0, 1.5]]), torch.zeros(1, 3, 2, 3)
    image[..., 1:] = 1
    cfg = EvalConfig(mode="slide", crop=(2, 2), stride=(1, 1), window_softmax=True)
    scores = predict_scores(model, image, cfg)
    (_, band), *rest = score_bands(model, image, cfg)
    assert not rest and torch.equal(band, scores)
    torch.testing.assert_close(probabilities(model, cfg, band), scores)
    torch.testing.assert_close(scores.sum(1), torch.ones(1, 2, 3))
