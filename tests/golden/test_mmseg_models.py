"""The MMSegmentation models against their own outputs, training losses and gradient norms (reference outputs)."""

import json
from copy import deepcopy
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from common.config import ModelConfig
from common.models import build_model, load_weights
from tests.golden.fill import Uninitialised, fill, image
from tests.golden.rounding import SAME_KERNELS, precise

DATA = Path(__file__).parent / "data"


@dataclass(frozen=True)
class Case:
    """One official model: its config here, and the options that switch all randomness of training off."""

    config: ModelConfig
    parameters: int  # as the release counts them
    backbone: int
    still: dict = field(default_factory=lambda: {"dropout": 0.0})


CASES = {
    "upernet_r50": Case(ModelConfig("upernet", 19, "resnet50c"), 66_415_238, 23_527_264),
    "pspnet_r50": Case(ModelConfig("pspnet", 19, "resnet50c"), 48_975_494, 23_527_264),
    "ocrnet_hr18": Case(ModelConfig("ocrnet", 19, "hrnet_w18"), 12_080_036, 9_562_260, {}),
    "segformer_mit_b0": Case(
        ModelConfig("segformer", 19, "mit_b0"), 3_720_051, 3_319_392, {"dropout": 0.0, "backbone": {"drop_path": 0.0}}
    ),
    "knet_swin_t": Case(
        ModelConfig("knet", 19, "swin_tiny"), 73_052_896, 27_520_698, {"dropout": 0.0, "backbone": {"drop_path": 0.0}}
    ),
    "upernet_vit_b16": Case(
        ModelConfig("upernet", 19, "vit_base_patch16", options={"neck": "mln", "auxiliary_level": 3}),
        144_072_742,
        86_433_024,
    ),
}
# made in float64; and those that need a draw as well where rounding differs: one of the first 16 and three of 23 do
EXACT = {"pspnet_r50"}
DRAWN = {"upernet_r50": 14, "ocrnet_hr18": 14}
UNTIMED = {"upernet_r101": Case(ModelConfig("upernet", 19, "resnet101c"), 85_407_366, 42_519_392)}


def reference(name):
    with np.load(DATA / f"{name}.npz") as file:
        return {key: file[key] for key in file.files}


@pytest.fixture(scope="module", params=list(CASES))
def official(request, module_path):
    """A model's name, and a checkpoint in the official layout that holds its reference weights."""
    path = write_official(request.param, module_path)
    yield request.param, path
    path.unlink()  # hundreds of MB


@pytest.fixture
def two_threads():
    """The reference gradients were added up by two threads; with these weights another order moves norms by 0.3 %."""
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(threads)


def write_official(name, folder):
    manifest = json.loads(str(reference(name)["manifest"]))
    state = {
        key: torch.from_numpy(np.asarray(fill(key, tuple(shape))))
        for key, (shape, dtype, *marks) in manifest.items()
        if not marks
    }
    path = folder / f"{name}.pth"
    torch.save({"meta": {"iter": 40000, "CLASSES": ("road",)}, "state_dict": state, "optimizer": {}}, path)
    return path


def assert_close(ours, theirs, tolerance=1e-4):
    theirs = torch.as_tensor(theirs)
    assert ours.shape == theirs.shape
    assert torch.linalg.vector_norm(ours - theirs) <= tolerance * torch.linalg.vector_norm(theirs)


def test_outputs(official):
    name, path = official
    case, expected = CASES[name], reference(name)
    with Uninitialised():
        model = build_model(case.config)
    load_weights(model, path)
    x = torch.from_numpy(image(int(expected["input_seed"]), tuple(expected["input_shape"])))
    with torch.inference_mode():
        out = model.eval().segment(x)
    assert_close(out["logits"], expected["logits"])
    for i, aux in enumerate(out["aux"]):
        assert_close(aux, expected[f"aux{i}"])
    assert sum(key.startswith("aux") for key in expected) == len(out["aux"])
    for i in range(sum(key.startswith("feat") for key in expected)):
        assert_close(out["features"][i][:, :8], expected[f"feat{i}"])


def losses_of(out):
    """Cross-entropy of every head, averaged over all pixels; auxiliary heads weigh 0.4."""
    labels = np.random.RandomState(9).randint(0, 19, (2, 128, 192))
    labels[:, :10] = 255
    labels = torch.from_numpy(labels)

    def loss(logits):
        logits = F.interpolate(logits, labels.shape[1:], mode="bilinear", align_corners=False)
        return F.cross_entropy(logits, labels, ignore_index=255, reduction="sum") / labels.numel()

    return [loss(z) for z in out.get("stages", [out["logits"]])] + [0.4 * loss(z) for z in out["aux"]]


def test_training_step(official, two_threads):
    name, path = official
    case = CASES[name]
    expected = json.loads((DATA / "mmseg_train_losses.json").read_text())["models"][name]
    with Uninitialised():
        model = build_model(replace(case.config, options={**case.config.options, **case.still})).train()
    load_weights(model, path)
    pixels = torch.from_numpy(image(1, (2, 3, 128, 192)))
    if name in EXACT or name in DRAWN and not SAME_KERNELS:
        with torch.no_grad():  # which needs no draw
            losses = losses_of(deepcopy(model).segment(pixels))
        assert sorted(loss.item() for loss in losses) == pytest.approx(sorted(expected["losses"].values()), rel=1e-5)
        model, pixels = precise(model, DRAWN.get(name)), pixels.double()
    losses = losses_of(model.segment(pixels))
    assert sorted(loss.item() for loss in losses) == pytest.approx(sorted(expected["losses"].values()), rel=1e-5)
    sum(losses).backward()
    norms = {key: torch.linalg.vector_norm(p.grad).item() for key, p in model.named_parameters() if p.grad is not None}
    assert len(norms) == len(list(model.parameters())) - len(expected["without_gradient"])
    assert np.linalg.norm(list(norms.values())) == pytest.approx(expected["grad_norm_all"], rel=1e-3)
    for key, norm in expected["grad_norm"].items():
        if key in norms:  # the others carry another name here; the total holds them too
            assert norms[key] == pytest.approx(norm, rel=1e-3), key


@pytest.mark.parametrize("name", {**CASES, **UNTIMED})
def test_parameter_counts(name):
    case = {**CASES, **UNTIMED}[name]
    with torch.device("meta"):
        model = build_model(case.config)
    assert sum(p.numel() for p in model.parameters()) == case.parameters
    assert sum(p.numel() for p in model.backbone.parameters()) == case.backbone


def test_r101_has_the_names_of_r50_and_more_blocks():
    with torch.device("meta"):
        shallow, deep = (build_model(case.config) for case in (CASES["upernet_r50"], UNTIMED["upernet_r101"]))
    more = set(deep.state_dict()) - set(shallow.state_dict())
    assert set(shallow.state_dict()) < set(deep.state_dict())
    assert {".".join(key.split(".")[:3]) for key in more} == {f"backbone.layer3.{i}" for i in range(6, 23)}
