"""Scores beyond IoU against scipy's distance transform, loops over pixels, closed forms and numpy's bins."""

import json

import numpy as np
import pytest
import torch
from scipy import ndimage
from torch import nn
from torch.utils.tensorboard import SummaryWriter

from common.config import Config, EvalConfig, ModelConfig
from common.engine.logging import RunLog
from common.evaluation import evaluate, format_table
from common.evaluation.boundaries import Boundaries, edges
from common.evaluation.calibration import BINS, FLOOR, Calibration
from common.evaluation.variants import Variants, View, evaluate_variants
from common.inference import predict_scores, probabilities, score_bands
from common.losses.logit_adjustment import post_hoc_offsets
from common.metrics import precision_and_recall
from common.models.deeplabv3plus_detectron2 import DeepLabV3PlusD2
from common.models.segmentor import SegmentationModel
from tests.unit.test_evaluation import Brightest, Scene
from tests.unit.test_mask2former import CLASSES, small

K = 4


def maps(seed: int, count: int = 3) -> list[tuple[np.ndarray, np.ndarray]]:
    """Predictions and labels in blobs, of differing sizes, partly ignored; class 3 is never predicted."""
    draw = np.random.default_rng(seed)
    pairs = []
    for _ in range(count):
        size = tuple(draw.integers(9, 24, 2))
        smooth = [ndimage.gaussian_filter(draw.normal(size=(K, *size)), (0, 1.5, 1.5)) for _ in range(2)]
        pred, label = smooth[0][:3].argmax(0), (smooth[0] + smooth[1]).argmax(0)
        label[draw.uniform(size=size) < 0.1] = -1
        pairs.append((pred, label))
    return pairs


def edge_by_a_loop(classes: np.ndarray) -> np.ndarray:
    edge = np.zeros(classes.shape, bool)
    for y, x in np.ndindex(classes.shape):
        for v, u in ((y - 1, x), (y + 1, x), (y, x - 1), (y, x + 1)):
            if 0 <= v < classes.shape[0] and 0 <= u < classes.shape[1]:
                edge[y, x] |= classes[y, x] >= 0 and classes[v, u] >= 0 and classes[v, u] != classes[y, x]
    return edge


def near(mask: np.ndarray, radius: int) -> np.ndarray:
    """Pixels at most `radius` from the mask, by the Euclidean distance transform."""
    return ndimage.distance_transform_edt(~mask) <= radius if mask.any() else np.zeros_like(mask)


def expected_scores(pairs, radius):
    """Tolerant IoU and boundary F of each class, by dilated masks."""
    found = []
    for k in range(K):
        counts = np.zeros((2, 2, 2))  # pixels and edges; predicted and true; near and all
        for pred, label in pairs:
            pred = np.where(label < 0, -1, pred)
            masks = (pred == k, label == k)
            rims = (masks[0] & edge_by_a_loop(pred), masks[1] & edge_by_a_loop(label))
            for which, (p, t) in enumerate((masks, rims)):
                counts[which] += [[(p & near(t, radius)).sum(), p.sum()], [(t & near(p, radius)).sum(), t.sum()]]
        shares = np.divide(counts[..., 0], counts[..., 1], out=np.zeros((2, 2)), where=counts[..., 1] > 0)
        (p, r), (a, b) = shares
        iou = p * r / (p + r - p * r) if p + r else 0.0
        found.append((iou, 2 * a * b / (a + b) if a + b else 0.0))
    return np.array(found).T


@pytest.mark.parametrize("radius", [1, 2, 3, 30])
def test_tolerance_and_edges_are_those_of_dilated_masks(radius):
    pairs = maps(radius)
    counted = Boundaries(K, radius)
    for pred, label in pairs:
        counted.update(torch.tensor(pred), torch.tensor(label))
    got = counted.scores()
    expected = expected_scores(pairs, radius)
    np.testing.assert_allclose(got["tolerant_iou"], expected[0], atol=1e-12)
    np.testing.assert_allclose(got["boundary_f"], expected[1], atol=1e-12)
    assert got["tolerant_iou"][3] == 0, "never predicted"


