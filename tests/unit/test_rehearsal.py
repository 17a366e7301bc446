"""What cannot be trained is refused before a label is read, a rank joined or a folder made."""

import runpy
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from common import experiment
from common.config import Config, ConfigError, ModelConfig, load_config
from common.engine import rehearse
from fully_sup import train as supervised
from fully_sup.supervised import METHODS as supervised_methods
from ltss_benchmark.methods import METHODS as ltss_methods
from ltss_benchmark.methods import build_method as ltss_method
from semi_sup.config import METHODS as semi_sup_methods
from semi_sup.config import build_method as semi_sup_method
from tests.contexts import context
from tests.unit.test_cpsl_method import CLASSES, SMALL
from uda.train import METHODS as uda_methods
from uda.train import build_method as uda_method

pytestmark = pytest.mark.usefixtures("unchanged")
ROOT = Path(__file__).resolve().parents[2]
DEEPLAB = "ltss_benchmark/configs/toy/deeplabv3p/deeplabv3p_R18.yaml"
MASK2FORMER = "ltss_benchmark/configs/toy/mask2former/maskformer2_R18.yaml"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["remedies.focus.name=focl"], "remedies.focus.name: unknown 'focl'; did you mean 'focal'"),
        (["method.heads.decode.sigma=1"], "unknown key 'sigma'"),
        (["method.heads.deocde={}"], "method.heads: unknown 'deocde'"),
        (["method.avrage=all"], "unknown key 'avrage'"),
        (["model.options.channels=none"], "model.options.channels"),
        (["optim.groups=[{match: nrom}]"], "no parameter's name matches 'nrom'"),
        (["model.checkpoint=/nowhere/w.pth"], "model.checkpoint: /nowhere/w.pth: no such weight file"),
        (["model.pretrained=/nowhere/w.pth"], "model.pretrained: /nowhere/w.pth: no such weight file"),
        (["train.devices=4"], "batch_size 2 must be a multiple of train.devices 4"),
    ],
)
def test_mistakes_are_found_before_labels_are_counted(config, tmp_path, monkeypatch, fails, words, message):
    monkeypatch.setattr(experiment, "class_statistics", None)
    monkeypatch.setattr(experiment, "make_streams", None)
    assert message in fails(supervised.main, config, *words)
    assert [path.name for path in tmp_path.iterdir()] == ["small.yaml"]


@pytest.mark.parametrize(
    ("path", "build"),
    [
        ("semi_sup/configs/voc_1over32_baseline.json", semi_sup_method),
        ("uda/configs/gta5_to_cityscapes/warm_up.yaml", uda_method),
        ("ltss_benchmark/configs/toy/mask2former/maskformer2_R18.yaml", ltss_method),
    ],
)
def test_every_system_can_be_rehearsed(path, build):
    cfg = load_config(ROOT / path)
    cfg = replace(cfg, train=replace(cfg.train, devices=1))
    state = torch.get_rng_state()
    rehearse(cfg, build)
    assert torch.get_rng_state().equal(state) and torch.get_default_device().type == "cpu"
    wrong = replace(cfg, method={**cfg.method, "nonsense": 1})
    with pytest.raises(ConfigError, match="nonsense"):
        rehearse(wrong, build)


@pytest.mark.parametrize(
    ("path", "build", "message"),
    [
        ("semi_sup/configs/voc_1over32_baseline.json", semi_sup_method, None),
        (DEEPLAB, ltss_method, None),
        ("uda/configs/daformer/gta5_to_cityscapes.yaml", uda_method, "DAFormer runs the network in parts, set it to"),
        (MASK2FORMER, ltss_method, "Mask2FormerMethod takes minutes to compile on a CPU"),
    ],
)
def test_compilation_is_refused_where_it_would_not_help(path, build, message):
    cfg = load_config(ROOT / path, ["train.devices=1", "train.compile=true", "model.pretrained=true"])
    if message is None:
        rehearse(cfg, build)
        return
    with pytest.raises(ConfigError, match=f"train.compile: {message}"):
        rehearse(cfg, build)


