"""Remedies after training: closed forms, one pass for many strengths, and what they leave."""

import json
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from common.config import Config, ConfigError, EvalConfig, ModelConfig, load_config
from common.engine.trainer import Trainer
from common.evaluation import evaluate
from common.evaluation.per_image import read_per_image
from common.evaluation.variants import Repeats, Variants, View, evaluate_variants
from common.losses.counts import Counts
from common.losses.logit_adjustment import post_hoc_offsets
from common.models import SegmentationModel
from common.rebalance import Given, build_stage2, find_classifier
from common.report.runs import RunFolder
from fully_sup import test as fully_sup_test
from fully_sup.supervised import build_method
from scripts import rebalance
from tests.contexts import context
from tests.unit.test_evaluation import Scene
from tests.unit.test_models import SMALL

pytestmark = [
    pytest.mark.usefixtures("unchanged", "one_thread"),
    pytest.mark.filterwarnings("ignore:.*it cannot be learnt"),
]
PIXELS = [900, 90, 9, 1]


class Small(SegmentationModel):
    """Eight features at stride 4 and a 1×1 classifier."""

    classifiers = ("head.1",)

    def __init__(self, bias=True):
        super().__init__(4, (0.0, 0.0, 0.0), (255.0, 255.0, 255.0))
        self.head = nn.Sequential(nn.Conv2d(3, 8, 4, stride=4), nn.Conv2d(8, 4, 1, bias=bias))

    def segment(self, x):
        return {"logits": self.head(x)}


def given(features=None, model=None, **changes):
    cfg = Config(model or ModelConfig("none", 4), **changes)
    return Given(cfg, Counts.from_pixels(PIXELS), "remedy: run", lambda mib: features)


def remedy(name, *words):
    return build_stage2(name, words)[""]


# The remedies ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["logit_adjustment", "tau_norm"])
def test_strength_0_is_the_identity_bit_for_bit(name):
    trained = nn.Conv2d(8, 4, 1)
    made = remedy(name, "tau=0")(trained, given())
    assert made is not trained
    assert all(torch.equal(value, made.state_dict()[key]) for key, value in trained.state_dict().items())


def test_folded_adjustment_is_that_of_the_evaluation():
    trained, features = nn.Conv2d(8, 4, 1), torch.randn(2, 8, 3, 5)
    made = remedy("logit_adjustment", "tau=0.7")(trained, given())
    expected = trained(features) + post_hoc_offsets(PIXELS, 0.7).view(-1, 1, 1)
    torch.testing.assert_close(made(features), expected)


def test_weights_normalised_by_tau():
    trained = nn.Conv2d(2, 4, 1)
    with torch.no_grad():
        trained.weight.copy_(torch.tensor([[3.0, 4.0], [0.0, 2.0], [0.6, 0.8], [0.0, 0.0]]).view(4, 2, 1, 1))
    weight = trained.weight.flatten(1)

    whole = remedy("tau_norm", "bias=drop")(trained, given())
    expected = torch.tensor([[0.6, 0.8], [0.0, 1.0], [0.6, 0.8], [0.0, 0.0]])
    torch.testing.assert_close(whole.weight.flatten(1), expected)
    assert not whole.bias.any()

    half = remedy("tau_norm", "tau=0.5")(trained, given())
    torch.testing.assert_close(half.weight.flatten(1)[0], weight[0] / 5**0.5)
    assert torch.equal(half.bias, trained.bias)


def test_classifiers_that_do_not_fit_are_refused():
    with pytest.raises(ConfigError, match="run: the classifier has no bias that can hold it; set eval.logit_adj"):
        remedy("logit_adjustment", "tau=0.5")(nn.Conv2d(8, 4, 1, bias=False), given())
    with pytest.raises(ConfigError, match="the classifier is a Sequential, not a 1×1 convolution"):
        remedy("tau_norm")(nn.Sequential(nn.Conv2d(8, 4, 1)), given())


def test_adjusting_twice_is_said():
    twice = given(remedies={"logits": {"name": "balanced_softmax"}}, eval=EvalConfig(logit_adjustment=0.5))
    with pytest.warns(UserWarning, match="both add up") as said:
        remedy("logit_adjustment")(nn.Conv2d(8, 4, 1), twice)
    assert [str(warning.message) for warning in said] == [
        "remedy: run: remedies.logits balanced_softmax, in training: both add up",
        "remedy: run: eval.logit_adjustment: 0.5: both add up",
    ]


