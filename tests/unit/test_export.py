"""scripts/export.py: programs that need PyTorch or onnxruntime alone, of every architecture, and what is refused."""

import importlib.util
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from common.config import load_config
from common.models import build_model
from scripts import export
from tests.unit.four_systems import tiny_config
from tests.unit.test_models import SMALL

ROOT = Path(__file__).parents[2]
LACKING = [name for name in export.ONNX if importlib.util.find_spec(name) is None]
pytestmark = pytest.mark.usefixtures("unchanged")


def test_export_runs_without_the_project(tmp_path, call, fails):
    out, weights, config = tmp_path / "small.pt2", tmp_path / "w.safetensors", ROOT / "uda/configs/toy/warm_up.yaml"
    model = build_model(load_config(config).model).eval()
    save_file(model.state_dict(), weights)
    call(export.main, config, weights, "--size", "32x64", "--out", out)
    images = torch.randint(0, 256, (1, 3, 32, 64), dtype=torch.uint8)
    with torch.no_grad():
        found, expected = torch.export.load(out).module()(images), model.predict(images)
    assert found.shape == (1, 19, 32, 64)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert "give HEIGHTxWIDTH" in fails(export.main, config, weights, "--size", "32", "--out", out)


def test_export_refuses_what_would_not_end(tmp_path, fails):
    config, out = ROOT / "fully_sup/configs/knet/knet_s3_upernet_swin-t_8x2_512x1024_adamw_80k_cityscapes.yaml", "k.pt2"
    words = (config, tmp_path / "none.safetensors", "--size", "64x96", "--out", tmp_path / out)
    assert "--dynamic: model knet keeps its size; leave it out" in fails(export.main, *words, "--dynamic")
    assert "none.safetensors" in fails(export.main, *words), "without --dynamic its checkpoint is looked for"


def test_export_of_any_size(scenes, tmp_path, call, fails):
    """DeepLabV3+ takes sizes that it was not exported with; without its packages ONNX is refused."""
    config, weights = tiny_config("ltss_benchmark", scenes, tmp_path), tmp_path / "w.safetensors"
    model = build_model(load_config(config).model).eval()
    save_file(model.state_dict(), weights)
    words = (config, weights, "--size", "64x96", "--dynamic", "--out")
    call(export.main, *words, tmp_path / "any.pt2")
    program = torch.export.load(tmp_path / "any.pt2").module()
    for size in ((64, 96), (96, 160)):
        images = torch.randint(0, 256, (1, 3, *size), dtype=torch.uint8)
        with torch.no_grad():
            torch.testing.assert_close(program(images), model.predict(images), rtol=1e-4, atol=1e-5)

    if LACKING:
        assert "pip install .[onnx]" in fails(export.main, *words, tmp_path / "any.onnx")
        return

    import onnxruntime

    call(export.main, *words, tmp_path / "any.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "any.onnx", providers=["CPUExecutionProvider"])
    images = torch.randint(0, 256, (1, 3, 128, 64), dtype=torch.uint8)  # neither of the sizes that it was tried at
    (found,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(found), model.predict(images), rtol=1e-4, atol=1e-4)


def test_export_names_a_network_that_keeps_its_size(tmp_path):
    class Fixed(torch.nn.Module):
        def forward(self, images):
            return images.float() + torch.zeros(32, 64)

    images = torch.zeros(1, 3, 32, 64, dtype=torch.uint8)
    out = tmp_path / "fixed.pt2"
    with pytest.raises(ValueError, match="fixed.pt2: model some keeps its size .*; leave --dynamic out"):
        export.export(Fixed(), images, out, "some", dynamic=True)
    assert not out.exists() and export.export(Fixed(), images, out, "some") == 0


# Every architecture --------------------------------------------------------------------------------------------------

WITH_ONNX = pytest.mark.skipif(bool(LACKING), reason=f"not installed: {', '.join(LACKING)}")
LONG = ("ocrnet", "segformer", "daformer", "upernet_vit")
ANY_SIZE = ("pspnet", *(pytest.param(name, marks=pytest.mark.slow) for name in LONG))


@pytest.mark.parametrize("end", [".pt2", pytest.param(".onnx", marks=WITH_ONNX)])
@pytest.mark.parametrize("name", ANY_SIZE)
def test_an_architecture_is_exported_for_any_size(name, end, tmp_path):
    """`export` itself runs what it has written at two sizes and compares the scores."""
    model = export.Scores(build_model(SMALL[name]).eval())
    images = torch.randint(0, 256, (1, 3, 160, 224), dtype=torch.uint8)
    assert export.export(model, images, tmp_path / f"net{end}", name, dynamic=True) < export.TOLERANCE
