"""Files of DAFormer, HRDA and MIC: which of their networks is loaded, and what is wrong with one that does not fit."""

import pytest
import torch

from common.config import ModelConfig
from common.models import build_model, load_model

SMALL = ModelConfig("deeplabv2_reduced", 3, "resnet18", options={"backbone": {"output_stride": 32}})


def official(seed):
    """A network's tensors under the release's names: those of the head differ from ours."""
    torch.manual_seed(seed)
    state = build_model(SMALL).state_dict()
    renamed = {}
    for name, tensor in state.items():
        branch, _, leaf = name.removeprefix("decode_head.convs.").partition(".")
        renamed[f"decode_head.aspp_modules.{branch}.conv.{leaf}" if "convs." in name else name] = tensor
    return renamed


@pytest.fixture
def networks():
    return {"model": official(1), "ema_model": official(2), "imnet_model": official(3)}


def write(networks, path, wrapper=""):
    state = {f"{wrapper}{part}.{name}": t for part, tensors in networks.items() for name, t in tensors.items()}
    torch.save({"meta": {"iter": 40000}, "state_dict": state}, path)
    return path


def head_of(model):
    return model.decode_head.convs[0].weight


@pytest.mark.parametrize("prefix, part", [(None, "model"), ("model.", "model"), ("teacher.", "ema_model")])
@pytest.mark.parametrize("wrapper", ["", "module."])
def test_each_network_by_its_prefix(networks, tmp_path, prefix, part, wrapper):
    model = load_model(SMALL, write(networks, tmp_path / "a.pth", wrapper), prefix)
    assert torch.equal(head_of(model), networks[part]["decode_head.aspp_modules.0.conv.weight"])


def test_published_files_hold_the_student_alone(networks, tmp_path):
    path = write({"model": networks["model"]}, tmp_path / "a.pth")
    assert torch.equal(head_of(load_model(SMALL, path)), networks["model"]["decode_head.aspp_modules.0.conv.weight"])
    with pytest.raises(ValueError, match="a.pth: holds no network ema_model"):
        load_model(SMALL, path, "teacher.")


def test_a_missing_tensor_is_an_error(networks, tmp_path):
    del networks["model"]["decode_head.aspp_modules.1.conv.bias"]
    with pytest.raises(ValueError, match="a.pth: does not fit this model. missing: decode_head.convs.1.bias"):
        load_model(SMALL, write(networks, tmp_path / "a.pth"))
