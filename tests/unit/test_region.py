"""Region Rebalance against loops over images and classes, and its classifier's place in a method."""

import pytest
import torch
import torch.nn.functional as F

from common.config import Config, ConfigError, ModelConfig
from common.losses.build import LossContext, build_loss
from common.losses.counts import Counts
from common.losses.region import Region, region_means
from fully_sup.supervised import Supervised
from semi_sup.config import METHODS as SEMI_SUP
from tests.contexts import context
from tests.unit.remedy_examples import COUNTS, example, section
from tests.unit.test_models import SMALL
from uda.train import METHODS as UDA

CHANNELS = 5


def setting(counts=COUNTS, size=(4, 5)):
    torch.manual_seed(0)
    features = torch.randn(2, CHANNELS, *size, requires_grad=True)
    return Region().term(counts, CHANNELS), features


def by_loops(term, features, label, images):
    """The definition: one cross-entropy of each class of each image, its features' mean in float64."""
    losses = []
    for z, y in zip(features.double(), label, strict=True):
        for k in y.unique().tolist():
            if k >= 0:
                region = z[:, y == k].mean(1)
                scores = term.classifier.double() @ region + images.log()
                losses.append(scores.logsumexp(0) - scores[k])
    return torch.stack(losses).mean()


def test_it_is_the_mean_over_regions():
    term, features = setting()
    _, label = example(size=(2, 4, 5))
    expected = by_loops(term, features, label, COUNTS.images)
    loss = term(features, label)
    torch.testing.assert_close(loss.double(), expected)
    gradient = torch.autograd.grad(loss, [features, term.classifier])
    theirs = torch.autograd.grad(expected, [features, term.classifier])
    torch.testing.assert_close(gradient, theirs)


def test_the_label_comes_to_the_features_grid():
    term, features = setting()
    _, small = example(size=(2, 4, 5))
    large = F.interpolate(small[:, None].float(), (12, 15), mode="nearest")[:, 0].long()
    torch.testing.assert_close(term(features, large), term(features, small))


def test_equal_counts_are_cross_entropy_of_regions():
    counts = Counts(COUNTS.pixels, torch.full((3,), 7.0).double(), 10.0)
    term, features = setting(counts)
    _, label = example(size=(2, 4, 5))
    means, present = region_means(features, label, 3)
    image, label_of = present.nonzero().T
    scores = means[image, label_of] @ term.classifier.T
    torch.testing.assert_close(term(features, label), F.cross_entropy(scores, label_of))


def test_without_labels_it_is_nothing():
    term, features = setting()
    loss = term(features, torch.full((2, 4, 5), -1))
    loss.backward()
    assert loss.item() == 0 and not features.grad.any() and not term.classifier.grad.any()


def test_the_order_of_classes_is_free():
    term, features = setting()
    _, label = example(size=(2, 4, 5))
    order = torch.tensor([2, 0, 1])
    other = Region().term(Counts(COUNTS.pixels[order], COUNTS.images[order], 10.0), CHANNELS)
    other.classifier.data = term.classifier.data[order]
    permuted = torch.where(label < 0, label, order.argsort()[label.clamp(min=0)])
    torch.testing.assert_close(other(features, permuted), term(features, label))


def test_it_stands_beside_the_pixel_loss():
    logits, label = example(size=(2, 4, 5))
    _, features = setting()
    loss = build_loss(section("region", weight=0.3), LossContext(COUNTS, features=CHANNELS))
    plain = build_loss({}, LossContext(COUNTS))
    (term,) = loss.trained
    expected = plain(logits, label) + 0.3 * term(features, label)
    torch.testing.assert_close(loss(logits, label, features=features), expected)
    found = loss.upsampled(logits, label, align_corners=False, features=features)
    torch.testing.assert_close(found, expected)


def test_refused_without_features():
    with pytest.raises(ConfigError, match=r"remedies.sets\[0\]: region needs the features"):
        build_loss(section("region"), LossContext(COUNTS))


REGION = {"sets": [{"name": "region"}]}
UDA_NET = {"blocks": (1, 1, 1, 1), "width": 4, "head_channels": 16, "features": 16}
METHODS = {
    "supervised": (Supervised, SMALL["upernet"], {"heads": {"decode": {}, "aux": {}}}),
    "ocrnet": (Supervised, SMALL["ocrnet"], {"heads": {"decode": {}, "aux": {}}}),
    "baseline": (SEMI_SUP["baseline"], SMALL["deeplabv3plus"], {}),
    "unimatch_v2": (SEMI_SUP["unimatch_v2"], SMALL["dpt"], {}),
    "warm_up": (UDA["warm_up"], ModelConfig("deeplabv2", 5, align_corners=True, options=UDA_NET), {}),
    "daformer": (UDA["daformer"], SMALL["daformer"], {"feature_distance": {"weight": 0.0}}),
}


def built(name, remedies):
    kind, model, options = METHODS[name]
    torch.manual_seed(0)
    return kind(Config(model, method=options, remedies=remedies, name="run"), context(5))


@pytest.mark.parametrize("name", METHODS)
def test_its_classifier_is_of_training_alone(name):
    """All other weights start where they would without it; it is trained and saved, and is no part of what predicts."""
    plain, ours = built(name, {}), built(name, REGION)
    state = ours.state_dict()
    (own,) = state.keys() - plain.state_dict().keys()
    assert all(torch.equal(state[key], tensor) for key, tensor in plain.state_dict().items())
    assert not own.startswith(ours.predict_prefix)

    trained = [p for group in ours.parameter_groups() for p in group["params"]]
    assert sum(p is dict(ours.named_parameters())[own] for p in trained) == 1


@pytest.mark.parametrize("name", ["knet", "hrda"])
def test_networks_without_features_refuse_it(name):
    kind, options = (Supervised, {"heads": {"decode": {}, "aux": {}}})
    if name == "hrda":
        kind, options = UDA["hrda"], {"feature_distance": {"weight": 0.0}}
    with pytest.raises(ConfigError, match="region needs the features"):
        kind(Config(SMALL[name], method=options, remedies=REGION, name="run"), context(5))
