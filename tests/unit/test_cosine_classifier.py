"""Cosine classifiers: the closed form, which networks have them, and that nothing else of a network changes."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

from common.config import ConfigError, EvalConfig, ModelConfig
from common.inference import predict_labels
from common.losses.build import LossContext, build_loss
from common.losses.logit_adjustment import post_hoc_offsets
from common.models import build_model, load_model
from common.models.cosine import CosineClassifier, cosine_scale
from scripts.export import Scores, export
from tests.unit.remedy_examples import COUNTS, section
from tests.unit.test_models import SMALL, images

WITHOUT = ("knet", "deeplabv2_reduced")  # kernels that are refined; a sum of dilated 3×3 convolutions
D2 = ModelConfig("deeplabv3plus_d2", 5, "resnet18", options={"channels": 8, "lateral_channels": 4})
CPSL = ModelConfig(
    "deeplabv2",
    5,
    options={"blocks": (1, 1, 1, 1), "width": 8, "head_channels": 16, "features": 16},
    align_corners=True,
)
NETWORKS = {**{name: cfg for name, cfg in SMALL.items() if name not in WITHOUT}, "deeplabv3plus_d2": D2, "cpsl": CPSL}


def cosine(cfg, **options):
    return replace(cfg, options={**cfg.options, "classifier": "cosine", **options})


def built(cfg, seed=0):
    torch.manual_seed(seed)
    return build_model(cfg)


def test_the_closed_form():
    torch.manual_seed(0)
    linear = nn.Conv2d(7, 4, 1)
    classifier = CosineClassifier(linear, 20.0)
    x = torch.randn(2, 7, 3, 5)
    expected = torch.empty(2, 4, 3, 5)
    for k in range(4):
        expected[:, k] = 20 * F.cosine_similarity(x, linear.weight[k].detach()[None], dim=1)
    torch.testing.assert_close(classifier(x), expected, rtol=1e-4, atol=1e-4)

    torch.testing.assert_close(classifier(1000 * x), classifier(x), rtol=1e-4, atol=1e-4)
    assert classifier(x).abs().max() <= 20.0001
    assert [name for name, _ in classifier.named_parameters()] == ["directions"]


def test_norms_are_made_in_float32():
    """In float16 the squares of such features overflow."""
    torch.manual_seed(0)
    classifier = CosineClassifier(nn.Conv2d(64, 4, 1))
    x = 100 * torch.randn(2, 64, 3, 5)
    with torch.autocast("cpu", torch.bfloat16):
        z = classifier(x)
    assert z.dtype == torch.float32
    torch.testing.assert_close(z, classifier(x), rtol=0, atol=0.3)
    torch.testing.assert_close(classifier(x.half()), classifier(x), rtol=0, atol=0.1)


def test_features_without_length_have_no_direction():
    classifier = CosineClassifier(nn.Conv2d(3, 2, 1))
    x = torch.zeros(1, 3, 1, 2)
    x[..., 1] = 1
    x.requires_grad_()
    z = classifier(x)
    F.cross_entropy(z, torch.tensor([[[0, 1]]])).backward()
    assert not z[..., 0].any() and z[..., 1].any()
    assert not x.grad[..., 0].any() and x.grad.isfinite().all()
    assert classifier.directions.grad.isfinite().all()


@pytest.mark.parametrize("name", NETWORKS)
def test_only_the_classifier_changes(name):
    """With a seed all weights start as with a linear classifier, its own directions too, and pairs stay pairs."""
    plain, ours = built(NETWORKS[name]), built(cosine(NETWORKS[name]))
    places = plain.pixel_classifiers
    assert places and places == ours.pixel_classifiers
    theirs = plain.state_dict()
    for key, tensor in ours.state_dict().items():
        key = key.removesuffix(".directions") + ".weight" if key.endswith(".directions") else key
        assert torch.equal(theirs.pop(key), tensor), key
    assert all(key.removesuffix(".bias") in places for key in theirs)  # there is no bias

    for place in places:
        assert isinstance(ours.get_submodule(place), CosineClassifier)
    out = ours(images())
    assert out["logits"].abs().max() < 30.001 and out["logits"].dtype == torch.float32
    out["logits"].square().mean().backward()
    assert ours.get_submodule(places[0]).directions.grad.any()


@pytest.mark.parametrize("name", ["upernet", "usrn", "hrda", "deeplabv3plus_d2", "cpsl"])
def test_saved_and_loaded(name, tmp_path):
    cfg = cosine(NETWORKS[name])
    model, path = built(cfg).eval(), tmp_path / "model.safetensors"
    save_file({f"model.{k}": t for k, t in model.state_dict().items()}, path, {"predict_prefix": "model."})
    x = images()
    with torch.no_grad():
        assert torch.equal(load_model(cfg, path).predict(x), model.predict(x))
    with pytest.raises(ValueError, match=r"not in the model: .*directions") as caught:
        load_model(NETWORKS[name], path)
    assert "\n" not in str(caught.value)


def test_exported_and_adjusted(tmp_path):
    model = built(cosine(SMALL["upernet"])).eval()
    x = images(1, 64, 96)
    assert export(Scores(model), x, tmp_path / "model.pt2", "upernet") < 1e-5

    offsets = post_hoc_offsets([1, 10, 100, 1000, 10], 1.0)
    with torch.no_grad():
        expected = (model.predict(x) + offsets.view(-1, 1, 1)).argmax(1)
        found = predict_labels(model, x, EvalConfig(), (64, 96), offsets=offsets)
        assert not torch.equal(found, model.predict(x).argmax(1))
    assert (found == expected).float().mean() > 0.999


REFUSED = [
    (cosine(SMALL["knet"]), "model.options.classifier: cosine does not fit knet"),
    (cosine(SMALL["deeplabv2_reduced"]), "model.options.classifier: cosine does not fit deeplabv2_reduced"),
    (cosine(ModelConfig("mask2former", 5, "resnet18")), "model.options.classifier: cosine does not fit mask2former"),
    (cosine(D2, scale=0.0), "model.options.scale: 0.0 is not above 0"),
    (replace(D2, options={**D2.options, "scale": 20.0}), "model.options.scale: 20 is that of a cosine classifier"),
    (replace(D2, options={**D2.options, "classifier": "cosin"}), "model.options.classifier: "),
]


@pytest.mark.parametrize(("cfg", "message"), REFUSED, ids=[text[:60] for _, text in REFUSED])
def test_refused(cfg, message):
    with pytest.raises(ConfigError) as caught, torch.device("meta"):
        build_model(cfg)
    assert str(caught.value).startswith(message) and "\n" not in str(caught.value)


def test_its_scale_is_that_of_the_config():
    assert cosine_scale(D2) is None
    assert cosine_scale(cosine(D2)) == 30 and cosine_scale(cosine(D2, scale=20.0)) == 20


def test_ldam_on_orthogonal_features():
    """K = 2 and cos = 0: the loss is ln(1 + e^(s·m)) of the true class's margin, here the rarest one's, C."""
    classifier = CosineClassifier(nn.Conv2d(3, 2, 1), 20.0)
    with torch.no_grad():
        classifier.directions.copy_(torch.tensor([[1.0, 0, 0], [0, 1.0, 0]])[:, :, None, None])
    z = classifier(torch.tensor([0.0, 0, 5]).view(1, 3, 1, 1))
    counts = COUNTS._replace(pixels=COUNTS.pixels[:2], images=COUNTS.images[:2])
    loss = build_loss(section("ldam", scale=20.0), LossContext(counts, cosine=20.0))
    label = torch.tensor([[[1]]])
    assert loss(z, label).item() == pytest.approx(math.log1p(math.exp(20 * 0.5)))
    frequent = 0.5 * (90 / 900) ** 0.25
    assert loss(z, 1 - label).item() == pytest.approx(math.log1p(math.exp(20 * frequent)))


@pytest.mark.parametrize("chosen", [section("ldam"), section("gcl"), section("blv", preset="gcl")], ids=str)
def test_margins_need_it_at_their_scale(chosen):
    build_loss(chosen, LossContext(COUNTS, cosine=30.0))
    with pytest.raises(ConfigError, match="logits.name: .* needs a cosine classifier"):
        build_loss(chosen, LossContext(COUNTS))
    with pytest.raises(ConfigError, match="logits.scale: .* of scale 30, and model.options.scale is 20"):
        build_loss(chosen, LossContext(COUNTS, cosine=20.0))
