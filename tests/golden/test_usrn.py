"""USRN's networks against reference outputs, through files of the official layout."""

import json
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from common.config import ConfigError, ModelConfig
from common.models import build_model, load_weights
from common.ops.resize import resize
from semi_sup.subclasses import PRESETS
from tests.golden.fill import Uninitialised, fill, image

DATA = Path(__file__).parent / "data"
BASELINE, USRN = "usrn_baseline_voc", "usrn_voc_1over32"
SUBCLASSES = sum(PRESETS["voc_1over32"])
SMALL = {"blocks": [1, 1, 1, 3], "width": 4, "channels": 8, "low_channels": 4}


def config(name: str = "usrn", classes: int = 21, **options) -> ModelConfig:
    options = {"subclasses": SUBCLASSES, **options} if name == "usrn" else options
    return ModelConfig(name, classes, "resnet50", options=options, align_corners=True)


def relative(ours: torch.Tensor, reference: np.ndarray) -> float:
    return float(np.linalg.norm(ours.double().numpy() - reference) / np.linalg.norm(reference))


@cache
def manifest(name: str) -> dict[str, list]:
    return json.loads(str(np.load(DATA / f"{name}.npz")["manifest"]))


def filled(name: str) -> dict[str, torch.Tensor]:
    return {key: torch.from_numpy(np.asarray(fill(key, tuple(shape)))) for key, (shape, _) in manifest(name).items()}


@pytest.fixture(scope="module")
def files(module_path) -> dict[str, Path]:
    """Files as the release writes them: names behind `module.`, the best score a NumPy scalar."""
    for name in (BASELINE, USRN):
        state = {f"module.{key}": tensor for key, tensor in filled(name).items()}
        best = {"arch": "DistributedDataParallel", "epoch": 7, "monitor_best": np.float64(70.25)}
        torch.save({**best, "state_dict": state}, module_path / f"{name}.pth")
    return {name: module_path / f"{name}.pth" for name in (BASELINE, USRN)}


@pytest.fixture(scope="module")
def dual(files) -> torch.nn.Module:
    with Uninitialised():
        model = build_model(config())
    load_weights(model, files[USRN])
    return model.eval()


def test_baseline_gives_the_reference_output(files):
    with Uninitialised():
        model = build_model(config("deeplabv3plus")).eval()
    load_weights(model, files[BASELINE])
    reference = np.load(DATA / f"{BASELINE}.npz")
    x = torch.from_numpy(image(int(reference["input_seed"]), tuple(reference["input_shape"])))
    with torch.no_grad():
        out = model.segment(x)
    assert out["features"].shape == (1, 256, 25, 33) and "sub_logits" not in out
    assert relative(resize(out["logits"], (97, 129), True)[..., ::2, ::2], reference["logits"]) <= 1e-4


def test_both_branches_give_the_reference_outputs(dual):
    reference = np.load(DATA / f"{USRN}.npz")
    x = torch.from_numpy(image(int(reference["input_seed"]), tuple(reference["input_shape"])))
    with torch.no_grad():
        out = dual.segment(x, subclasses=True)
    assert relative(resize(out["logits"], (97, 129), True)[..., ::2, ::2], reference["logits"]) <= 1e-4
    assert relative(out["sub_logits"][:, ::8], reference["sub_logits"]) <= 1e-4


def test_both_branches_start_from_a_file_of_one(tmp_path):
    both = build_model(config(copy_branch=True, **SMALL)).eval()
    new = both.classifier_SubCls[1].weight.clone()
    one = build_model(config("deeplabv3plus", **SMALL)).eval()
    x = torch.randn(1, 3, 40, 48)
    torch.save(one.state_dict(), tmp_path / "one.pth")
    load_weights(both, tmp_path / "one.pth")
    with torch.no_grad():
        out = both.segment(x, subclasses=True)
        torch.testing.assert_close(out["logits"], one.segment(x)["logits"])
        torch.testing.assert_close(out["sub_features"], out["features"])
    assert torch.equal(both.classifier_SubCls[1].weight, new)


@pytest.mark.parametrize("form", ["release", "checkpoint"])
def test_subclass_branch_is_left_out_by_name(form, files, dual, tmp_path, caplog):
    path = files[USRN]
    if form == "checkpoint":  # of a method that owns the network
        path = tmp_path / "model.safetensors"
        save_file({f"net.{n}": t.contiguous() for n, t in dual.state_dict().items()}, path, {"predict_prefix": "net."})
    model = build_model(config("deeplabv3plus")).eval()
    with caplog.at_level("INFO"):
        load_weights(model, path)
    families = "encoder.backbone.layer2_aux, encoder.backbone.layer3_aux, encoder.backbone.layer4_aux, "
    families += "encoder.aspp_SubCls, encoder.decoder_SubCls, classifier_SubCls"
    assert f"unused: 308 tensors of {families}" in caplog.text
    x = torch.randint(0, 256, (1, 3, 40, 48), dtype=torch.uint8)
    with torch.no_grad():
        torch.testing.assert_close(model.predict(x), dual.predict(x))


