"""Sliding windows, test-time augmentation, label maps and evaluation against loops and closed forms."""

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from common.config import EvalConfig
from common.data import IGNORE
from common.evaluate import evaluate, evenly, format_table, network_input, write_label
from common.inference import multi_scale, predict_labels, predict_scores, slide, whole, window_starts
from common.models.segmentor import SegmentationModel
from common.report.panels import read_label


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
def test_window_starts(length, crop, stride, starts):
    assert window_starts(length, crop, stride) == starts


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
    with pytest.raises(ValueError, match=r"eval.mode slide needs eval.crop"):
        predict_labels(model, images, EvalConfig(mode="slide"))
    with pytest.raises(ValueError, match="stride of 0"):
        slide(model, images, (4, 4), (0, 4))
    with pytest.raises(ValueError, match="eval.scales is empty"):
        multi_scale(model.predict, images, (), False)


class Scene:
    """Images whose class is their brightest channel; labels are partly ignored and of differing sizes."""

    row = SimpleNamespace(
        name="scene",
        classes=("red", "green", "blue", "grey"),
        palette=((200, 0, 0), (0, 200, 0), (0, 0, 200), (90, 90, 90)),
        tail=(2,),
        counts=(50, 30, 5, 1),
        label_maps=(("_ids", {0: 0}), ("", {11: 0, 12: 1, 13: 2, 26: 3, 7: 3, 0: IGNORE})),
        encoding="index",
        flip_pairs=(),
    )

    def __init__(self, count=5, labels=True, equal=False):
        rng = np.random.default_rng(0)
        sizes = [(12, 16) if equal or i % 2 else (10, 14) for i in range(count)]
        self.images = [rng.integers(0, 256, (*size, 3), dtype=np.uint8) for size in sizes]
        self.labels = [rng.integers(-1, 4, size).astype(np.int16) if labels else None for size in sizes]

    def __len__(self):
        return len(self.images)

    def load(self, index):
        return {"image": self.images[index], "label": self.labels[index], "name": f"street/{index}"}


