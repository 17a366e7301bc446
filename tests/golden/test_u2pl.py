"""U2PL's network and unsupervised loss against reference outputs, the network through a file of the official layout."""

import json
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from common.config import ConfigError, ModelConfig
from common.models import build_model, load_weights
from common.models.deeplabv3plus_detectron2 import ConvNormReLU
from common.models.pretrained.u2pl import UNUSED, ours
from tests.golden.fill import fill, image
from tests.golden.test_unimatch import relative

DATA = Path(__file__).parent / "data"
NAME = "u2pl_deeplabv3plus_r101"


@cache
def golden():
    return np.load(DATA / f"{NAME}.npz")


@cache
def manifest() -> dict[str, list]:
    return json.loads(str(golden()["manifest"]))


def filled() -> dict[str, torch.Tensor]:
    return {key: torch.from_numpy(np.asarray(fill(key, tuple(shape)))) for key, (shape, _) in manifest().items()}


def config(**options) -> ModelConfig:
    return ModelConfig("deeplabv3plus_u2pl", 19, "resnet101s", options=options, align_corners=True)


def representation(state: dict[str, torch.Tensor]) -> nn.Module:
    """The release's third head, which its contrastive loss reads: made of the decoder's own parts."""
    convs = [ConvNormReLU(width, 256, 3, bias=True, dropout=0.1) for width in (512, 256)]
    head = nn.Sequential(*convs, nn.Conv2d(256, 256, 1))
    places = {"0": "0.conv", "1": "0.norm", "4": "1.conv", "5": "1.norm", "8": "2"}
    own = {}
    for name, tensor in state.items():
        if name.startswith(UNUSED):
            place, rest = name.removeprefix(UNUSED).split(".", 1)
            own[f"{places[place]}.{rest}"] = tensor
    head.load_state_dict(own)
    return head.eval()


@torch.no_grad()
def test_network_gives_the_reference_output(tmp_path):
    reference, state = golden(), filled()
    torch.save({"model": {f"module.{name}": tensor for name, tensor in state.items()}}, tmp_path / "u2pl.pth")
    model = build_model(config())
    load_weights(model, tmp_path / "u2pl.pth")
    shape = tuple(int(side) for side in reference["input_shape"])
    x = torch.from_numpy(image(int(reference["input_seed"]), shape))
    out = model.eval().segment(x)
    assert relative(out["logits"], reference["pred"]) <= 1e-4
    assert relative(out["aux"][0], reference["aux"]) <= 1e-4

    finest, *_, coarsest = model.backbone(x)
    lateral = model.lateral(finest)
    context = nn.functional.interpolate(model.aspp(coarsest), lateral.shape[-2:], mode="bilinear", align_corners=True)
    rep = representation(state)(torch.cat((lateral, context), 1))
    assert relative(rep[:, ::32], reference["rep"]) <= 1e-4

    plain = build_model(config(auxiliary=False))
    load_weights(plain, tmp_path / "u2pl.pth")
    alone = plain.eval().segment(x)
    assert torch.equal(alone["logits"], out["logits"]) and alone["aux"] == []


def test_names_shapes_and_counts_are_the_official_ones():
    with torch.device("meta"):
        model = build_model(config())
    theirs = {ours(key): shape for key, (shape, _) in manifest().items() if not key.startswith(UNUSED)}
    assert {key: list(tensor.shape) for key, tensor in model.state_dict().items()} == theirs
    learnt = [
        np.prod(shape) for key, (shape, _) in manifest().items()
        if key.startswith(UNUSED) and "running" not in key and "num_batches" not in key
    ]  # fmt: skip
    assert sum(p.numel() for p in model.parameters()) + sum(learnt) == 66_824_422


def test_settings_that_cannot_work():
    with pytest.raises(ConfigError, match="align_corners: U2PL"):
        build_model(ModelConfig("deeplabv3plus_u2pl", 19, "resnet101s"))
    with pytest.raises(ConfigError, match=r"multi_grid: \[2, 2, 4\] for 2 blocks .* one factor a block"):
        build_model(ModelConfig("deeplabv3plus_u2pl", 19, "resnet18", align_corners=True))