def test_without_tolerance_it_is_the_iou():
    counted, matrix = Boundaries(K, 0), np.zeros((K, K))
    for pred, label in maps(9):
        counted.update(torch.tensor(pred), torch.tensor(label))
        np.add.at(matrix, (label[label >= 0], pred[label >= 0]), 1)
    hits = np.diagonal(matrix)
    np.testing.assert_allclose(counted.scores()["tolerant_iou"], hits / (matrix.sum(0) + matrix.sum(1) - hits))


def test_a_thin_line_that_is_shifted():
    """One pixel aside: IoU 0, all of it within 1; two classes that are nowhere have no score."""
    label, pred = torch.zeros(2, 8, 9, dtype=torch.int64)
    label[:, 4], pred[:, 5] = 1, 1
    assert Boundaries(K, 0).scores()["boundary_f"].tolist() != [0] * K
    for radius, expected in ((0, 0.0), (1, 1.0)):
        counted = Boundaries(K, radius)
        counted.update(pred, label)
        got = counted.scores()
        assert got["tolerant_iou"][1] == got["boundary_f"][1] == expected
        assert np.isnan(got["tolerant_iou"][2:]).all() and np.isnan(got["boundary_f"][2:]).all()


def test_ignored_pixels_and_the_border_make_no_edge():
    classes = torch.tensor([[0, 0, -1, 1], [0, 0, -1, 1], [0, 0, 1, 1]])
    assert edges(classes).tolist() == [[-1] * 4, [-1] * 4, [-1, 0, 1, -1]]


def test_calibration_is_that_of_numpys_bins():
    """Every sum by masks over all pixels; bins are open below, so that a probability of 1 is in the last."""
    torch.manual_seed(0)
    counted, all_p, all_y = Calibration(K), [], []
    for size in ((5, 7), (8, 3)):
        p = (3 * torch.randn(2, K, *size)).softmax(1)
        label = torch.randint(-1, K, (2, *size))
        counted.update(p, label)
        all_p.append(p.movedim(1, -1)[label >= 0])
        all_y.append(label[label >= 0])
    p, y = torch.cat(all_p).double().numpy(), torch.cat(all_y).numpy()

    def error(values, hits):
        bins = np.clip(np.digitize(values, np.linspace(0, 1, BINS + 1), right=True) - 1, 0, BINS - 1)
        parts = [abs(hits[bins == b].mean() - values[bins == b].mean()) * (bins == b).mean() for b in set(bins)]
        return sum(parts)

    got = counted.scores()
    assert got.ece == pytest.approx(error(p.max(1), p.argmax(1) == y), abs=1e-6)
    for k in range(K):
        seen = p[:, k] >= FLOOR
        assert got.class_ece[k] == pytest.approx(error(p[seen, k], y[seen] == k), abs=1e-6)
        assert got.mass[k] == pytest.approx(p[:, k].sum() / (y == k).sum(), abs=1e-6)
    assert sum(got.bins["pixels"]) == len(y)


def test_calibration_in_closed_form():
    """A net that says 0.8 where it is right half of the time; a class that is never seen has no mass."""
    p = torch.tensor([0.8, 0.2, 0.0, 0.0]).view(1, 4, 1, 1).expand(1, 4, 2, 5)
    label = torch.tensor([[[0, 0, 0, 0, 0], [1, 1, 1, 1, 1]]])
    counted = Calibration(4)
    counted.update(p, label)
    got = counted.scores()
    assert got.ece == pytest.approx(0.3, abs=1e-6)
    assert got.class_ece[:2] == pytest.approx([0.3, 0.3], abs=1e-6) and np.isnan(got.class_ece[2:]).all()
    assert got.mass[:2] == pytest.approx([1.6, 0.4], abs=1e-6) and np.isnan(got.mass[2:]).all()


def test_precision_and_recall_by_counting():
    pred, label = maps(3, 1)[0]
    matrix = np.zeros((K, K), int)
    np.add.at(matrix, (label[label >= 0], pred[label >= 0]), 1)
    precision, recall, ratio = precision_and_recall(matrix)
    pred = pred[label >= 0]
    label = label[label >= 0]
    for k in range(3):
        assert precision[k] == (label[pred == k] == k).mean() and recall[k] == (pred[label == k] == k).mean()
    assert np.isnan(precision[3]) and recall[3] == ratio[3] == 0


