"""Streams and methods that do not fit: one line before a file is read; and what recipes say that they give."""

import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import save_file

from common.config import ConfigError, load_config
from common.data import build_transform
from common.data.recipes.build import RECIPES
from common.models import build_model
from semi_sup import main
from semi_sup.config import METHODS, resolve
from semi_sup.streams import check_streams
from tests.unit.data_files import classes, opened, picture

CONFIGS = Path(__file__).parents[2] / "semi_sup" / "configs"
V1, V2 = "unimatch/toy_1over8_unimatch", "unimatch_v2/toy_1over8_unimatch_v2"
U2PL, USRN = "u2pl_base/toy_1over8_u2pl.yaml", "toy_1over8_selftrain.json"
LABELED, UNLABELED = "data.streams.labeled.augment", "data.streams.unlabeled.augment"
pytestmark = pytest.mark.usefixtures("unchanged")


def named(config: str) -> Path:
    return CONFIGS / (config if "." in config else f"{config}.yaml")


REFUSED = [
    (
        V1,
        ["views=1"],
        "views: 1 gives no box2, partner_strong2, strong2, .*'unimatch' reads; set it to 2, or method.vie",
    ),
    (V1, ["views=1", "partner=false"], "views: 1 gives no .*; set it to 2, or method.views=1$"),
    (V1, ["views=0", "partner=false"], "views: 0 gives no .*weak, which .*; set it to 2$"),
    (V1, ["partner=false"], "partner: false gives no partner_shown, .*; set it to true, or method.partner=batch$"),
    (V2, ["views=0"], "views: 0 gives no box1, box2, shown, strong1, strong2, weak, .*; set it to 2$"),
    (
        V2,
        ["views=1"],
        "views: 1 gives no box2, strong2, .*; set it to 2, or method.views=1 method.complementary=false$",
    ),
    (
        U2PL,
        ["recipe=unimatch", "views=1"],
        "recipe: unimatch gives no image, which method 'u2pl' reads; set it to u2pl$",
    ),
    (U2PL, ["recipe=mmseg"], "recipe: mmseg gives no shown, which .*; set it to u2pl$"),
    (USRN, ["views=false"], "views: false gives no strong, weak, which method 'self_training' reads; set it to true$"),
]


@pytest.mark.parametrize("config, changes, message", REFUSED)
def test_unlabelled_crops_that_leave_out_what_is_read(config, changes, message, tmp_path, fails):
    words = [f"{UNLABELED}.{change}" for change in changes]
    line = fails(main.main, "--config", named(config), *words, f"output={tmp_path}", "data.root=/nowhere")
    assert UNLABELED in line and not list(tmp_path.iterdir())
    with pytest.raises(ConfigError, match=f"{UNLABELED}.{message}"):
        resolve(load_config(named(config), words))


LABELLED = [
    (V1, "views=2", ()),
    (V1, "views=2", ("method.name=baseline",)),
    (V2, "views=1", ()),
    ("toy_1over8_baseline.json", "views=true", ()),
    (USRN, "views=true", ()),
]


@pytest.mark.parametrize("config, change, words", LABELLED)
def test_labelled_crops_are_no_views(config, change, words, fails):
    """Of any recipe, for any method."""
    line = fails(main.main, "--config", named(config), f"{LABELED}.{change}", *words, "data.root=/nowhere")
    fix = "0" if change != "views=true" else "false"
    assert f"{LABELED}.{change.replace('=', ': ')} gives no image, which method " in line
    assert line.endswith(f"reads; set it to {fix}")


@pytest.mark.parametrize("config", [V1, V2, U2PL, USRN, "toy_1over8_baseline.json"])
def test_labelled_crops_need_their_labels(config, fails):
    line = fails(main.main, "--config", named(config), "data.streams.labeled.labels=false", "data.root=/nowhere")
    assert "data.streams.labeled.labels: false, but method " in line and line.endswith("learns them; set it to true")