class Brightest(SegmentationModel):
    def __init__(self):
        super().__init__(4, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
        self.calls, self.frozen = 0, nn.BatchNorm2d(3).eval()

    def segment(self, x):
        assert not self.training
        self.calls += 1
        return {"logits": F.pad(x, (0, 0, 0, 0, 0, 1))}


def expected_matrix(scene):
    matrix = np.zeros((4, 4), int)
    for image, label in zip(scene.images, scene.labels, strict=True):
        for pixel, true in zip(image.reshape(-1, 3), label.flatten(), strict=True):
            if true >= 0:
                matrix[true, int(pixel.argmax())] += 1
    return matrix.tolist()


@pytest.mark.parametrize(("batch_size", "workers"), [(1, 0), (2, 0), (3, 2)])
def test_evaluate_counts_every_pixel_once(batch_size, workers):
    scene, model, state = Scene(), Brightest().train(), torch.get_rng_state()
    model.frozen.eval()
    cfg = EvalConfig(batch_size=batch_size, workers=workers)
    groups = {"image": ["frequent", "common", "rare", "rare"]}
    result = evaluate(model, scene, cfg, device="cpu", groups=groups)
    assert result["confusion"] == expected_matrix(scene)
    assert result["images"] == 5 and result["convention"] == "nan_mean"
    iou = [item["iou"] for item in result["per_class"]]
    assert result["miou"] == pytest.approx(sum(iou) / 4) and result["miou_tail"] == iou[2]
    assert result["groups"]["image"]["rare"] == pytest.approx((iou[2] + iou[3]) / 2)
    assert model.training and not model.frozen.training, "modes are as they were"
    assert torch.equal(state, torch.get_rng_state()), "the training's random numbers did not move"
    assert json.loads(json.dumps(result, allow_nan=False)) == result


def test_images_of_one_size_share_a_pass():
    model = Brightest()
    evaluate(model, Scene(4, equal=True), EvalConfig(batch_size=4, workers=0), device="cpu")
    assert model.calls == 1


def test_the_ranks_share_the_images():
    scene, cfg = Scene(), EvalConfig(workers=0)
    parts = [evaluate(Brightest(), scene, cfg, device="cpu", rank=r, world=2)["confusion"] for r in range(2)]
    assert np.sum(parts, axis=0).tolist() == expected_matrix(scene)


def test_a_method_is_evaluated_by_its_own_labels():
    class Method(nn.Module):
        def __init__(self):
            super().__init__()
            self.network = Brightest()

        def labels(self, images, size=None):
            return self.network.labels(images, size)

    scene = Scene()
    assert evaluate(Method(), scene, EvalConfig(workers=0), device="cpu")["confusion"] == expected_matrix(scene)


def test_predictions_are_written_in_the_stored_values_of_the_data_set(tmp_path):
    scene = Scene(3)
    cfg = EvalConfig(workers=0, panels=2)
    folders = {"save_predictions": tmp_path / "out", "panels": tmp_path / "panels"}
    evaluate(Brightest(), scene, cfg, device="cpu", **folders)
    stored = np.array([11, 12, 13, 7])  # of two stored values the lower
    for i, image in enumerate(scene.images):
        with Image.open(tmp_path / "out" / "street" / f"{i}.png") as png:
            assert np.array_equal(np.array(png), stored[image.argmax(-1)])
            colours = np.array(Scene.row.palette)[image.argmax(-1)]
            assert np.array_equal(np.array(png.convert("RGB")), colours)
    assert sorted(p.name.partition("_")[0] for p in (tmp_path / "panels").glob("*_truth.png")) == ["00000", "00001"]
    assert np.array_equal(read_label(tmp_path / "panels" / "00000_truth.png"), scene.labels[0])
    assert np.array_equal(np.array(Image.open(tmp_path / "panels" / "00001_image.png")), scene.images[1])


def test_labels_of_more_than_255_classes_are_written_in_16_bits(tmp_path):
    label = np.array([[0, 255, 846, -1]], np.int16)
    write_label(tmp_path / "label.png", label, dict.fromkeys(range(847), (0, 0, 0)))
    assert read_label(tmp_path / "label.png").tolist() == label.tolist()


def test_a_limit_takes_images_from_the_whole_set():
    assert evenly(10, 4) == [0, 2, 5, 7] and evenly(3, 10) == [0, 1, 2] and evenly(3, 0) == []
    assert evaluate(Brightest(), Scene(), EvalConfig(workers=0, max_images=2), device="cpu")["images"] == 2


@pytest.mark.parametrize(
    ("size", "expected"), [((683, 1024), (512, 768)), ((600, 400), (768, 512)), ((300, 3000), (205, 2048))]
)
def test_the_shortest_edge_is_resized_unless_the_other_gets_too_long(size, expected):
    cfg = EvalConfig(short_edge=512, max_edge=2048)
    assert network_input(np.zeros((*size, 3), np.uint8), cfg).shape[1:] == expected


def test_predictions_have_the_labels_size_whatever_the_input_was():
    scene = Scene(2)
    result = evaluate(Brightest(), scene, EvalConfig(workers=0, short_edge=20, max_edge=100), device="cpu")
    assert np.sum(result["confusion"]) == sum((label >= 0).sum() for label in scene.labels)


@pytest.mark.parametrize("workers", [0, 1])
def test_unusable_data_is_named(workers):
    with pytest.raises(ValueError, match="^street/0: evaluation needs labels; set `labels: true` for this split$"):
        evaluate(Brightest(), Scene(labels=False), EvalConfig(workers=workers), device="cpu")
    with pytest.raises(ValueError, match="scene: nothing to evaluate"):
        evaluate(Brightest(), Scene(0), EvalConfig(workers=0), device="cpu")


def test_the_table_shows_changes_in_points():
    scene = Scene()
    result = evaluate(Brightest(), scene, EvalConfig(workers=0), device="cpu")
    worse = {**result, "miou": result["miou"] - 0.0123, "miou_tail": None}
    lines = {line.split("  ")[0]: line for line in format_table(result, worse).splitlines()}
    assert "nan_mean" in format_table(result)
    assert lines["mIoU"].endswith("+1.23") and lines["mIoU(tail)"].endswith("-")
    assert lines["blue *"].split()[-1] == "+0.00" and f"{100 * result['per_class'][2]['iou']:.2f}" in lines["blue *"]
    with pytest.raises(ValueError, match="baseline was scored by ltss, this run by nan_mean"):
        format_table(result, {**result, "convention": "ltss"})