def test_the_prior_is_given_back_where_it_was_left_out():
    trained = nn.Conv2d(8, 4, 1)
    balanced = given(remedies={"logits": {"name": "balanced_softmax"}})
    less = remedy("logit_adjustment", "tau=-0.5")(trained, balanced).bias
    with pytest.warns(UserWarning, match="both add up"):
        more = remedy("logit_adjustment", "tau=0.5")(trained, balanced).bias
    torch.testing.assert_close(less + more, 2 * trained.bias)
    with pytest.raises(ConfigError, match="remedy: run: tau: -0.5: adds back a prior that only logit_adjustment"):
        remedy("logit_adjustment", "tau=-0.5")(trained, given())


def test_one_option_may_have_several_values():
    found = build_stage2("tau_norm", ["tau=0.1,1e-2", "bias=drop"])
    assert {name: (made.tau, made.bias) for name, made in found.items()} == {
        "tau_0.1": (0.1, "drop"),
        "tau_1e-2": (0.01, "drop"),
    }
    for name, words, message in (
        ("bbn", [], "remedy: unknown 'bbn'"),
        ("tau_norm", ["tua=1"], "tau_norm: unknown key 'tua'"),
        ("tau_norm", ["tau=-1"], "tau_norm.tau: -1.0"),
        ("tau_norm", ["tau=1", "tau=2"], "tau is given twice"),
        ("tau_norm", ["tau=1,2", "bias=keep,drop"], "tau and bias have several values"),
        ("tau_norm", ["tau=1,1.0"], "a value stands twice"),
    ):
        with pytest.raises(ConfigError, match=message):
            build_stage2(name, words)


# The network ----------------------------------------------------------------------------------------------------------

PLACES = {
    "upernet": "decode_head.conv_seg",
    "pspnet": "decode_head.conv_seg",
    "ocrnet": "decode_head.1.conv_seg",
    "segformer": "decode_head.conv_seg",
    "daformer": "decode_head.conv_seg",
    "upernet_vit": "decode_head.conv_seg",
    "deeplabv3plus": "classifier.1",
    "usrn": "classifier.1",
    "deeplabv3plus_unimatch": "predictor",
    "dpt": "decode_head.conv_seg",
    "deeplabv2": "layer5.head.1",
    "deeplabv3plus_d2": "predictor",
}
OTHERS = {
    "deeplabv2": ModelConfig("deeplabv2", 5, "", options={"blocks": (1, 1, 1, 1), "width": 8}, align_corners=True),
    "deeplabv3plus_d2": ModelConfig("deeplabv3plus_d2", 5, "resnet18"),
    "mask2former": ModelConfig("mask2former", 5, "resnet18"),
}
NETWORKS = SMALL | OTHERS
NETWORKS["hrda"] = replace(SMALL["hrda"], options={"channels": 16, "crop": (256, 256)})


@pytest.mark.parametrize("name", PLACES)
def test_the_classifier_is_found(name):
    assert find_classifier(NETWORKS[name], "x") == PLACES[name]


@pytest.mark.parametrize("name", ["knet", "mask2former", "hrda", "deeplabv2_reduced"])
def test_networks_without_one_are_refused(name):
    with pytest.raises(ConfigError, match=f"^x: model.name: '{name}': its logits are not those of one 1×1 classifier"):
        find_classifier(NETWORKS[name], "x")


MODES = pytest.mark.parametrize(
    "options",
    [
        {},
        {"mode": "slide", "crop": (8, 8), "stride": (4, 4)},
        {"scales": (1.0, 2.0), "flip": True},
        {"calibration": True},
    ],
    ids=["whole", "slide", "augmented", "calibration"],
)


def same(found, expected):
    """Evaluations that differ in their times alone."""
    times = dict.fromkeys(("seconds", "ms_per_image"))
    assert [{**item, **times} for item in found] == [{**item, **times} for item in expected]


@MODES
def test_one_pass_scores_what_each_alone_scores(options, tmp_path):
    network, scene = Small(), Scene()
    trained = network.head[1]
    strengths = build_stage2("logit_adjustment", ["tau=0,0.1,0.3"])
    classifiers = [made(trained, given()) for made in strengths.values()]
    cfg = EvalConfig(workers=0, batch_size=2, per_image=True, panels=1, **options)

    alone = []
    for classifier in classifiers:
        network.head[1] = classifier
        alone.append(evaluate(network, scene, cfg, device="cpu"))

    passes = []
    network.head[0].register_forward_hook(lambda *_: passes.append(1))
    evaluate(network, scene, cfg, device="cpu")
    once = len(passes)

    folders = [tmp_path / name for name in strengths]
    views = [View(folder, cfg) for folder in folders]
    found = evaluate_variants(Variants(network, "head.1", classifiers), scene, views, device="cpu")
    same(found, alone)
    assert len({json.dumps(item["confusion"]) for item in found}) == 3
    assert len(passes) == 2 * once

    for item, folder in zip(found, folders, strict=True):
        assert read_per_image(folder / "per_image.npz").matrices.sum(0).tolist() == item["confusion"]
        assert len(list((folder / "panels").iterdir())) == 3


