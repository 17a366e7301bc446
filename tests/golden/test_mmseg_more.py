"""Gradients of parameters that have another name or shape here, and backbone files in OpenMMLab's names."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from common.models import build_model
from common.models.backbones import build_backbone
from common.models.pretrained import load_backbone, mmseg
from tests.golden.fill import fill, image
from tests.golden.test_mmseg_models import CASES, DATA, assert_close, losses_of, reference


def official_weights(name):
    """The reference weights by official name."""
    manifest = json.loads(str(reference(name)["manifest"]))
    return {
        key: torch.from_numpy(np.asarray(fill(key, tuple(shape))))
        for key, (shape, kind) in manifest.items()
        if kind != "buffer"
    }


@pytest.mark.parametrize("name", ["segformer_mit_b0", "knet_swin_t"])
def test_gradient_norms_by_official_name(name):
    """Every official tensor is sent through the conversion filled with its own number, which says where it ends up."""
    case, weights = CASES[name], official_weights(name)
    expected = json.loads((DATA / "mmseg_train_losses.json").read_text())["models"][name]["grad_norm"]
    model = build_model(replace(case.config, options={**case.config.options, **case.still})).train()
    model.load_state_dict(mmseg.convert({"state_dict": weights}, model), strict=False)
    sum(losses_of(model.segment(torch.from_numpy(image(1, (2, 3, 128, 192)))))).backward()
    numbers = {key: torch.full_like(tensor, i + 1) for i, (key, tensor) in enumerate(weights.items())}
    origin = mmseg.convert({"state_dict": numbers}, model)
    squares = torch.zeros(len(numbers) + 1)
    for key, p in model.named_parameters():
        squares.index_add_(0, origin[key].flatten().long(), p.grad.flatten() ** 2)
    ours = {key: squares[i + 1].sqrt().item() for i, key in enumerate(numbers) if key in expected}
    assert ours == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("name", ["segformer_mit_b0", "knet_swin_t", "upernet_vit_b16"])
def test_backbone_files(name, tmp_path):
    """As OpenMMLab publishes ImageNet weights: without the head; Swin's output norms are not in them."""
    case, expected = CASES[name], reference(name)
    weights = {key.removeprefix("backbone."): t for key, t in official_weights(name).items() if "backbone." in key}
    prefix = "backbone." if name == "knet_swin_t" else ""  # both are in use
    width = next(reversed(weights.values())).shape[0]
    state = {f"{prefix}{key}": t for key, t in weights.items() if not key.startswith("norm")}
    state |= {f"{prefix}head.weight": torch.zeros(1000, width), f"{prefix}head.bias": torch.zeros(1000)}
    torch.save({"state_dict": state}, tmp_path / "backbone.pth")
    backbone = build_backbone(case.config).eval()
    load_backbone(backbone, case.config.backbone, tmp_path / "backbone.pth")
    for i, norm in enumerate(getattr(backbone, "norms", ())):
        assert torch.equal(norm.weight, torch.ones_like(norm.weight))
        norm.load_state_dict({leaf: weights[f"norm{i}.{leaf}"] for leaf in ("weight", "bias")})
    if name == "upernet_vit_b16":  # the reference has the neck's outputs
        assert_close(backbone.pos_embed, weights["pos_embed"])
        assert not backbone.patch_embed.bias.any()
        return
    with torch.inference_mode():
        maps = backbone(torch.from_numpy(image(int(expected["input_seed"]), tuple(expected["input_shape"]))))
    for i, feature in enumerate(maps):
        assert_close(feature[:, :8], expected[f"feat{i}"])
