"""DAFormer's networks against outputs of the official ones, out of files as the release writes them."""

import pytest
import torch

from common.config import ModelConfig
from common.models import build_model, load_weights
from tests.golden.fill import image
from tests.golden.test_mmseg_models import assert_close, reference, write_official

EPS = {"backbone": {"reduction_eps": 1e-5}}
CASES = {
    "daformer_mitb5": (ModelConfig("daformer", 19, "mit_b5", options=EPS), 85_155_283, 81_443_008),
    "dlv2red_r101": (ModelConfig("deeplabv2_reduced", 19, "resnet101c"), 43_219_846, 42_519_392),
}


@pytest.mark.parametrize("name", CASES)
def test_parameter_counts(name):
    config, whole, backbone = CASES[name]
    with torch.device("meta"):
        model = build_model(config)
    assert sum(p.numel() for p in model.parameters()) == whole
    assert sum(p.numel() for p in model.backbone.parameters()) == backbone


@pytest.mark.parametrize("name", CASES)
def test_outputs(name, tmp_path):
    """The file has the container of the release: the student beside a teacher and an ImageNet network, which are 0."""
    expected = reference(name)
    path = write_official(name, tmp_path)
    raw = torch.load(path)
    student = {f"model.{key}": tensor for key, tensor in raw["state_dict"].items()}
    others = {f"{part}.{key}": torch.zeros(()) for part in ("ema_model", "imnet_model") for key in raw["state_dict"]}
    torch.save({**raw, "state_dict": {**others, **student}}, path)

    model = build_model(CASES[name][0])
    load_weights(model, path)
    x = torch.from_numpy(image(int(expected["input_seed"]), tuple(expected["input_shape"])))
    with torch.inference_mode():
        out = model.eval().segment(x)

    assert_close(out["logits"], expected["logits"])
    for i, feature in enumerate(out["features"]):
        assert_close(feature[:, :8], expected[f"feat{i}"])
    if "upsampled" in expected:
        upsampled = model.predict(x * model.std + model.mean)
        assert_close(upsampled[..., ::8, ::8], expected["upsampled"])


def test_which_layer_norms_have_the_other_eps():
    """53 of MiT-B5's 161: the four patch embeddings' and those after a reduction of keys."""
    with torch.device("meta"):
        model = build_model(CASES["daformer_mitb5"][0])
    eps = [m.eps for m in model.modules() if isinstance(m, torch.nn.LayerNorm)]
    assert (eps.count(1e-5), eps.count(1e-6)) == (53, 108)