def test_files_that_do_not_fit_are_explained(files, tmp_path):
    single, two = build_model(config("deeplabv3plus", **SMALL)), build_model(config(**SMALL))
    with pytest.raises(ValueError, match="usrn_baseline_voc.pth: no subclass branch in the file; set model.name"):
        load_weights(two, files[BASELINE])
    with pytest.raises(ValueError, match="or set model.options.copy_branch=true"):
        load_weights(two, files[BASELINE])
    torch.save({**single.state_dict(), "encoder.projector.weight": torch.zeros(1)}, tmp_path / "extra.pth")
    with pytest.raises(ValueError, match="extra.pth: does not fit this model. not in the model: encoder.proj"):
        load_weights(single, tmp_path / "extra.pth")
    torch.save({"state_dict": two.state_dict()}, tmp_path / "two.pth")
    with pytest.raises(ValueError, match=r"classifier_SubCls.1.weight \(177, 8, 1, 1\) for \(201, 8, 1, 1\)"):
        load_weights(build_model(config(**SMALL, subclasses=201)), tmp_path / "two.pth")


@pytest.mark.parametrize(
    ("file", "name", "entries", "parameters"),
    [(BASELINE, "deeplabv3plus", 374, 40_352_181), (USRN, "usrn", 682, 80_519_110)],
)
def test_names_shapes_and_counts_are_the_official_ones(file, name, entries, parameters):
    with torch.device("meta"):
        model = build_model(config(name))
    state = {key: list(tensor.shape) for key, tensor in model.state_dict().items()}
    assert state == {key: shape for key, (shape, _) in manifest(file).items()} and list(state) == list(manifest(file))
    assert len(state) == entries and sum(p.numel() for p in model.parameters()) == parameters
    backbone = model.encoder.backbone
    assert [block.conv2.dilation for block in backbone.layer4] == [(2, 2), (4, 4), (8, 8)]
    assert backbone.layer3[0].conv2.stride == (2, 2) and backbone.layer3[1].conv2.dilation == (1, 1)
    assert {(m.eps, m.momentum) for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)} == {(1e-5, 0.1)}


def test_parameters_of_the_optimiser_groups():
    with torch.device("meta"):
        model = build_model(config())
    backbone = list(model.encoder.backbone.parameters())
    assert len(backbone) == 285 and round(sum(p.numel() for p in backbone) / 1e6, 2) == 46.79
    rest = {id(p) for p in model.parameters()} - {id(p) for p in backbone}
    assert len(rest) == 58


def test_initial_weights(tmp_path):
    """Both copies of the stages start from one file in torchvision's layout, whose classifier is dropped."""
    source = build_model(config("deeplabv3plus", **SMALL)).encoder.backbone.state_dict()
    torch.save({**source, "fc.weight": torch.zeros(1000, 128), "fc.bias": torch.zeros(1000)}, tmp_path / "r50.pth")
    model = build_model(ModelConfig("usrn", 3, "resnet50", str(tmp_path / "r50.pth"), align_corners=True,
                                    options={**SMALL, "subclasses": 7}))  # fmt: skip
    own = model.encoder.backbone.state_dict()
    assert all(torch.equal(own[name], tensor) for name, tensor in source.items())
    for name in source:
        if name.startswith(("layer2", "layer3", "layer4")):
            assert torch.equal(own[name.replace(".", "_aux.", 1)], source[name])
    scratch = build_model(config(**SMALL)).encoder.backbone
    assert torch.equal(scratch.layer3_aux[0].conv1.weight, scratch.layer3[0].conv1.weight)
    assert scratch.layer3_aux[0].conv1.weight is not scratch.layer3[0].conv1.weight


def test_padding_is_by_reflection():
    model = build_model(config("deeplabv3plus", **SMALL)).eval()
    images = torch.randint(0, 256, (2, 3, 37, 45), dtype=torch.uint8)
    x = model.normalise(images)
    assert x.shape == (2, 3, 40, 48)
    assert torch.equal(x[..., 37:, :45], x[..., [35, 34, 33], :45]) and torch.equal(x[..., 45:], x[..., [43, 42, 41]])
    with torch.no_grad():
        expected = F.interpolate(model.segment(x)["logits"], (40, 48), mode="bilinear", align_corners=True)
        torch.testing.assert_close(model.predict(images), expected[..., :37, :45], rtol=1e-5, atol=1e-5)


def test_settings_that_cannot_work():
    with pytest.raises(ConfigError, match="subclasses: 20 for 21 classes"):
        build_model(config(subclasses=20))
    with pytest.raises(ConfigError, match="unknown 'resnet5O'; did you mean 'resnet50'"):
        build_model(ModelConfig("deeplabv3plus", 21, "resnet5O", align_corners=True))
    with pytest.raises(ConfigError, match="align_corners"):
        build_model(ModelConfig("deeplabv3plus", 21, "resnet50"))
    with pytest.raises(ValueError, match="one image at a time"):
        build_model(config(**SMALL)).train().segment(torch.zeros(1, 3, 32, 32))
