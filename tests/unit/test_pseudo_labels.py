"""How right pseudo-labels are: sums against a loop over pixels, and the program on a run that was never trained."""

import json
import math

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from common.config import Config, ConfigError, EvalConfig, ModelConfig, load_config
from common.config.schema import DataConfig, StreamConfig
from common.data import SegmentationDataset
from common.engine.trainer import Trainer
from common.evaluation.pseudo_labels import LabelCounts
from common.models import load_model
from fully_sup.supervised import build_method
from scripts import pseudo_labels
from tests.contexts import context
from tests.unit.data_files import save

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


def test_a_precision_that_is_met_exactly_is_met():
    """11 of 20 is 0.55, of which 20 · 0.55 in floating point is more than 11."""
    counts = LabelCounts(2)
    truth = torch.tensor([[[0] * 11 + [1] * 9]])
    counts.update(torch.zeros_like(truth), torch.ones(1, 1, 20), truth)
    assert counts.quality().threshold_for(0.55)[0][0] == 0


def test_each_class_may_have_its_own_threshold():
    quality, pixels = counted()
    each = np.array([0.25, 0.5, 0.75, 1.0])
    kept = [(k, truth) for k, p, truth in pixels if p >= each[k]]
    assert quality.kept(each) == len(kept) / len(pixels)
    assert quality.accuracy(each) == sum(k == truth for k, truth in kept) / len(kept)
    right = [sum(k == truth == c for k, truth in kept) for c in range(K)]
    np.testing.assert_allclose(quality.precision(each)[:3], [right[c] / sum(k == c for k, _ in kept) for c in range(3)])
    np.testing.assert_allclose(quality.recall(each), [right[c] / sum(t == c for *_, t in pixels) for c in range(K)])


def test_nothing_reaches_a_threshold_above_all():
    quality, _ = counted()
    assert quality.kept(1) == 0 and math.isnan(quality.accuracy(1)) and not quality.recall(1).any()
    row = pseudo_labels.at_threshold(quality, 1.0, (1, 2))
    assert row["kept"] == 0 and row["tail_recall"] == 0
    assert row["right"] is row["tail_labels"] is row["tail_right"] is None


def test_the_row_of_a_threshold():
    """Tail of class 1 and 2. Of four pixels three reach 0.5: 0 as 0, 1 as 1 and 2 as 1."""
    counts = LabelCounts(3)
    predicted, truth = torch.tensor([[[0, 1, 1, 2]]]), torch.tensor([[[0, 1, 2, 2]]])
    counts.update(predicted, torch.tensor([[[0.9, 0.6, 0.5, 0.4]]]), truth)
    row = pseudo_labels.at_threshold(counts.quality(), 0.5, (1, 2))
    assert row == {
        "threshold": 0.5,
        "kept": 3 / 4,
        "right": 2 / 3,
        "tail_labels": 2 / 3,
        "tail_right": 1 / 2,
        "tail_recall": 1 / 2,  # of class 1 all, of class 2 none
    }


@pytest.mark.parametrize("threshold", [-0.1, 1.001, 0.9505, math.nan])
def test_a_threshold_is_in_thousandths(threshold):
    with pytest.raises(ValueError, match="expected 0 to 1, in thousandths"):
        counted()[0].kept(threshold)


# Whose threshold, and which network -----------------------------------------------------------------------------------


def config_of(method, streams=None, **changes):
    data = DataConfig(streams=streams or {})
    return Config(ModelConfig("none", K), method=method, data=data, name="run", **changes)


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        ({}, 0.95),
        ({"name": "unimatch", "threshold": 0.8}, 0.8),
        ({"name": "usrn"}, 0.75),
        ({"name": "daformer"}, 0.968),
        ({"name": "unimatch", "threshold": 1.0}, 1.0),
    ],
)
def test_the_threshold_is_the_methods(method, expected, tmp_path):
    assert pseudo_labels.own_threshold(config_of(method), tmp_path) == expected


def test_a_threshold_that_is_too_fine_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"run: method.threshold 0.9685: .* in thousandths; give another by --at"):
        pseudo_labels.own_threshold(config_of({"name": "unimatch", "threshold": 0.9685}), tmp_path)


