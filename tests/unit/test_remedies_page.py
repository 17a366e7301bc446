"""scripts/remedies.py: what each remedy would do on a small data set, against counts made by hand."""

import json
import re
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from common.config import Config, ConfigError, EvalConfig, ModelConfig
from common.engine.method import method_class
from common.evaluation.samples import network_input
from common.inference import predict_scores
from common.losses.build import LOSSES
from common.losses.counts import Counts
from scripts import remedies
from scripts.systems import system_of
from tests.contexts import context
from tests.unit.data_files import folder_options, make_folder, save

ROOT = Path(__file__).parents[2]


@pytest.fixture
def config(tmp_path):
    """Four images of 40×64: half of class 0, half of class 1, in two of them a pole of class 2, two pixels wide."""
    make_folder(tmp_path, images=4, size=(40, 64))
    for k in range(4):
        label = np.zeros((40, 64), np.uint8)
        label[20:] = 1
        if k < 2:
            label[:, 10:12] = 2
        save(label, tmp_path / "labels" / "train" / f"im{k}.png")
    stream = {"split": "train", "augment": {"recipe": "mmseg", "crop": [32, 32]}}
    tree = {
        "model": {"name": "upernet", "num_classes": 4, "backbone": "resnet18", "options": {"channels": 8}},
        "data": {
            "dataset": "folder",
            "root": str(tmp_path),
            "folder": folder_options(4),
            "streams": {"labeled": stream},
        },
    }
    path = tmp_path / "small.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def run(monkeypatch, capsys, *words):
    monkeypatch.setattr(sys, "argv", ["remedies.py", *map(str, words), "--workers", "0"])
    assert not remedies.main()
    return capsys.readouterr().out


