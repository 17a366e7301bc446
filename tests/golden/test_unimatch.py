"""UniMatch's and UniMatch V2's networks against reference outputs, through files of the official layout."""

import json
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from common.config import ConfigError, ModelConfig
from common.models import build_model, load_weights
from common.models.backbones.dinov2 import DINOv2, cubic_matrix
from common.models.dpt import whole_patches
from common.models.pretrained.unimatch import UNUSED, ours
from common.ops.resize import resize
from tests.golden.fill import fill, image

DATA = Path(__file__).parent / "data"
V1, V2 = "unimatch_deeplabv3plus_r50", "unimatch_v2_dinov2_small_dpt"
TINY = {"dim": 16, "heads": 2, "taps": [0, 1, 2, 3], "grid": 3}
SMALL = {"widths": [4, 6, 8, 8], "channels": 4, "backbone": TINY}


def config(name: str = "dpt", classes: int = 21, **options) -> ModelConfig:
    backbone = "dinov2_small" if name == "dpt" else "resnet50s"
    return ModelConfig(name, classes, backbone, options=options, align_corners=True)


def relative(ours: torch.Tensor, reference: np.ndarray) -> float:
    return float(np.linalg.norm(ours.double().numpy() - reference) / np.linalg.norm(reference))


@cache
def golden(name: str):
    return np.load(DATA / f"{name}.npz")


@cache
def manifest(name: str) -> dict[str, list]:
    return json.loads(str(golden(name)["manifest"]))


def filled(name: str) -> dict[str, torch.Tensor]:
    """The official tensors: V2's positions and LayerScales are scaled, or nobody would notice them."""
    scales = json.loads(str(golden(name)["scale"])) if name == V2 else {}
    state = {}
    for key, (shape, _) in manifest(name).items():
        factor = next((value for end, value in scales.items() if key.endswith(end)), 1.0)
        value = np.asarray(fill(key, tuple(shape)))
        state[key] = torch.from_numpy(value if factor == 1.0 else value * np.float32(factor))
    return state


def save(state: dict[str, torch.Tensor], path: Path, key: str = "model", **more) -> Path:
    """A file as the release writes it."""
    network = {f"module.{name}": tensor for name, tensor in state.items()}
    torch.save({key: network, "epoch": 3, "previous_best": np.float64(70.25), **more}, path)
    return path


@pytest.fixture(scope="module")
def deeplab(module_path) -> torch.nn.Module:
    model = build_model(config("deeplabv3plus_unimatch"))
    load_weights(model, save(filled(V1), module_path / "v1.pth"))
    return model.eval()


@pytest.fixture(scope="module")
def dpt(module_path) -> torch.nn.Module:
    """From a file that holds the student, too, here of zeros: V2's tables are of the average."""
    student = {f"module.{name}": torch.zeros(1) for name in manifest(V2)}
    model = build_model(config())
    load_weights(model, save(filled(V2), module_path / "v2.pth", "model_ema", model=student))
    return model.eval()


@torch.no_grad()
def test_deeplab_gives_the_reference_output(deeplab):
    reference = golden(V1)
    shape = tuple(int(side) for side in reference["input_shape"])
    c1, c4 = deeplab.encode(torch.from_numpy(image(int(reference["input_seed"]), shape)))
    assert relative(c1[:, ::16], reference["c1"]) <= 1e-4 and relative(c4[:, ::64], reference["c4"]) <= 1e-4

    rng = np.random.RandomState(3)
    masks = [torch.from_numpy(2 * (rng.random_sample((1, n)) < 0.5)).float()[..., None, None] for n in (256, 2048)]
    for key, maps in (("logits", (c1, c4)), ("logits_fp", (c1 * masks[0], c4 * masks[1]))):
        logits = resize(deeplab.decode(maps), shape[2:], True)
        assert relative(logits[..., ::2, ::2], reference[key]) <= 1e-4, key


