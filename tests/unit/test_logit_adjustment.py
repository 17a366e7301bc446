"""Logit adjustment after training: closed forms, the classifier's bias, and where its counts come from."""

import json
import warnings

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from common.config import Config, ConfigError, EvalConfig, ModelConfig
from common.engine.trainer import Trainer
from common.evaluation import evaluate
from common.evaluation.adjustment import offsets_of
from common.files import write_json
from common.inference import predict_labels, predict_scores
from common.losses.logit_adjustment import post_hoc_offsets
from common.models.segmentor import SegmentationModel
from tests.contexts import BareMethod
from tests.unit.test_evaluation import Scene
from tests.unit.test_mask2former import CLASSES, small

PIXELS = [900, 90, 9, 1]


class Coarse(SegmentationModel):
    """Logits at stride 4, in float64: folding a constant into the bias then gives the same sums."""

    def __init__(self):
        super().__init__(4, (0.0, 0.0, 0.0), (255.0, 255.0, 255.0))
        self.conv = nn.Conv2d(3, 4, 4, stride=4).double()

    def segment(self, x):
        return {"logits": self.conv(x.double())}


class Line(BareMethod):
    def __init__(self, cfg):
        super().__init__(cfg)
        self.model = nn.Linear(2, 2)

    def forward(self, streams, step):
        return {"loss": self.model.weight.sum()}


@pytest.fixture
def images():
    torch.manual_seed(0)
    return torch.randint(256, (2, 3, 24, 32), dtype=torch.uint8)


@pytest.mark.parametrize("options", [{}, {"mode": "slide", "crop": (16, 16), "stride": (8, 8)}], ids=["whole", "slide"])
@torch.no_grad()
def test_it_equals_a_bias_of_the_classifier(images, options):
    model, cfg = Coarse(), EvalConfig(**options)
    plain = predict_labels(model, images, cfg, (30, 41))
    offsets = post_hoc_offsets(PIXELS, 0.1)
    adjusted = predict_labels(model, images, cfg, (30, 41), offsets=offsets)
    assert not torch.equal(adjusted, plain)

    model.conv.bias += offsets
    assert torch.equal(predict_labels(model, images, cfg, (30, 41)), adjusted)


@torch.no_grad()
def test_augmented_scores_are_adjusted_after_their_mean(images):
    model, cfg = Coarse(), EvalConfig(scales=(0.5, 1.0), flip=True)
    offsets = post_hoc_offsets(PIXELS, 0.1)
    expected = predict_scores(model, images, cfg).log() + offsets.view(-1, 1, 1)
    assert torch.equal(predict_labels(model, images, cfg, offsets=offsets), expected.argmax(1))


@pytest.mark.parametrize("options", [{}, {"flip": True}, {"mode": "slide", "crop": (32, 32)}])
@torch.no_grad()
def test_scores_of_queries_are_adjusted_by_their_logarithm(one_thread, options):
    torch.manual_seed(1)
    model, cfg = small().eval(), EvalConfig(**options)
    images = torch.randint(256, (1, 3, 32, 64), dtype=torch.uint8)
    offsets = post_hoc_offsets([1, 10, 100, 10**5, 1000, 10**4], 0.1)
    assert len(offsets) == CLASSES
    plain = predict_scores(model, images, cfg, (40, 50))
    expected = (plain.double().log() + offsets.double().view(-1, 1, 1)).argmax(1)
    found = predict_labels(model, images, cfg, (40, 50), offsets=offsets)
    assert not torch.equal(found, plain.argmax(1))
    assert (found == expected).float().mean() > 0.999


def test_offsets_are_those_of_the_prior():
    prior = torch.tensor(PIXELS, dtype=torch.float64) / 1000
    torch.testing.assert_close(post_hoc_offsets(PIXELS, 0.7), (-0.7 * prior.log()).float())
    absent = post_hoc_offsets([75, 0, 25], 1.0)
    assert absent[1] == absent[0]  # a class that was never seen gains nothing


def config(tmp_path, tau=0.5, **changes):
    return Config(
        ModelConfig("none", 4), name="run", output=str(tmp_path), eval=EvalConfig(logit_adjustment=tau), **changes
    )