def test_thresholds_of_classes_are_those_of_the_step(tmp_path):
    cfg = config_of({"name": "unimatch", "threshold": 0.9, "class_thresholds": 0.99})
    file = tmp_path / "model.safetensors"
    save_file({"thresholds.confidence": torch.tensor([0.8, 0.4, 0.2, 0.6])}, file)
    found = pseudo_labels.own_threshold(cfg, file)
    np.testing.assert_allclose(found, [0.9, 0.45, 0.225, 0.675])  # τ · c_k / max c
    assert counted()[0].kept(found) > 0

    save_file({"model.weight": torch.ones(1)}, file)
    with pytest.raises(ConfigError, match="class_thresholds: the checkpoint holds no mean confidence"):
        pseudo_labels.own_threshold(cfg, file)


@pytest.mark.parametrize(
    ("names", "labels", "expected"),
    [
        (("model.w", "teacher.w"), False, "teacher."),
        (("model.w", "average.w"), False, "model."),  # train.ema predicts, the network labels
        (("model.w", "average.w"), True, None),
        (("model.w",), False, None),
        (("head.w",), False, None),
    ],
)
def test_the_network_that_labels(names, labels, expected, tmp_path):
    file = tmp_path / "model.safetensors"
    save_file({name: torch.ones(1) for name in names}, file)
    cfg = config_of({}, {"some": StreamConfig(labels=labels)})
    assert pseudo_labels.labelling(cfg, file) == expected


@pytest.mark.parametrize(
    ("cfg", "why"),
    [
        (config_of({"name": "cpsl"}), "method.name: cpsl takes its labels from files of soft labels"),
        (config_of({"name": "distill"}), "method.name: distill takes its labels from the files of an earlier stage"),
        (config_of({}, eval=EvalConfig(logit_adjustment=0.5)), "eval.logit_adjustment: 0.5: it changes predictions"),
        (config_of({"name": "usrn"}), "method.gate: true: a step's labels are those that the branch lets through"),
        (config_of({"name": "unimatch", "branch": True}), "method.gate: true: .*set it to false to see those before"),
        (config_of({}, remedies={"pseudo_prior": True}), "remedies.pseudo_prior: a step adds the prior"),
    ],
)
def test_labels_that_are_made_otherwise_are_refused(cfg, why):
    with pytest.raises(ConfigError, match=f"run: {why}"):
        pseudo_labels.refuse_other_labels(cfg)


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


def test_a_teacher_labels(run, monkeypatch, tmp_path):
    """Its tensors beside the others, from another start: what is counted is what that network alone says."""
    file = run.folder / "checkpoints/last/model.safetensors"
    own = load_file(file)
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    torch.manual_seed(1)
    other = {name: torch.randn_like(v) if v.is_floating_point() else v.clone() for name, v in own.items()}
    other = {name: v.abs() if "running_var" in name else v for name, v in other.items()}
    taught = {name.replace("model.", "teacher.", 1): v for name, v in other.items()}
    found = []
    for k, state in enumerate((own, {**own, **taught}, other)):
        save_file(state, tmp_path / f"{k}.safetensors", metadata)
        call(monkeypatch, tmp_path / f"{k}.safetensors", "--json", tmp_path / f"{k}.json")
        found.append(json.loads((tmp_path / f"{k}.json").read_text()))
    assert found[1] == found[2] != found[0]


def test_without_such_a_stream_they_are_those_of_the_validation(run, monkeypatch, capsys):
    call(monkeypatch, run.folder, "data.streams.unlabeled.labels=true")
    images = len(SegmentationDataset(run.data.val))
    printed = capsys.readouterr().out
    assert f"{images} validation images" in printed and "at 0.95:" in printed  # no threshold in the method


def test_mistakes_are_one_line(run, fails, tmp_path):
    camvid = tmp_path / "camvid"
    for folder in ("images", "labels"):
        (camvid / folder / "train").mkdir(parents=True)
        save(np.zeros((8, 8), np.uint8), camvid / folder / "train" / "0.png")
    main, folder = pseudo_labels.main, run.folder
    assert "no such checkpoint" in fails(main, tmp_path / "none")
    assert "--stream: unknown 'target'" in fails(main, folder, "--stream", "target")
    assert "threshold 0.9505: expected 0 to 1" in fails(main, folder, "--at", "0.9505")
    assert "--precision 90: give a share" in fails(main, folder, "--precision", "90")
    other = ("data.streams.unlabeled.dataset=camvid", f"data.streams.unlabeled.root={camvid}")
    other += ("data.streams.unlabeled.split=train",)
    assert "data set 'camvid' has 11 classes, the network 19" in fails(main, folder, *other)
    (tmp_path / "there.json").write_text("{}")
    assert "there.json: there already" in fails(main, folder, "--json", tmp_path / "there.json")