@torch.no_grad()
@pytest.mark.parametrize(("size", "seed", "step"), [((70, 98), 0, 1), ((518, 518), 1, 14), ((532, 560), 2, 14)])
def test_dpt_gives_the_reference_output(dpt, size, seed, step):
    reference, name = golden(V2), f"{size[0]}x{size[1]}"
    maps = dpt.encode(torch.from_numpy(image(seed, (1, 3, *size))))
    logits = dpt.decode(maps)
    assert logits.shape[-2:] == (8 * size[0] // 14, 8 * size[1] // 14)
    assert relative(resize(logits, size, True)[..., ::step, ::step], reference[f"logits_{name}"]) <= 1e-4

    if step == 1:
        taps = torch.stack([x.flatten(2).transpose(1, 2)[..., ::16] for x in maps])
        assert relative(taps, reference["taps_70x98"]) <= 1e-4 and relative(logits, reference["head_70x98"]) <= 1e-4


@torch.no_grad()
@pytest.mark.parametrize("grid", [(5, 7), (38, 40), (57, 57)])
def test_positions_are_resampled_as_by_the_release(dpt, grid):
    reference = golden(V2)[f"pos_{grid[0]}x{grid[1]}"]
    positions = dpt.backbone.positions(*grid)[0, :: max(1, grid[0] * grid[1] // 60), ::16]
    assert relative(positions, reference) <= 1e-5


def test_weights_of_positions():
    """Equal to torch's resizing by a factor; the table of a square of its size is itself."""
    table = torch.randn(1, 1, 37, 1)
    expected = F.interpolate(table, scale_factor=(20.1 / 37, 1.0), mode="bicubic")
    torch.testing.assert_close(cubic_matrix(20, 37) @ table[0, 0], expected[0, 0], rtol=1e-4, atol=1e-5)
    backbone = DINOv2(**{**TINY, "taps": (0, 1, 2, 3)})
    assert backbone.positions(3, 3) is backbone.pos_embed


@pytest.mark.parametrize(
    ("file", "name", "parameters"), [(V1, "deeplabv3plus_unimatch", 40_475_957), (V2, "dpt", 24_795_637)]
)
def test_names_shapes_and_counts_are_the_official_ones(file, name, parameters):
    with torch.device("meta"):
        model = build_model(config(name))
    theirs = {ours(key): shape for key, (shape, _) in manifest(file).items() if not key.startswith(UNUSED)}
    assert {key: list(tensor.shape) for key, tensor in model.state_dict().items()} == theirs
    unused = sum(np.prod(shape) for key, (shape, _) in manifest(file).items() if key.startswith(UNUSED))
    assert sum(p.numel() for p in model.parameters()) + unused == parameters


@pytest.mark.parametrize(
    ("name", "backbone", "parameters"),
    [("deeplabv3plus_unimatch", "resnet101s", 59_468_085), ("dpt", "dinov2_base", 97_528_789),
     ("dpt", "dinov2_large", 335_579_157)],
)  # fmt: skip
def test_other_sizes(name, backbone, parameters):
    with torch.device("meta"):
        model = build_model(ModelConfig(name, 21, backbone, align_corners=True))
    own = sum(p.numel() for p in model.parameters())
    if name == "dpt":  # what the release has and does not use
        channels, dim = model.decode_head.conv_seg.in_channels, model.backbone.channels[0]
        own += dim + 2 * (9 * channels**2 + channels)
    assert own == parameters


def test_images_are_resized_to_whole_patches():
    assert [whole_patches((side, side))[0] for side in (375, 500, 333, 512, 3)] == [378, 504, 336, 518, 14]
    model = build_model(config(**SMALL)).eval()
    images = torch.randint(0, 256, (2, 3, 37, 45), dtype=torch.uint8)
    x = resize(model.standardise(images), (42, 42), True)
    torch.testing.assert_close(model.normalise(images), x)
    with torch.no_grad():
        expected = resize(resize(model.segment(x)["logits"], (42, 42), True), (37, 45), True)
        torch.testing.assert_close(model.predict(images), expected, rtol=1e-5, atol=1e-5)
    label = torch.zeros(2, 37, 45)
    assert model.pad_label(label) is label


def test_locked_backbone_is_not_trained():
    model = build_model(config(**SMALL, lock_backbone=True))
    assert not any(p.requires_grad for p in model.backbone.parameters())
    assert all(p.requires_grad for p in model.decode_head.parameters())


def test_settings_that_cannot_work():
    with pytest.raises(ConfigError, match="align_corners: DPT"):
        build_model(ModelConfig("dpt", 21, "dinov2_small"))
    with pytest.raises(ConfigError, match="align_corners: UniMatch"):
        build_model(ModelConfig("deeplabv3plus_unimatch", 21, "resnet18"))
    with pytest.raises(ConfigError, match="model.backbone: unknown 'resnet50'"):
        build_model(ModelConfig("dpt", 21, "resnet50", align_corners=True))
    small = ModelConfig("deeplabv3plus_unimatch", 3, "resnet18", options={"channels": 8}, align_corners=True)
    with pytest.raises(ValueError, match="one image at a time"):
        build_model(small).train().segment(torch.zeros(1, 3, 32, 32))