@pytest.mark.parametrize("stream", ["labeled", "unlabeled"])
def test_a_stream_that_is_missing(stream):
    cfg = load_config(named(V2))
    streams = {key: value for key, value in cfg.data.streams.items() if key != stream}
    with pytest.raises(ConfigError, match=f"toy_1over8_unimatch_v2: data.streams has no '{stream}'$"):
        resolve(replace(cfg, data=replace(cfg.data, streams=streams)))


UNREAD = [
    (V1, ["method.views=1", "method.perturb=false"], "makes box2, partner_strong2, strong2, .*; set views: 1$"),
    (V2, ["method.views=1", "method.complementary=false"], "makes box2, strong2, .* does not read; set views: 1$"),
    (V1, ["method.partner=batch"], "makes partner_shown, partner_strong1, .*partner_weak, .*; set partner: false$"),
    (V2, [f"{UNLABELED}.partner=true"], "makes partner_shown, .*; set partner: false$"),
    (V1, ["method.partner=batch", "method.views=1"], "makes .*box2, .*; set views: 1, partner: false$"),
]  # fmt: skip


@pytest.mark.parametrize("config, words, message", UNREAD)
def test_views_that_nobody_reads_are_said(config, words, message):
    cfg = load_config(named(config), words)
    with pytest.warns(UserWarning, match=f"{UNLABELED}: {message}") as said:
        check_streams(cfg, METHODS[cfg.method["name"]])
    assert len(said) == 1


@pytest.mark.parametrize("config", [V1, V2, U2PL])
def test_labels_that_nobody_reads_are_said(config):
    """USRN's self-training measures its pseudo-labels by them."""
    words = ["data.streams.unlabeled.labels=true"]
    cfg, usrn = (load_config(named(name), words) for name in (config, USRN))
    with pytest.warns(UserWarning, match="data.streams.unlabeled.labels: true, but method .* does not read") as said:
        check_streams(cfg, METHODS[cfg.method["name"]])
    assert len(said) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_streams(usrn, METHODS[usrn.method["name"]])


SHIPPED = sorted(p for p in CONFIGS.rglob("*.*") if "_base_" not in p.parts and p.suffix in (".yaml", ".json"))


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: p.stem)
def test_shipped_streams_give_what_is_read_and_no_more(path):
    cfg = load_config(path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_streams(cfg, METHODS[cfg.method["name"]])


def test_features_of_a_network_without_subclasses(tmp_path, fails):
    cfg = load_config(named(V1))
    path = tmp_path / "network.safetensors"
    save_file(build_model(cfg.model).state_dict(), path)
    words = ("--save_feature", "--checkpoint", path, "data.root=/nowhere", f"output={tmp_path}")
    line = fails(main.main, "--config", named(V1), *words)
    assert "model.name: 'deeplabv3plus_unimatch' has no features for clustering.py" in line
    assert line.endswith("take a checkpoint of that (model.name: deeplabv3plus)")


# What recipes give

CROP = {"crop": [24, 32]}
OPTIONS = [
    {"recipe": "none"},
    *({"recipe": "mmseg", **CROP, "full": full} for full in (False, True)),
    *({"recipe": "cpsl", **CROP, "width": 60, "strong": strong, "full": strong} for strong in (False, True)),
    *({"recipe": "usrn", **CROP, "base": 48, "views": views} for views in (False, True)),
    *({"recipe": "unimatch", **CROP, "views": views} for views in (0, 1, 2)),
    *({"recipe": "unimatch", **CROP, "views": views, "partner": True} for views in (1, 2)),
    {"recipe": "u2pl", **CROP},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_recipe_gives_what_it_says(options):
    recipe = build_transform(options)
    sample = recipe(opened(picture(40, 48), classes(40, 48, 9).astype(np.int16)), np.random.default_rng(0), None, 0)
    assert sample.keys() - {"index", "name", "label", "geometry"} == recipe.gives


def test_no_recipe_is_forgotten():
    assert {options["recipe"] for options in OPTIONS} == RECIPES.keys() - {"detectron2"}  # whose sample is an image