@MODES
def test_one_pass_scores_what_each_offset_alone_scores(options, tmp_path):
    network, scene = Small(), Scene()
    plain = EvalConfig(workers=0, batch_size=2, per_image=True, **options)
    views = []
    for tau in (0.0, 0.1, 0.3):
        offsets = post_hoc_offsets(PIXELS, tau) if tau else None
        views.append(View(tmp_path / f"{tau}", replace(plain, logit_adjustment=tau), offsets))
    alone = [evaluate(network, scene, view.cfg, device="cpu", offsets=view.offsets) for view in views]

    passes = []
    network.head[0].register_forward_hook(lambda *_: passes.append(1))
    evaluate(network, scene, plain, device="cpu")
    once = len(passes)

    found = evaluate_variants(Repeats(network, 3), scene, views, device="cpu")
    same(found, alone)
    assert [item["logit_adjustment"] for item in found] == [0, 0.1, 0.3]
    assert len({json.dumps(item["confusion"]) for item in found}) == 3
    assert len(passes) == 2 * once
    for item, view in zip(found, views, strict=True):
        assert read_per_image(view.folder / "per_image.npz").matrices.sum(0).tolist() == item["confusion"]


# The program ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def run(config) -> Path:
    """A finished run that was never trained."""
    return untrained(config)


def untrained(config, *words) -> Path:
    words = ["train.steps=1", "eval.workers=0", "eval.per_image=true", "name=run", "seed=3", *words]
    cfg = load_config(config, words)
    cfg.folder.mkdir()
    method = build_method(cfg, context(list(range(1, 20))))
    Trainer(cfg, method, torch.device("cpu")).save(1)
    return cfg.folder


def call(monkeypatch, *words):
    monkeypatch.setattr("sys.argv", ["rebalance.py", *map(str, words)])
    rebalance.main()


def test_a_result_is_a_run(run, monkeypatch, tmp_path):
    out = tmp_path / "run_tau_norm"
    call(monkeypatch, run, "tau_norm", "tau=0.5", "--device", "cpu", "eval.batch_size=2")
    trained = load_file(run / "checkpoints/last/model.safetensors")
    left = load_file(out / "checkpoints/last/model.safetensors")
    assert {f"model.{name}" for name in left} == set(trained)
    changed = [name for name, value in left.items() if not torch.equal(value, trained[f"model.{name}"])]
    assert changed == ["decode_head.conv_seg.weight"]

    folder = RunFolder.load(out)
    assert folder.missing == () and folder.record["kind"] == "rebalance" and folder.record["minutes"] is not None
    assert folder.tree["name"] == "run_tau_norm" and folder.tree["seed"] == 3 == folder.record["seed"]
    made = folder.evaluation["rebalance"]
    assert made["name"] == "tau_norm" and made["options"] == {"tau": 0.5, "bias": "keep"}
    assert folder.last("miou") == folder.evaluation["miou"] and folder.evaluation["step"] == 1
    assert sum(folder.statistics["class_pixels"]) > 0

    again = tmp_path / "again.json"
    monkeypatch.setattr("sys.argv", ["test.py", str(out / "config.yaml"), str(out), "--json", str(again)])
    fully_sup_test.main()
    tested = json.loads(again.read_text())
    assert tested["confusion"] == folder.evaluation["confusion"] and tested["identity"] == folder.evaluation["identity"]
    assert read_per_image(out / "per_image.npz").matrices.sum(0).tolist() == tested["confusion"]


def test_a_second_change_is_said(run, monkeypatch, tmp_path):
    """The weights alone do not show the first one. Where the classifier is trained anew there is nothing to add to."""
    first, second = tmp_path / "first", tmp_path / "second"
    call(monkeypatch, run, "logit_adjustment", "tau=0.5", "--output", first, "--device", "cpu")
    with pytest.warns(UserWarning, match="logit_adjustment changed it after training: logit_adjustment adds to that"):
        call(monkeypatch, first, "logit_adjustment", "tau=0.5", "--output", second, "--device", "cpu")
    with pytest.warns(UserWarning, match="logit_adjustment, logit_adjustment changed it after training: tau_norm adds"):
        call(monkeypatch, second, "tau_norm", "--output", tmp_path / "third", "--device", "cpu")
    anew = tmp_path / "anew"
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*changed it after training")
        call(monkeypatch, first, "crt", "steps=1", "cache_mib=1", "--output", anew, "--device", "cpu")
    with pytest.warns(UserWarning, match=r": crt, eval.logit_adjustment: 0.5 changed it after training: tau_norm adds"):
        words = ("--output", tmp_path / "last", "--device", "cpu", "eval.logit_adjustment=0.5")
        call(monkeypatch, anew, "tau_norm", *words)


