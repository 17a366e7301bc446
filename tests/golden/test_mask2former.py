"""Mask2Former and DeepLabV3+ of the LTSS release against their reference outputs, through files in its layout."""

import json
import pickle
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
import torch

from common.config import ModelConfig
from common.models import build_model, load_weights
from tests.golden.fill import Uninitialised, fill, image

DATA = Path(__file__).parent / "data"
NAMES = {"mask2former": "mask2former_r50_ade20k_full", "deeplabv3plus_d2": "deeplabv3plus_r50_ade20k_full"}
FROZEN = 53_120  # affine parameters of ResNet-50's norms, buffers where they are frozen


@cache
def reference(name: str) -> dict[str, np.ndarray]:
    with np.load(DATA / f"{NAMES[name]}.npz") as file:
        return {key: file[key] for key in file.files}


@cache
def official_state(name: str) -> dict[str, np.ndarray]:
    """A state dict in the release's names; those of its criterion included."""
    manifest = json.loads(str(reference(name)["manifest"]))
    return {
        key: np.zeros(shape, np.float32) if kind == "buffer" else np.asarray(fill(key, tuple(shape)))
        for key, (shape, kind) in manifest.items()
    }


def config(name: str, classes: int = 847, backbone: str = "resnet50", **options) -> ModelConfig:
    return ModelConfig(name, classes, backbone, options=options)


@cache
def loaded(name: str) -> torch.nn.Module:
    """The model, filled from a training checkpoint of the release."""
    state = {key: torch.from_numpy(value) for key, value in official_state(name).items()}
    trainer = {"iteration": 199999, "hooks": {}, "_trainer": {"optimizer": {}}}
    with Uninitialised():
        model = build_model(config(name))
    with TemporaryDirectory() as folder:
        path = Path(folder) / "model_final.pth"
        torch.save({"model": state, "iteration": 199999, "trainer": trainer}, path)
        load_weights(model, path)
    return model


@pytest.fixture(scope="module", autouse=True)
def memory():
    """Weights are kept for this file's tests only."""
    yield
    for kept in (official_state, loaded):
        kept.cache_clear()


def golden_input(name: str) -> torch.Tensor:
    expected = reference(name)
    return torch.from_numpy(image(int(expected["input_seed"]), tuple(expected["input_shape"])))


def relative(ours: torch.Tensor, expected: np.ndarray) -> float:
    return float(np.linalg.norm(ours.numpy() - expected) / np.linalg.norm(expected))


@torch.no_grad()
def test_mask2former_outputs():
    expected, model, x = reference("mask2former"), loaded("mask2former").eval(), golden_input("mask2former")
    maps = model.backbone(x)
    pixels = model.pixel_decoder(maps)
    out = model.segment(x)
    for i, features in enumerate(maps):
        assert relative(features[:, :8], expected[f"feat_res{i + 2}"]) < 1e-4
    coarsest = pixels.levels[0].transpose(1, 2).unflatten(2, pixels.shapes[0])
    assert relative(coarsest[:, ::16], expected["encoder_res5"]) < 1e-4
    assert relative(pixels.mask_features[:, ::16], expected["mask_features"]) < 1e-4
    assert relative(out["pred_logits"], expected["pred_logits"]) < 1e-4
    assert relative(out["pred_masks"][:, ::4], expected["pred_masks"]) < 1e-4


@torch.no_grad()
def test_mask2former_training_outputs_are_the_same_predictions():
    expected, model = reference("mask2former"), loaded("mask2former").train()
    out = model.segment(golden_input("mask2former"))
    masks = torch.einsum("bqd,bdhw->bqhw", out["mask_embed"], out["mask_features"])
    assert len(out["aux"]) == 9
    assert relative(out["aux"][0]["pred_logits"][:, ::8], expected["aux0_logits"]) < 1e-4
    assert relative(out["pred_logits"], expected["pred_logits"]) < 1e-4
    assert relative(masks[:, ::4], expected["pred_masks"]) < 1e-4


@torch.no_grad()
def test_deeplab_outputs():
    name = "deeplabv3plus_d2"
    expected, model, x = reference(name), loaded(name).eval(), golden_input(name)
    finest, *_, coarsest = model.backbone(x)
    assert relative(finest[:, :8, ::4, ::4], expected["feat_res2"]) < 1e-4
    assert relative(coarsest[:, :8, ::4, ::4], expected["feat_res5"]) < 1e-4
    assert relative(model.segment(x)["logits"][:, ::16, ::2, ::2], expected["logits"]) < 1e-4


def test_model_zoo_file(tmp_path):
    """A pickle of NumPy arrays, the query content under its older name, and another class count."""
    state = dict(official_state("mask2former"))
    state["sem_seg_head.predictor.static_query.weight"] = state.pop("sem_seg_head.predictor.query_feat.weight")
    path = tmp_path / "model_final.pkl"
    path.write_bytes(pickle.dumps({"model": state, "__author__": "third_party"}))
    model = build_model(config("mask2former", classes=11))
    with pytest.raises(ValueError, match="847 classes, the model has 11"):
        load_weights(model, path)
    with pytest.warns(UserWarning, match="class_embed"):
        load_weights(model, path, reset_classifier=True)
    theirs, ours = loaded("mask2former").state_dict(), model.state_dict()
    assert ours["decoder.class_embed.weight"].shape == (12, 256)
    kept = [name for name in ours if "class_embed" not in name]
    assert len(kept) == len(theirs) - 2 and all(torch.equal(ours[name], theirs[name]) for name in kept)


def test_file_without_a_tensor_is_refused(tmp_path):
    state = dict(official_state("mask2former"))
    del state["sem_seg_head.pixel_decoder.layer_1.norm.bias"]
    path = tmp_path / "broken.pkl"
    path.write_bytes(pickle.dumps({"model": state}))
    with torch.device("meta"):
        model = build_model(config("mask2former"))
    with pytest.raises(ValueError, match=r"missing: pixel_decoder\.output\.norm\.bias"):
        load_weights(model, path)


def test_names_of_maskformers_first_files():
    """Their pixel decoder has no segment of its own in the names."""
    from common.models.pretrained import detectron2

    with torch.device("meta"):
        model = build_model(config("mask2former"))
    state = {name.replace(".pixel_decoder.", "."): value for name, value in official_state("mask2former").items()}
    assert detectron2.matches({"model": state})
    assert detectron2.convert({"model": state}, model).keys() == model.state_dict().keys()


@pytest.mark.parametrize(
    ("classes", "mask2former", "deeplab"),
    [
        (59, 44_017_980, 40_361_691),
        (150, 44_041_367, 40_385_078),
        (171, 44_046_764, 40_390_475),
        (847, 44_220_496, 40_564_207),
    ],
)
def test_parameter_counts(classes, mask2former, deeplab):
    with torch.device("meta"):
        counts = {name: count(config(name, classes)) for name in NAMES}
        seesaw = count(config("mask2former", classes, class_head="seesaw"))
    assert counts == {"mask2former": mask2former - FROZEN, "deeplabv3plus_d2": deeplab}
    assert seesaw == mask2former - FROZEN + 257


def test_parameter_count_of_swin_large():
    with torch.device("meta"):
        assert count(config("mask2former", 847, "swin_large")) == 215_667_908


def count(chosen: ModelConfig) -> int:
    return sum(p.numel() for p in build_model(chosen).parameters())
