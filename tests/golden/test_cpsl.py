"""CPSL against reference outputs: the network through files of the official layout, and the pure operations."""

import json
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch

from common.config import ModelConfig
from common.losses.symmetric_cross_entropy import symmetric_cross_entropy
from common.models import build_model, load_weights
from common.models.pretrained.cpsl import has_extra_norm, read_extras
from common.ops.sinkhorn import sinkhorn
from tests.golden.fill import Uninitialised, fill, image
from uda.discriminator import Discriminator

DATA = Path(__file__).parent / "data"
FILES = {"cpsl_deeplabv2": False, "cpsl_deeplabv2_bn_clr": True}  # reference file → extra norm


def config(extra_norm: bool = False, classes: int = 19, **options) -> ModelConfig:
    scale = {"mean": (0.0, 0.0, 0.0), "std": (255.0, 255.0, 255.0), "align_corners": True}
    return ModelConfig("deeplabv2", classes, options={"extra_norm": extra_norm, **options}, **scale)


def relative(ours: torch.Tensor, reference: np.ndarray) -> float:
    return float(np.linalg.norm(ours.double().numpy() - reference) / np.linalg.norm(reference))


@cache
def manifest(name: str) -> dict[str, list]:
    return json.loads(str(np.load(DATA / f"{name}.npz")["manifest"]))


def filled(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    return torch.from_numpy(np.asarray(fill(name, shape)))


def official_file(name: str, path: Path) -> Path:
    """A file as the release writes it: containers, prototypes that want gradients, a NumPy scalar.

    The one with the extra norm is a distillation's (no prototypes), the other here has all that any stage writes.
    """
    first = not FILES[name]
    state = {key: filled(key, tuple(shape)) for key, (shape, _) in manifest(name).items()}
    prototypes = torch.arange(19 * 256, dtype=torch.float32).view(19, 256) * first
    raw = {"ResNet101": {"model_state": state, "prototypes_ema": prototypes.requires_grad_()}, "iter": 70000}
    if first:
        raw["FCDiscriminator"] = {"model_state": {f"module.d{i}": t for i, t in enumerate(adversary().values())}}
    torch.save(raw | {"best_iou": np.float64(0.5566)}, path)
    return path


@cache
def adversary() -> dict[str, torch.Tensor]:
    return Discriminator(19).state_dict()


@pytest.fixture(scope="module")
def files(module_path) -> dict[str, Path]:
    return {name: official_file(name, module_path / f"{name}.pkl") for name in FILES}


@pytest.mark.parametrize("name", FILES)
def test_official_file_gives_the_reference_outputs(name, files):
    reference = np.load(DATA / f"{name}.npz")
    with Uninitialised():
        model = build_model(config(FILES[name])).eval()
    load_weights(model, files[name])
    x = torch.from_numpy(image(int(reference["input_seed"]), tuple(reference["input_shape"])))
    with torch.no_grad():
        out = model.segment(x)
    assert out["aux"] == [] and out["logits"].shape == reference["logits"].shape
    assert relative(out["logits"], reference["logits"]) <= 1e-4
    assert relative(out["features"][:, ::8], reference["feat"]) <= 1e-4


@pytest.mark.parametrize(("name", "keys"), [("cpsl_deeplabv2", 653), ("cpsl_deeplabv2_bn_clr", 658)])
def test_names_shapes_and_counts_are_the_official_ones(name, keys):
    with torch.device("meta"):
        model = build_model(config(FILES[name]))
    state = {key: list(tensor.shape) for key, tensor in model.state_dict().items()}
    assert state == {key: shape for key, (shape, _) in manifest(name).items()} and len(state) == keys
    assert sum(p.numel() for p in model.parameters()) == 65_063_568 + 4096 * FILES[name]
    assert sum(p.numel() for p in model.layer5.parameters()) == 22_563_408


@pytest.mark.parametrize("name", FILES)
def test_extra_norm_is_found_from_the_keys(name, files):
    """By tools that open a checkpoint; a model that was configured otherwise is refused, with the option's name."""
    assert has_extra_norm(files[name]) is FILES[name]
    model = build_model(config(not FILES[name], blocks=[1, 1, 1, 1]))
    with pytest.raises(ValueError, match=f"model.options.extra_norm={str(FILES[name]).lower()}") as error:
        load_weights(model, files[name])
    assert "\n" not in str(error.value) and files[name].name in str(error.value)


def test_other_class_count_is_named(files):
    model = build_model(config(classes=16))
    with pytest.raises(ValueError, match="trained on 19 classes, the model has 16"):
        load_weights(model, files["cpsl_deeplabv2"])


def test_what_stands_beside_the_network_is_read(files):
    extras = read_extras(files["cpsl_deeplabv2"])
    assert extras.iteration == 70000 and not extras.prototypes.requires_grad
    assert torch.equal(extras.prototypes, torch.arange(19 * 256.0).view(19, 256))
    ours = Discriminator(19)
    ours.load_state_dict(dict(zip(ours.state_dict(), extras.discriminator.values(), strict=True)))
    assert all(torch.equal(a, b) for a, b in zip(ours.state_dict().values(), adversary().values(), strict=True))
    assert read_extras(files["cpsl_deeplabv2_bn_clr"]) == (None, None, 70000)


def test_assignments():
    reference = np.load(DATA / "cpsl_ops.npz")
    scores, share = torch.from_numpy(reference["scores"]), torch.from_numpy(reference["class_distribution"])
    ours = sinkhorn(scores, share, float(reference["epsilon"]), int(reference["iterations"]))
    assert relative(ours, reference["assignments"]) <= 1e-5


def test_reverse_cross_entropy():
    reference = np.load(DATA / "cpsl_ops.npz")
    labels = torch.from_numpy(reference["rce_labels"])
    labels = labels.masked_fill(labels == int(reference["rce_ignore"]), -1).to(torch.int16)
    logits = torch.from_numpy(reference["rce_logits"])
    loss = symmetric_cross_entropy(logits, labels, alpha=0.0, beta=1.0)
    assert float(loss) == pytest.approx(float(reference["rce"]), rel=1e-5)