# In an evaluation ---------------------------------------------------------------------------------------------------

ALL = EvalConfig(workers=0, boundary=2, calibration=True)


def test_an_evaluation_says_them_and_nothing_else_changes():
    scene = Scene()
    plain = evaluate(Brightest(), scene, EvalConfig(workers=0), device="cpu")
    result = evaluate(Brightest(), scene, ALL, device="cpu")
    assert result["confusion"] == plain["confusion"] and result["identity"] == plain["identity"]
    assert "ece" not in plain and "boundary" not in plain and "mass" not in plain["per_class"][0]
    assert json.loads(json.dumps(result, allow_nan=False)) == result

    counted, calibration = Boundaries(4, 2), Calibration(4)
    for image, label in zip(scene.images, scene.labels, strict=True):
        logits = torch.tensor(image).permute(2, 0, 1).float()
        logits = torch.cat([logits, torch.zeros(1, *logits.shape[1:])])
        counted.update(logits.argmax(0), torch.tensor(label))
        calibration.update(logits.softmax(0)[None], torch.tensor(label)[None])
    classes = result["per_class"]
    assert [item["boundary_f"] for item in classes] == pytest.approx(counted.scores()["boundary_f"].tolist())
    expected = calibration.scores()
    assert result["ece"] == pytest.approx(expected.ece) and result["calibration"]["pixels"] == expected.bins["pixels"]
    assert result["ece_tail"] == pytest.approx(expected.class_ece[2]) and result["boundary"] == {"pixels": 2}
    assert result["tolerant_miou_tail"] == classes[2]["tolerant_iou"] >= classes[2]["iou"]
    assert classes[1]["mass"] == pytest.approx(expected.mass[1])