def test_the_figures_are_those_of_the_labels(config, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out" / "remedies.json"
    printed = run(monkeypatch, capsys, config, "--json", out)
    result = json.loads(out.read_text())
    assert result["stride"] == 4 and result["images"] == 4

    first, _, pole, absent = result["classes"]
    assert (pole["images"], pole["share"], pole["width"], pole["cells"]) == (2, 160 / 10240, 0.5, 80 / 16)
    assert first["width"] == 52 / 4  # of 40 rows each 10, 52 and 64 px
    assert (absent["images"], absent["cells"], absent["width"], absent["rare_class"]) == (0, None, None, 0)
    weights = np.array([item["losses"]["inverse"] for item in result["classes"][:3]])
    shares = np.array([item["share"] for item in result["classes"][:3]])
    np.testing.assert_allclose(weights, 1 / (3 * shares), rtol=1e-5)  # Σ π w = 1
    assert [item["enough"] for item in result["classes"]] == [4, 4, 2, 0]

    every = {name for name, row in LOSSES.items()}
    assert every == {*result["losses"], *result["anywhere"]}
    assert all(name in printed for name in every)
    assert sorted(result["refused"]) == ["gcl", "ldam"]
    assert "needs a cosine classifier" in next(line for line in printed.splitlines() if "logits ldam" in line)
    lines = {line.split("  ")[0]: line for line in printed.splitlines()}
    assert "changes nothing" in lines["sampler repeat_factor, image 0.001"]
    assert "class2, from 2 of 4 images" in lines["sampler rare_class"]
    assert "changes nothing" in lines["counts of: sampled"]


@pytest.mark.parametrize(
    ("words", "factors", "said"),
    [
        ((), (1, 1), "images at their own size"),
        (("eval.scales=[0.5]",), (0.5, 0.5), "images at 0.5 times their size"),
        (("eval.scales=[0.5, 1.75]",), (1.75, 1.75), "images at 1.75 times their size (the largest of eval.scales)"),
        (("eval.short_edge=20",), (0.5, 0.5), "images at a shorter side of 20 pixels"),
        (
            ("eval.short_edge=80", "eval.max_edge=96"),  # 64 → 96
            (1.5, 1.5),
            "images at a shorter side of 80 pixels, less where the longer one has a limit",
        ),
        (
            ("eval.short_edge=20", "eval.scales=[1.0, 3.0]", "eval.scaled_max_edge=80"),
            (1.25, 1.25),
            "a shorter side of 60 pixels, less where the longer one has a limit (the largest of eval.scales)",
        ),
        (("eval.short_edge=25",), (0.625, 0.625), "images at a shorter side of 25 pixels"),
        (("eval.short_edge=21",), (21 / 40, 34 / 64), "images at a shorter side of 21 pixels"),  # 33.6 is rounded
    ],
)
def test_sizes_are_those_of_the_evaluation(words, factors, said, config, tmp_path, monkeypatch, capsys):
    """The pole is 2 pixels wide and has 80 pixels of an image, at stride 4."""
    out = tmp_path / "remedies.json"
    printed = run(monkeypatch, capsys, config, *words, "--json", out)
    first, _, pole, _ = json.loads(out.read_text())["classes"]
    assert (pole["width"], pole["cells"]) == pytest.approx((2 / 4 * factors[1], 80 / 16 * factors[0] * factors[1]))
    assert first["width"] == pytest.approx(52 / 4 * factors[1])
    assert said in " ".join(printed.split()) and f"{pole['width']:.2f}" in printed


def test_images_of_unlike_sizes_have_factors_of_their_own(config, tmp_path, monkeypatch, capsys):
    """The two with a pole are 40×64, and halved; beside them a third of 80×128 has one of 6 pixels: a quarter."""
    label = np.zeros((80, 128), np.uint8)
    label[:, 20:26] = 2
    for folder in ("images", "labels"):
        (tmp_path / folder / "train" / "im3.png").unlink()
    save(label, tmp_path / "labels" / "train" / "im3.png")
    save(np.zeros((80, 128, 3), np.uint8), tmp_path / "images" / "train" / "im3.png")
    out = tmp_path / "remedies.json"
    run(monkeypatch, capsys, config, "eval.short_edge=20", "--json", out)
    pole = json.loads(out.read_text())["classes"][2]
    # runs of 40 rows of 2 · ½ twice, and 80 of 6 · ¼; areas of 80 · ¼ twice, and 480 / 16
    assert pole["width"] == pytest.approx((1 + 1.5) / 2 / 4) and pole["cells"] == pytest.approx(20 / 16)


OPTIONS = [
    {"short_edge": 30},
    {"short_edge": 30, "max_edge": 40},
    {"short_edge": 30, "max_edge": 40, "scaled_max_edge": 30, "flip": True},
    {"short_edge": 30, "scales": (0.5, 1.75), "max_edge": 40},
    {"short_edge": 30, "scales": (0.5, 1.75), "scaled_max_edge": 50},
    {"short_edge": 33, "scales": (0.75,)},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("size", [(40, 64), (64, 40), (37, 53)])
def test_the_input_is_as_large_as_the_evaluation_makes_it(options, size):
    cfg = EvalConfig(**options)
    met = []

    class Recorder:
        def predict(self, images, size):
            met.append(tuple(images.shape[-2:]))
            return torch.zeros(1, 2, *size)

    image = network_input(np.zeros((*size, 3), np.uint8), cfg)
    predict_scores(Recorder(), image[None], cfg, size)
    assert remedies.input_size(size, cfg) == max(met)


def test_the_samplers_options_are_the_streams(config, monkeypatch, capsys):
    printed = run(monkeypatch, capsys, config, "data.streams.labeled.sampler.min_pixels=81")
    assert "refused: no image has enough of class2" in printed


def test_a_cosine_classifier_allows_margins(config, tmp_path, monkeypatch, capsys):
    out = tmp_path / "remedies.json"
    run(monkeypatch, capsys, config, "model.options.classifier=cosine", "--json", out)
    assert json.loads(out.read_text())["refused"] == {}


def test_counts_as_the_sampler_shows_the_images(config, tmp_path, monkeypatch, capsys):
    """Images with a pole are shown twice as often: its factor is √(0.0625 / 0.015625), that of the others 1."""
    sampler = "data.streams.labeled.sampler={order: repeat_factor, level: pixel, threshold: 0.0625}"
    out = tmp_path / "remedies.json"
    printed = run(monkeypatch, capsys, config, sampler, "--json", out)
    expected = (2 * 160 / 6) / 2560  # of six showings four have 80 pixels each
    assert json.loads(out.read_text())["sampled"][2] == pytest.approx(expected, rel=1e-5)
    assert "to class2 × 1.33 by the stream's sampler" in printed


def test_queries_go_by_images_and_take_two_slots(config, tmp_path, monkeypatch, capsys):
    """The pole is in 2 of 4 images, the first two classes in all: shares .2, .4 and .4 of the showings."""
    out = tmp_path / "remedies.json"
    tree = yaml.safe_load(config.read_text())
    tree["model"] |= {"name": "mask2former", "options": {"hidden_dim": 32, "num_queries": 8}}
    config.write_text(yaml.safe_dump(tree | {"method": {"name": "mask2former"}}))
    printed = run(monkeypatch, capsys, config, "--json", out)
    result = json.loads(out.read_text())
    assert result["by"] == "images" and "go by the images of each class" in printed
    offsets = [item["losses"]["logit_adjustment"] for item in result["classes"][:3]]
    np.testing.assert_allclose(offsets, np.log([0.4, 0.4, 0.2]), rtol=1e-5)

    lines = {line.split("  ")[0]: line for line in printed.splitlines()}
    assert "differ by up to 0.693" in lines["logits logit_adjustment"]
    for name in ("focus focal", "sets lovasz"):
        assert "refused: it classifies queries" in lines[name]

    sampler = "data.streams.labeled.sampler={order: repeat_factor, level: pixel, threshold: 0.0625}"
    printed = run(monkeypatch, capsys, config, sampler, "method.criterion={class_loss: seesaw}")
    lines = {line.split("  ")[0]: line for line in printed.splitlines()}
    assert "refused: method.criterion.class_loss seesaw adjusts" in lines["logits logit_adjustment"]
    assert "refused: it classifies queries" in lines["sets lovasz"]  # which no other class_loss changes
    # the two images with a pole are shown twice as often: 4 of 6 showings have it, of 16 classes shown in all
    assert "class2 × 1.25 by the stream's sampler" in lines["counts of: sampled"]


def test_region_needs_a_classifier_of_features(config, tmp_path, monkeypatch, capsys):
    out = tmp_path / "remedies.json"
    run(monkeypatch, capsys, config, "model.name=knet", "--json", out)
    assert "region" in json.loads(out.read_text())["refused"]


SMALL = {"channels": 8, "lateral_channels": 4, "dilations": (1, 2, 3), "channel_dropout": 0.0}
WITH_AUX = {"heads": {"decode": {}, "aux": {}}}
METHODS = {
    "supervised": ("upernet", {"channels": 8, "auxiliary": False}, {}),
    "supervised, of two heads": ("upernet", {"channels": 8, "auxiliary": True}, WITH_AUX),
    "baseline": ("deeplabv3plus", {"blocks": (1, 1, 1, 1), "width": 8}, {}),
    "baseline, of UniMatch's network": ("deeplabv3plus_unimatch", SMALL, {}),
    "unimatch": ("deeplabv3plus_unimatch", SMALL, {}),
    "u2pl": ("deeplabv3plus_u2pl", {**SMALL, "backbone": {"multi_grid": (2, 2)}}, {}),
}


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.filterwarnings("ignore")  # that equal counts change nothing
def test_what_is_refused_is_what_the_method_refuses(name):
    """Of every remedy, by the page and by the method that is built with it."""
    network, sizes, options = METHODS[name]
    backbone = "resnet50" if network == "deeplabv3plus" else "resnet18"
    model = ModelConfig(network, 5, backbone, options=sizes, align_corners=True)
    heads = {"heads": ["decode", "aux"]} if options else {}
    cfg = Config(model, method={"name": name.split(",")[0], **options}, remedies=heads, name="test")
    system = system_of(cfg)
    taken = method_class(system.methods, cfg).takes(cfg)
    facts = remedies.facts_of(cfg, remedies.unweighted(cfg), taken)

    said, met = set(), set()
    for remedy, row in LOSSES.items():
        if remedies.refusal(remedy, Counts.from_pixels([100] * 5), taken, facts):
            said.add(remedy)
        section = {row.slot: [{"name": remedy}] if row.slot == "sets" else {"name": remedy}}
        try:
            system.build_method(replace(cfg, remedies={**section, **heads}), context(5))
        except ConfigError:
            met.add(remedy)

    assert said == met and {"gcl", "ldam"} <= met
    assert ("hard_pixels" in met) is (name == "baseline") and ("region" in met) is (name in ("u2pl", list(METHODS)[1]))


def test_a_method_that_does_not_fit_is_said_before_labels_are_counted(config, fails, tmp_path):
    words = ("method.name=mask2former", "method.criterion.class_loss=bce", "--cache", tmp_path / "cache")
    assert "method.criterion.class_loss" in fails(remedies.main, config, *words)
    assert not (tmp_path / "cache").exists()


def test_costs_in_the_table_are_those_that_were_measured():
    """Every remedy of the loss has a line in docs/remedies.md; its cost is what the benchmark has left."""
    rows = json.loads((ROOT / "docs/results/remedies_cost.json").read_text())["rows"]

    def cost(name: str) -> str:
        return ", ".join(f"{row['faster'][name]:.1f}" for row in rows)

    named = []
    for line in (ROOT / "docs/remedies.md").read_text().splitlines():
        if not re.match(r"\| (logits|class_weight|focus|sets) `", line):
            continue
        cells = [cell.strip() for cell in line.split("|")]
        names = [name for name in re.findall(r"`(\w+)`", cells[1]) if name in LOSSES]
        named += names
        on_the_grid = f"{names[0]}, at: network"
        more = f" (`at: network`: {cost(on_the_grid)})" if on_the_grid in rows[0]["faster"] else ""
        assert cells[4] == cost(names[0]) + more, names

    assert sorted(named) == sorted(LOSSES)
