"""Evaluation against counting by a loop: scores, ranks, pictures and the table."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from common.config import EvalConfig, SourceConfig
from common.data import IGNORE
from common.data.catalogue.layouts import Record
from common.evaluation import evaluate, format_table, network_input, write_label
from common.evaluation.per_image import PerImage, read_per_image
from common.evaluation.samples import evenly
from common.models.segmentor import SegmentationModel
from common.report.panels import read_label


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
        meaning=["four classes"],
    )
    source = SourceConfig(dataset="scene", split="val")

    def __init__(self, count=5, labels=True, equal=False):
        rng = np.random.default_rng(0)
        sizes = [(12, 16) if equal or i % 2 else (10, 14) for i in range(count)]
        self.images = [rng.integers(0, 256, (*size, 3), dtype=np.uint8) for size in sizes]
        self.labels = [rng.integers(-1, 4, size).astype(np.int16) if labels else None for size in sizes]
        self.records = [Record(f"street/{i}", Path(f"{i}.jpg"), None) for i in range(count)]

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


def test_convolutions_are_not_timed_for_each_size_of_image(monkeypatch):
    """As training has them timed; what was set is set again, also where an evaluation ends in an error."""
    seen = []

    class Seen(Brightest):
        def segment(self, x):
            seen.append(torch.backends.cudnn.benchmark)
            return super().segment(x)

    class Broken(Seen):
        def segment(self, x):
            super().segment(x)
            raise RuntimeError("no more")

    for timed in (True, False):
        monkeypatch.setattr(torch.backends.cudnn, "benchmark", timed)
        evaluate(Seen(), Scene(), EvalConfig(), device="cpu")
        assert torch.backends.cudnn.benchmark == timed
        with pytest.raises(RuntimeError, match="no more"):
            evaluate(Broken(), Scene(), EvalConfig(), device="cpu")
        assert torch.backends.cudnn.benchmark == timed

    assert len(seen) > 2 and not any(seen)


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
    assert lines["blue *"].split()[3] == "+0.00" and f"{100 * result['per_class'][2]['iou']:.2f}" in lines["blue *"]
    assert "identity unknown" not in format_table(result, worse)
    other_tail = {**result, "per_class": [{**item, "tail": item["id"] == 0} for item in result["per_class"]]}
    rows = {line.split("  ")[0]: line.split()[-1] for line in format_table(result, other_tail).splitlines()[:8]}
    assert rows["mIoU(tail)"] == "-" and rows["mIoU"] == "+0.00", "means over other classes have no change"
    before = {key: value for key, value in result.items() if key != "identity"}
    assert "identity unknown" in format_table(result, before)
    with pytest.raises(ValueError, match="not compare with this run: convention nan_mean against ltss; evaluate both"):
        format_table(result, {**result, "identity": {**result["identity"], "convention": "ltss"}})


def test_the_matrix_of_every_image(tmp_path):
    """They add up to the whole, and each is that of its image evaluated alone."""
    scene, model, file = Scene(), Brightest(), tmp_path / "run" / "per_image.npz"
    whole = evaluate(model, scene, EvalConfig(workers=0, per_image=True), device="cpu", per_image=file)
    kept = read_per_image(file)
    assert kept.names == [f"street/{i}" for i in range(5)] and kept.matrices.sum(0).tolist() == whole["confusion"]

    for i in range(5):
        pred = torch.tensor(scene.images[i].argmax(2))
        truth = scene.labels[i]
        expected = [[int(((truth == a) & (pred.numpy() == b)).sum()) for b in range(4)] for a in range(4)]
        assert kept.matrices[i].tolist() == expected

    file.unlink()
    evaluate(model, scene, EvalConfig(workers=0), device="cpu", per_image=file)
    assert not file.exists(), "only where the config asks for it"
    file.write_bytes(b"PK damaged")
    with pytest.raises(ValueError, match="per_image.npz: .*eval.per_image=true"):
        read_per_image(file)
    scene.row = SimpleNamespace(**{**vars(scene.row), "classes": ["x"] * 6000})
    with pytest.raises(ValueError, match="5 images × 6000² numbers are too many"):
        PerImage(scene, range(5), "cpu")
