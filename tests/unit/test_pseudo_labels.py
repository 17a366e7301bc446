"""How right pseudo-labels are: sums against a loop over pixels, and the program on a run that was never trained."""

import json
import math

import numpy as np
import pytest
import torch

from common.config import load_config
from common.data import SegmentationDataset
from common.engine.trainer import Trainer
from common.evaluation.pseudo_labels import LabelCounts
from common.models import load_model
from fully_sup.supervised import build_method
from scripts import pseudo_labels
from tests.contexts import context

pytestmark = [
    pytest.mark.usefixtures("unchanged", "one_thread"),
    pytest.mark.filterwarnings("ignore:.*it cannot be learnt"),
]
K = 4


def counted(seed=0, shape=(2, 9, 11)):
    """Predictions with confidence on the grid of thousandths and beside it, and what was counted of them."""
    rng = torch.Generator().manual_seed(seed)
    predicted = torch.randint(K - 1, shape, generator=rng)  # the last class is never predicted
    confidence = torch.rand(shape, generator=rng)
    confidence[0] = (1000 * confidence[0]).floor() / 1000
    label = torch.randint(-1, K, shape, generator=rng).to(torch.int16)
    counts = LabelCounts(K)
    for part in range(shape[1]):  # in bands of one row
        rows = (slice(None), slice(part, part + 1))
        counts.update(predicted[rows], confidence[rows], label[rows])
    pixels = zip(predicted.flatten().tolist(), confidence.flatten(), label.flatten().tolist(), strict=True)
    return counts.quality(), [pixel for pixel in pixels if pixel[2] >= 0]


@pytest.mark.parametrize("threshold", [0.0, 0.25, 0.95, 0.999])
def test_the_sums_are_those_of_a_loop_over_pixels(threshold):
    quality, pixels = counted()
    kept = [(k, truth) for k, p, truth in pixels if p >= threshold]  # float32 against the number, as a step does
    right = [k for k, truth in kept if k == truth]
    assert quality.kept(threshold) == len(kept) / len(pixels)
    for k in range(K):
        of_k = sum(given == k for given, _ in kept)
        good = right.count(k)
        every = sum(truth == k for *_, truth in pixels)
        assert quality.recall(threshold)[k] == good / every
        expected = (of_k / len(kept) if kept else math.nan, good / of_k if of_k else math.nan)
        np.testing.assert_equal((quality.shares(threshold)[k], quality.precision(threshold)[k]), expected)
    assert quality.accuracy(0) == sum(k == truth for k, _, truth in pixels) / len(pixels)
    of_two = [k == truth for k, _, truth in pixels if k in (1, 3)]
    assert quality.accuracy(0, (1, 3)) == sum(of_two) / len(of_two)


def test_the_threshold_of_a_precision():
    """Class 0: 2 of 3 labels are right, from 0.5 on 2 of 2. Class 1: its one label is wrong. Class 2 is never given."""
    counts = LabelCounts(3)
    predicted = torch.tensor([[[0, 0, 0, 1]]])
    confidence = torch.tensor([[[0.2, 0.5, 0.9, 0.95]]])
    counts.update(predicted, confidence, torch.tensor([[[2, 0, 0, 0]]]))
    threshold, recall = counts.quality().threshold_for(0.9)
    np.testing.assert_equal(threshold, [0.201, math.nan, math.nan])  # above 0.2, of which a bin holds all
    np.testing.assert_equal(recall, [2 / 3, math.nan, math.nan])
    assert counts.quality().threshold_for(2 / 3)[0][0] == 0


@pytest.mark.parametrize("threshold", [-0.1, 1.0, 0.9505, math.nan])
def test_a_threshold_is_in_thousandths(threshold):
    with pytest.raises(ValueError, match="expected 0 to 0.999, in thousandths"):
        counted()[0].kept(threshold)


# The program ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def run(config):
    """A finished run with a stream without labels, whose network was never trained."""
    words = ["train.steps=1", "eval.workers=0", "name=run", "data.streams.unlabeled.labels=false"]
    cfg = load_config(config, words)
    cfg.folder.mkdir()
    Trainer(cfg, build_method(cfg, context(list(range(1, 20)))), torch.device("cpu")).save(1)
    return cfg


def call(monkeypatch, *words):
    monkeypatch.setattr("sys.argv", ["pseudo_labels.py", *map(str, words), "--device", "cpu"])
    pseudo_labels.main()


def test_the_images_are_those_without_labels(run, monkeypatch, tmp_path, capsys):
    out = tmp_path / "out" / "labels.json"
    call(monkeypatch, run.folder, "--at", "0.06", "--json", out)
    printed = capsys.readouterr().out
    result = json.loads(out.read_text())
    dataset = SegmentationDataset(run.data.streams["labeled"])  # the same images, with labels
    assert result["stream"] == "unlabeled" and result["images"] == len(dataset)
    assert f"{len(dataset)} images of the stream 'unlabeled'" in printed and "at 0.06:" in printed
    assert [item["threshold"] for item in result["thresholds"]] == [0, 0.06, 0.5, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99]

    network = load_model(run.model, run.folder / "checkpoints/last").eval()
    truth, kept, right = np.zeros(19), np.zeros(19), np.zeros(19)
    for index in range(len(dataset)):
        sample = dataset.load(index)
        image = torch.from_numpy(sample["image"].transpose(2, 0, 1).copy())[None]
        label, confidence = (each[0].numpy() for each in network.labels(image))
        taken = (confidence >= 0.06) & (sample["label"] >= 0)
        truth += np.bincount(sample["label"][sample["label"] >= 0], minlength=19)
        kept += np.bincount(label[taken], minlength=19)
        right += np.bincount(label[taken & (label == sample["label"])], minlength=19)

    assert 0 < kept.sum() < truth.sum()
    classes = result["classes"]
    np.testing.assert_allclose([item["truth"] for item in classes], truth / truth.sum())
    np.testing.assert_allclose([item["labels"] for item in classes], kept / kept.sum())
    shown = truth > 0
    recall = np.array([item["recall"] for item in classes], float)
    np.testing.assert_allclose(recall[shown], right[shown] / truth[shown])
    assert all(item["recall"] is None for item, there in zip(classes, shown, strict=True) if not there)


def test_without_such_a_stream_they_are_those_of_the_validation(run, monkeypatch, capsys):
    call(monkeypatch, run.folder, "data.streams.unlabeled.labels=true")
    images = len(SegmentationDataset(run.data.val))
    printed = capsys.readouterr().out
    assert f"{images} validation images" in printed and "at 0.95:" in printed  # no threshold in the method


def test_mistakes_are_one_line(run, fails, tmp_path):
    main, folder = pseudo_labels.main, run.folder
    assert "no such checkpoint" in fails(main, tmp_path / "none")
    assert "--stream: unknown 'target'" in fails(main, folder, "--stream", "target")
    assert "threshold 0.9505: expected 0 to 0.999" in fails(main, folder, "--at", "0.9505")
    assert "--precision 90: give a share" in fails(main, folder, "--precision", "90")
    prior = ("remedies.logits.name=logit_adjustment", "remedies.pseudo_prior=true")
    assert "remedies.pseudo_prior: a step adds the prior" in fails(main, folder, *prior)
    (tmp_path / "there.json").write_text("{}")
    assert "there.json: there already" in fails(main, folder, "--json", tmp_path / "there.json")