@pytest.mark.parametrize("batch_size", [1, 2])
def test_the_ranks_share_the_sums(batch_size, monkeypatch):
    """Sums of two ranks are those of one: here rank 1 adds to what rank 0 has counted."""
    scene, cfg = Scene(4, equal=True), EvalConfig(workers=0, boundary=1, calibration=True, batch_size=batch_size)
    whole = evaluate(Brightest(), scene, cfg, device="cpu")
    kept = []
    monkeypatch.setattr("common.distributed.all_sum", lambda sums: kept.append(sums) or sums)
    for rank in range(2):
        evaluate(Brightest(), scene, cfg, device="cpu", rank=rank, world=2)
    first, second = kept[: len(kept) // 2], kept[len(kept) // 2 :]
    monkeypatch.setattr("common.distributed.all_sum", lambda sums: kept.pop(0))
    kept[:] = [a + b for a, b in zip(first, second, strict=True)]
    again = evaluate(Brightest(), scene, cfg, device="cpu", rank=0, world=2)
    for key in ("confusion", "boundary_f", "tolerant_miou", "ece", "ece_tail"):
        assert again[key] == pytest.approx(whole[key]) if isinstance(whole[key], float) else again[key] == whole[key]


def test_they_stand_in_the_table():
    result = evaluate(Brightest(), Scene(), ALL, device="cpu")
    text = format_table(result, result)
    lines = {line.split("  ")[0]: line.split() for line in text.splitlines()}
    blue = result["per_class"][2]
    head = ["class", "IoU", "change", "prec.", "recall", "IoU~", "F~", "ECE", "mass"]
    values = [f"{100 * blue[key]:.2f}" for key in ("iou", "precision", "recall", "tolerant_iou", "boundary_f", "ece")]
    assert lines["class"] == head and lines["blue *"][2:] == [values[0], "+0.00", *values[1:], f"{blue['mass']:.2f}"]
    assert lines["ECE(tail)"][1] == f"{100 * result['ece_tail']:.2f}" and "~: within 2 pixels" in text
    other = {**result, "boundary": {"pixels": 3}}
    rows = {line.split("  ")[0]: line.split()[-1] for line in format_table(result, other).splitlines()[:15]}
    assert rows["mIoU~"] == rows["F~"] == "-" and rows["ECE"] == rows["mIoU"] == "+0.00"


def test_they_are_logged(tmp_path, monkeypatch):
    tags = {}
    monkeypatch.setattr(SummaryWriter, "add_scalar", lambda self, tag, value, step: tags.setdefault(tag, value))
    result = evaluate(Brightest(), Scene(), ALL, device="cpu")
    with RunLog(Config(ModelConfig("none", 4), name="run", output=str(tmp_path)), 0) as log:
        log.evaluation(10, result)
    assert tags["val/ece"] == result["ece"] and tags["val/boundary_f_tail"] == result["boundary_f_tail"]
    assert tags["val_precision/blue"] == result["per_class"][2]["precision"] and "val_mass/red" in tags


# Probabilities ------------------------------------------------------------------------------------------------------

PASSES = [{}, {"flip": True}, {"mode": "slide", "crop": (32, 48), "stride": (16, 16)}]


@pytest.mark.parametrize("settings", PASSES, ids=["whole", "flip", "slide"])
@torch.no_grad()
def test_probabilities_are_what_the_network_means(one_thread, settings):
    """Of queries their share of all scores, of logits the softmax; adjusted ones are p · e^offset, made to sum to 1."""
    torch.manual_seed(0)
    images = torch.randint(256, (1, 3, 32, 64), dtype=torch.uint8)
    cfg, offsets = EvalConfig(**settings), post_hoc_offsets([1, 10, 100, 10**5, 1000, 10**4], 0.5)
    model = small().eval()
    assert len(offsets) == CLASSES
    scores = predict_scores(model, images, cfg, (32, 64))
    for added in (None, offsets):
        factor = torch.ones(CLASSES) if added is None else added.exp()
        weighted = scores * factor.view(-1, 1, 1)
        bands = score_bands(model, images, cfg, (32, 64), None, added)
        got = torch.cat([probabilities(model, cfg, band) for _, band in bands], 2)
        torch.testing.assert_close(got, weighted / weighted.sum(1, keepdim=True), rtol=1e-4, atol=1e-6)


class Logits(Brightest):
    """Averages logits in test-time augmentation, as detectron2's DeepLab does."""

    average_softmax = DeepLabV3PlusD2.average_softmax
    scores_are_logits = DeepLabV3PlusD2.scores_are_logits


@pytest.mark.parametrize("settings", [{"flip": True}, {"mode": "slide", "crop": (8, 8)}], ids=["flip", "slide"])
@pytest.mark.parametrize("family", [Brightest, Logits])
@torch.no_grad()
def test_logits_are_adjusted_by_a_sum_however_they_are_averaged(family, settings):
    torch.manual_seed(0)
    images, model, cfg = torch.rand(1, 3, 8, 12) * 2 - 1, family().eval(), EvalConfig(**settings)
    offsets = torch.tensor([0.5, -1.0, 0.0, 2.0])
    bands = score_bands(model, images, cfg, None, None, offsets)
    got = torch.cat([probabilities(model, cfg, band) for _, band in bands], 2)
    p = predict_scores(model, images, cfg)
    logits = p.log() if family is Brightest and settings.get("flip") else p
    torch.testing.assert_close(got, (logits + offsets.view(-1, 1, 1)).softmax(1))


class Linear(SegmentationModel):
    """A 1×1 classifier at the image's own size."""

    classifiers = ("head",)

    def __init__(self):
        super().__init__(4, (0.0, 0.0, 0.0), (255.0, 255.0, 255.0))
        self.head = nn.Conv2d(3, 4, 1)

    def segment(self, x):
        return {"logits": self.head(x)}


def test_variants_have_the_calibration_of_their_own(tmp_path):
    torch.manual_seed(0)
    heads = [nn.Conv2d(3, 4, 1) for _ in range(2)]
    cfg = EvalConfig(workers=0, calibration=True, panels=0)
    views = [View(tmp_path / name, cfg) for name in "ab"]
    together = evaluate_variants(Variants(Linear(), "head", heads), Scene(), views, device="cpu")
    for head, got in zip(heads, together, strict=True):
        alone = Linear()
        alone.head = head
        expected = evaluate(alone, Scene(), cfg, device="cpu")
        assert got["ece"] == pytest.approx(expected["ece"]) and got["calibration"] == expected["calibration"]