def test_a_run_goes_on_without_the_run_that_it_branched_from(tmp_path):
    """Once it has a checkpoint of its own, the other's may be gone."""
    words = [
        "train.devices=1",
        "model.pretrained=true",
        f"output={tmp_path}",
        "name=late",
        f"train.branch={tmp_path}/gone",
    ]
    cfg = load_config(ROOT / "semi_sup/configs/voc_1over32_baseline.json", words)
    with pytest.raises(ValueError, match="train.branch: .*gone: no checkpoint; give a folder"):
        rehearse(cfg, semi_sup_method)
    (tmp_path / "late/checkpoints/step_00000004").mkdir(parents=True)
    rehearse(cfg, semi_sup_method)


def test_the_methods_that_are_compiled():
    """All that call their network as a whole in training."""
    methods = {**supervised_methods, **semi_sup_methods, **uda_methods, **ltss_methods}
    compiled = {name for name, method in methods.items() if method.uncompiled is None}
    semi_supervised, adapted = {"baseline", "self_training", "usrn"}, {"warm_up", "cpsl", "proda", "distill"}
    assert compiled == {"supervised", "deeplabv3plus", *semi_supervised, *adapted}


@pytest.mark.parametrize(
    ("path", "build", "gpu", "words"),
    [
        ("semi_sup/configs/voc_1over32_baseline.json", semi_sup_method, True, None),
        ("semi_sup/configs/voc_1over32_baseline.json", semi_sup_method, False, "without a GPU set it to true"),
        (DEEPLAB, ltss_method, True, "has not been checked with DeepLabV3PlusMethod; set it to true"),
    ],
)
def test_graphs_are_recorded_of_methods_that_were_checked(path, build, gpu, words, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    changes = ["train.devices=1", "train.compile=reduce-overhead", "model.pretrained=true"]
    cfg = load_config(ROOT / path, changes)
    if words is None:
        rehearse(cfg, build)
        return
    with pytest.raises(ConfigError, match=f"train.compile: reduce-overhead .*{words}"):
        rehearse(cfg, build)


@pytest.mark.parametrize("name", ["cpsl", "proda", "distill"])
def test_stages_are_rehearsed_with_their_files(tmp_path, name):
    """They read files of earlier steps, which stay on the CPU while the network is on the meta device."""
    model = ModelConfig("deeplabv2", CLASSES, mean=(0, 0, 0), std=(255, 255, 255), align_corners=True, options=SMALL)
    np.save(tmp_path / "delta.npy", np.full(CLASSES, 1 / CLASSES))
    torch.save(torch.randn(CLASSES, 8), tmp_path / "prototypes.pt")
    cfg = Config(name="stage", output=str(tmp_path), model=model)
    files = {"prototypes": str(tmp_path / "prototypes.pt"), "class_distribution": str(tmp_path / "delta.npy")}
    options = {"cpsl": files, "proda": {"prototypes": files["prototypes"]}}.get(name)
    if options is None:
        warm = uda_method(replace(cfg, method={"name": "warm_up", "adversarial": 0.0}), context(CLASSES))
        torch.save(warm.model.state_dict(), tmp_path / "teacher.pth")
        options = {"teacher": str(tmp_path / "teacher.pth")}
    cfg = replace(cfg, method={"name": name, **options})
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    rehearse(cfg, uda_method)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before

    (tmp_path / ("teacher.pth" if name == "distill" else "prototypes.pt")).unlink()
    with pytest.raises((ValueError, OSError), match="teacher.pth|prototypes.pt"):
        rehearse(cfg, uda_method)


@pytest.mark.parametrize("system", ["fully_sup", "uda"])
@pytest.mark.parametrize(("name", "wanted"), [("train.py", "CONFIG"), ("test.py", "CONFIG or CHECKPOINT")])
def test_what_is_optional_is_not_asked_for(system, name, wanted, monkeypatch, capsys):
    program = ROOT / system / name
    monkeypatch.setattr(sys, "argv", [name])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(program), run_name="__main__")
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert end.value.code == 2 and error.partition("required: ")[2] == wanted