def test_counts_are_those_of_the_checkpoint_then_of_the_run(tmp_path):
    cfg, expected = config(tmp_path), post_hoc_offsets(PIXELS, 0.5)
    foreign, own = tmp_path / "foreign.safetensors", tmp_path / "own.safetensors"
    save_file({"x": torch.zeros(1)}, foreign)
    save_file({"x": torch.zeros(1)}, own, metadata={"class_pixels": json.dumps(PIXELS)})
    assert torch.equal(offsets_of(cfg, own), expected)
    with pytest.raises(
        ConfigError, match="run: eval.logit_adjustment: 0.5: neither the checkpoint nor .*statistics.json"
    ):
        offsets_of(cfg, foreign)
    assert offsets_of(config(tmp_path, 0.0), foreign) is None

    cfg.folder.mkdir()
    write_json(cfg.folder / "statistics.json", {"class_pixels": PIXELS})
    assert torch.equal(offsets_of(cfg, foreign), expected)
    assert torch.equal(offsets_of(cfg, foreign, pixels=[1, 1, 1, 1]), torch.full((4,), 0.5 * torch.tensor(4).log()))
    with pytest.raises(ConfigError, match="counted by 2 classes, the network has 4"):
        offsets_of(cfg, pixels=[1, 2])


def test_a_checkpoint_tells_the_counts_of_its_run(tmp_path):
    cfg = config(tmp_path)
    cfg.folder.mkdir()
    method = Line(cfg)
    method.class_pixels = PIXELS
    Trainer(cfg, method, torch.device("cpu")).save(1)
    assert torch.equal(offsets_of(cfg, cfg.folder), post_hoc_offsets(PIXELS, 0.5))


def test_adjusting_twice_is_said(tmp_path):
    cfg = config(tmp_path, remedies={"logits": {"name": "logit_adjustment"}})
    with pytest.warns(UserWarning, match="remedies.logits logit_adjustment has adjusted the network in training"):
        offsets = offsets_of(cfg, pixels=PIXELS)
    assert torch.equal(offsets, post_hoc_offsets(PIXELS, 0.5))


def test_less_than_zero_gives_the_prior_back(tmp_path):
    """Bayes: a network that scores classes by their likelihood has the posterior again, p ∝ π · likelihood."""
    pixels, likelihood = [900, 90, 10, 0], torch.tensor([0.1, 0.2, 0.6, 0.1])
    cfg = config(tmp_path, tau=-1.0, remedies={"logits": {"name": "balanced_softmax"}})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        offsets = offsets_of(cfg, pixels=pixels)
    posterior = torch.tensor([90.0, 18.0, 6.0]) / 114
    torch.testing.assert_close((likelihood.log() + offsets)[:3].softmax(0), posterior)


@pytest.mark.parametrize(
    "logits, message",
    [
        (None, "run: eval.logit_adjustment: -1: adds back a prior that only logit_adjustment or balanced_softmax"),
        ({"name": "logit_adjustment", "tau": 0.0}, "adds back a prior that only logit_adjustment or balanced_softmax"),
        ({"name": "blv"}, "adds back a prior that only logit_adjustment or balanced_softmax in training leaves out"),
        (
            {"name": "logit_adjustment", "of": "images"},
            "the prior of pixels, and remedies.logits left out that of images",
        ),
    ],
)
def test_no_prior_is_added_that_was_not_left_out(tmp_path, logits, message):
    with pytest.raises(ConfigError, match=message):
        offsets_of(config(tmp_path, tau=-1.0, remedies={"logits": logits} if logits else {}), pixels=[5, 3, 2, 1])


def test_an_evaluation_names_it():
    scene, model = Scene(), Coarse()
    plain = evaluate(model, scene, EvalConfig(workers=0), device="cpu")
    assert plain["logit_adjustment"] == 0 == plain["identity"]["logit_adjustment"]
    cfg = EvalConfig(workers=0, logit_adjustment=0.5)
    adjusted = evaluate(model, scene, cfg, device="cpu", offsets=post_hoc_offsets(PIXELS, 0.5))
    assert adjusted["logit_adjustment"] == 0.5 == adjusted["identity"]["logit_adjustment"]
    assert adjusted["confusion"] != plain["confusion"]
    with pytest.raises(ValueError, match="logit_adjustment: 0.5 needs the offsets"):
        evaluate(model, scene, cfg, device="cpu")


def test_a_prior_of_another_head_or_beyond_what_was_left_out(tmp_path):
    other = {"logits": {"name": "balanced_softmax"}, "heads": ["aux"]}
    with pytest.raises(ConfigError, match="-1: adds back a prior that only"):
        offsets_of(config(tmp_path, tau=-1.0, remedies=other), pixels=PIXELS)
    half = {"logits": {"name": "logit_adjustment", "tau": 0.5}}
    with pytest.warns(UserWarning, match="-1: adds back more of the prior than the 0.5 that training left out"):
        offsets_of(config(tmp_path, tau=-1.0, remedies=half), pixels=PIXELS)
