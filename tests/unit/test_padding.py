"""What a network sees of a crop beyond its image: exactly 0 by MMSegmentation's recipe, a colour by the others."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from common.config import ModelConfig
from common.data import build_transform
from common.data.streams import collate
from fully_sup.supervised import Supervised
from ltss_benchmark.deeplabv3plus import DeepLabV3PlusMethod
from ltss_benchmark.mask2former import Mask2FormerMethod
from tests.contexts import context
from tests.unit.data_files import classes, opened, picture
from tests.unit.test_detectron2_recipe import PLAIN
from tests.unit.test_models import SMALL, USRN
from tests.unit.test_training_geometry import CLASSES, D2_NETWORK, MASK_NETWORK, config

SIZE, CROP = (60, 90), (64, 64)


def samples(recipe: str, **options) -> list[dict]:
    transform = build_transform({"recipe": recipe, "crop": CROP, **options})
    label = classes(*SIZE, CLASSES).astype(np.int16)
    return [transform(opened(picture(*SIZE), label), np.random.default_rng(seed), PLAIN, 0) for seed in range(3)]


def supervised():
    return Supervised(config(SMALL["segformer"], heads={"decode": {}}), context())


def usrn_network():
    model = ModelConfig("deeplabv3plus", CLASSES, "resnet50", options=USRN, align_corners=True)
    return Supervised(config(model, heads={"decode": {}}), context())


def deeplab():
    model = ModelConfig("deeplabv3plus_d2", CLASSES, "resnet18", options=D2_NETWORK)
    return DeepLabV3PlusMethod(config(model, name="deeplabv3plus"), context())


def mask2former():
    model = ModelConfig("mask2former", CLASSES, "resnet18", options=MASK_NETWORK)
    return Mask2FormerMethod(config(model, name="mask2former"), context())


class Seen(Exception):
    """Carries what `segment` was given."""


def seen(method, batch, monkeypatch) -> torch.Tensor:
    def segment(x, **_):
        raise Seen(x)

    monkeypatch.setattr(method.model, "segment", segment)
    with pytest.raises(Seen) as end:
        method({"labeled": batch}, 0)
    return end.value.args[0]


@pytest.mark.parametrize("make", [supervised, usrn_network, deeplab, mask2former])
def test_mmsegmentation_pads_with_zero_after_normalisation(make, monkeypatch):
    drawn = samples("mmseg", ratio=[0.5, 0.9])
    assert {int(sample["geometry"][6]) for sample in drawn} == {0, 1}  # mirrored and not
    method = make()
    x = seen(method, collate(drawn), monkeypatch)

    model = method.model
    for sample, got in zip(drawn, x, strict=True):
        _, _, height, width, top, left, _ = sample["geometry"].tolist()
        inside = sample["image"][:, : min(height - top, 64), : min(width - left, 64)]
        normal = (inside - model.mean) / model.std
        expected = F.pad(normal, (0, 64 - inside.shape[2], 0, 64 - inside.shape[1]))
        assert inside.shape[1] < 64 and torch.equal(got, expected)


@pytest.mark.parametrize(
    ("recipe", "options", "colour"),
    [
        ("usrn", {"base": 45, "ratio": [1.0, 1.0]}, (124, 116, 104)),
        ("detectron2", {"short_edges": [30]}, (128, 128, 128)),
        ("cpsl", {"width": 45, "ratio": [1.0, 1.0]}, (124, 116, 104)),
    ],
)
def test_other_recipes_pad_with_the_colour_of_their_release(recipe, options, colour):
    for sample in samples(recipe, **options):
        assert "extent" not in sample
        below = sample["image"][:, 40:]
        assert torch.equal(below, torch.tensor(colour, dtype=torch.uint8)[:, None, None].expand_as(below))