def test_a_curve_is_a_folder_of_results(run, monkeypatch, tmp_path, capsys):
    out = tmp_path / "curve"
    call(monkeypatch, run, "logit_adjustment", "tau=0,2", "--output", out, "--device", "cpu")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["mIoU", "mIoU(tail)", "mAcc", "aAcc"]
    assert [line.split()[0] for line in lines[1:]] == ["tau_0", "tau_2"]
    assert not list(out.glob("*/checkpoints"))

    config = run / "checkpoints/last/model.safetensors"
    cfg = replace(rebalance.config_of_run(config, []), eval=EvalConfig(workers=0, logit_adjustment=2.0))
    experiment = rebalance.Experiment(cfg, counted="labeled", train=False)
    network = rebalance.load_network(cfg, config, torch.device("cpu"))
    expected = experiment.score(network, torch.device("cpu"))
    found = RunFolder.load(out / "tau_2").evaluation
    assert found["confusion"] == expected["confusion"]
    assert found["logit_adjustment"] == 0  # it is in the network
    assert found["confusion"] != RunFolder.load(out / "tau_0").evaluation["confusion"]


KNET = ("model.name=knet", "model.options={channels: 16, auxiliary: false}")


def test_a_network_without_one_classifier_is_adjusted_in_its_scores(config, monkeypatch, tmp_path):
    run, out = untrained(config, *KNET), tmp_path / "adjusted"
    call(monkeypatch, run, "logit_adjustment", "tau=0,0.5", "--output", out, "--device", "cpu")
    call(monkeypatch, run, "logit_adjustment", "tau=0.5", "--output", tmp_path / "one", "--device", "cpu")

    file = run / "checkpoints/last/model.safetensors"
    cfg = replace(rebalance.config_of_run(file, []), eval=EvalConfig(workers=0, logit_adjustment=0.5))
    experiment = rebalance.Experiment(cfg, counted="labeled", train=False)
    network = rebalance.load_network(cfg, file, torch.device("cpu"))
    expected = experiment.score(network, torch.device("cpu"))

    found = [RunFolder.load(folder).evaluation for folder in (out / "tau_0.5", tmp_path / "one")]
    assert all(each["confusion"] == expected["confusion"] for each in found)
    assert all(each["logit_adjustment"] == 0.5 for each in found)
    assert RunFolder.load(out / "tau_0").evaluation["confusion"] != expected["confusion"]

    again = tmp_path / "again.json"
    one = tmp_path / "one"
    monkeypatch.setattr("sys.argv", ["test.py", str(one / "config.yaml"), str(one), "--json", str(again)])
    fully_sup_test.main()
    assert json.loads(again.read_text())["confusion"] == expected["confusion"]


def test_mistakes_are_one_line(run, fails, tmp_path):
    main = rebalance.main
    assert "no such checkpoint; give a run's folder" in fails(main, tmp_path / "none", "tau_norm")
    foreign = tmp_path / "foreign.safetensors"
    save_file({"x": torch.zeros(1)}, foreign)
    assert "foreign.safetensors: holds no config" in fails(main, foreign, "tau_norm")
    assert "remedy: unknown 'bbn'" in fails(main, run, "bbn")
    assert "unknown key 'rho'" in fails(main, run, "tau_norm", "rho=1")
    assert "unknown key 'evil'" in fails(main, run, "tau_norm", "evil.every=1")
    refused = fails(main, run, "tau_norm", *KNET)
    assert "tau_norm: run: model.name: 'knet': its logits are not those of one 1×1 classifier" in refused
    assert "training stopped at step 1 of 5" in fails(main, run, "tau_norm", "train.steps=5")
    assert "holds the checkpoint that is read" in fails(main, run, "tau_norm", "--output", run, "--force")
    assert not (tmp_path / "run_tau_norm").exists()


def test_an_earlier_result_is_replaced_by_force_alone(run, fails, monkeypatch, tmp_path):
    out = tmp_path / "out"
    call(monkeypatch, run, "tau_norm", "tau=1", "--output", out, "--device", "cpu")
    weights = load_file(out / "checkpoints/last/model.safetensors")
    again = (run, "tau_norm", "tau=2", "--output", out, "--device", "cpu")
    assert "config.yaml: there already, and 2 more" in fails(rebalance.main, *again)

    call(monkeypatch, *again, "--force")
    other = load_file(out / "checkpoints/last/model.safetensors")
    assert not torch.equal(weights["decode_head.conv_seg.weight"], other["decode_head.conv_seg.weight"])
