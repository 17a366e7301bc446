"""A method trains exactly the heads that its network has, and says so before any work."""

from dataclasses import replace

import pytest
import torch

from common.config import Config, ConfigError, ModelConfig
from common.models import build_model
from fully_sup.supervised import Supervised
from ltss_benchmark.methods import build_method as ltss_method
from semi_sup.config import build_method as semi_method
from tests.contexts import context
from uda.train import build_method as uda_method

UPERNET = ModelConfig("upernet", 3, "resnet18", norm="bn", options={"channels": 8, "auxiliary_channels": 8})
OCRNET = ModelConfig("ocrnet", 3, "hrnet_w18_small", norm="bn", options={"channels": 8, "context_channels": 8})
MASKED = ModelConfig("mask2former", 3, "resnet18", options={"hidden_dim": 32, "encoder_layers": 1, "decoder_layers": 1})
BOTH = {"decode": {}, "aux": {"weight": 0.4}}


def config(model: ModelConfig, **method) -> Config:
    return Config(model, method=method, name="run")


def without_auxiliary(model: ModelConfig) -> ModelConfig:
    return replace(model, options={**model.options, "auxiliary": False})


def test_named_heads_are_those_of_the_network():
    assert build_model(UPERNET).heads == build_model(OCRNET).heads == ("decode", "aux")
    assert build_model(without_auxiliary(UPERNET)).heads == ("decode",)
    for model, heads in ((UPERNET, BOTH), (OCRNET, BOTH), (without_auxiliary(UPERNET), {"decode": {}})):
        method = Supervised(config(model, heads=heads), context(3))
        method.model.eval()
        method({"labeled": batch()}, 0)["loss"].backward()
        assert all(p.grad is not None for p in method.parameters() if p.requires_grad)


def batch():
    return {"image": torch.rand(2, 3, 64, 64) * 255, "label": torch.randint(0, 3, (2, 64, 64))}


@pytest.mark.parametrize(
    "model, heads, words",
    [
        (without_auxiliary(UPERNET), BOTH, "run: method.heads.aux: the network has no such head"),
        (UPERNET, {"decode": {}}, "run: method.heads: no loss trains the network's head 'aux'; name it, or set model"),
        (UPERNET, {"aux": {}}, "no loss trains the network's head 'decode'"),
        (UPERNET, {}, "no loss trains the network's head 'decode'"),
        (OCRNET, {"decode": {}}, "no loss trains the network's head 'aux'"),
        (MASKED, {"decode": {}}, "method.heads.decode: the network has no such head; remove it .its heads: queries"),
        (UPERNET, {**BOTH, "dceode": {}}, "method.heads: unknown 'dceode'; did you mean 'decode'"),
        (UPERNET, {**BOTH, "decode": {"weight": -1}}, "heads.decode.weight: -1.0 is less than 0"),
        (UPERNET, {**BOTH, "decode": {"weight": {}}}, "heads.decode.weight: expected float, got {}"),
        (UPERNET, {**BOTH, "decode": {"sigma": 1.0}}, "heads.decode: unknown key 'sigma'"),
    ],
)
def test_fully_supervised(model, heads, words):
    with pytest.raises(ConfigError, match=words):
        Supervised(config(model, heads=heads), context(3))


@pytest.mark.parametrize("name", ["baseline", "self_training", "usrn"])
def test_semi_supervised(name):
    with pytest.raises(ConfigError, match="run: model.name: 'upernet' does not fit the method; set it to"):
        semi_method(config(UPERNET, name=name), context(3))


def test_domain_adaptation():
    with pytest.raises(ConfigError, match="run: model.name: 'upernet' does not fit the method; set it to deeplabv2"):
        uda_method(config(UPERNET, name="warm_up"), context(3))


def test_ltss():
    for name, fitting in (("mask2former", "mask2former"), ("deeplabv3plus", "deeplabv3plus_d2")):
        with pytest.raises(ConfigError, match=f"model.name: 'upernet' does not fit the method; set it to {fitting}"):
            ltss_method(config(UPERNET, name=name), context(3))
