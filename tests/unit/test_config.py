"""Configs: inheritance, overrides, round trip, and one-line errors that name the key."""

import json

import pytest

from common.config import ConfigError, load_config, save_config

BASE = """
model: {name: upernet, num_classes: 19}
optim: {lr: 1e-4, groups: [{match: norm, weight_decay: 0}]}
data: {dataset: camvid, root: here, streams: {labeled: {batch_size: 4}}}
"""


@pytest.fixture
def config(tmp_path):
    (tmp_path / "base.yaml").write_text(BASE)
    (tmp_path / "run.yaml").write_text("base: base.yaml\nseed: 3\noptim: {momentum: 0.5}\n")
    return tmp_path / "run.yaml"


def test_child_merges_over_base_and_overrides_win(config):
    cfg = load_config(config, ["train.steps=5", "eval.crop=[3,4]", "data.streams.labeled.batch_size=8"])
    assert (cfg.seed, cfg.optim.lr, cfg.optim.momentum) == (3, 1e-4, 0.5)
    assert (cfg.train.steps, cfg.eval.crop, cfg.data.streams["labeled"].batch_size) == (5, (3, 4), 8)
    assert cfg.name == "run"


def test_streams_inherit_their_source(config):
    cfg = load_config(config)
    assert cfg.data.streams["labeled"].dataset == cfg.data.val.dataset == "camvid"
    assert cfg.data.streams["labeled"].root == "here"
    assert (cfg.data.streams["labeled"].split, cfg.data.val.split) == ("train", "val")


def test_saved_config_reads_back_equal(config, tmp_path):
    cfg = load_config(config)
    save_config(cfg, tmp_path / "saved.yaml")
    assert load_config(tmp_path / "saved.yaml") == cfg


def test_json_reads_like_yaml(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps({"model": {"name": "pspnet", "num_classes": 2}}))
    assert load_config(tmp_path / "a.json").model.name == "pspnet"


@pytest.mark.parametrize(
    "override, words",
    [
        ("trian.steps=5", ["trian", "did you mean 'train'"]),
        ("train.stps=5", ["stps", "did you mean 'steps'"]),
        ("train.steps=many", ["train", "steps", "expected int", "many"]),
        ("model.norm=gn", ["norm", "'gn' is not one of bn, sync_bn"]),
        ("optim.betas=[0.9]", ["betas", "expected 2 values"]),
        ("optim.lr=fast", ["optim: lr", "expected float"]),
        ("train.steps=true", ["steps", "expected int"]),
        ("steps", ["section.key=value"]),
        ("train.log_every=0", ["run.yaml: train.log_every: 0 is less than 1", "give train.steps (1000)"]),
        ("train.save_every=-5", ["train.save_every: -5 is less than 1"]),
        ("eval.every=0", ["eval.every: 0 is less than 1"]),
        ("train.devices=0", ["train.devices: 0 is less than 1"]),
    ],
)
def test_bad_override_names_key_and_fix(config, override, words):
    with pytest.raises(ConfigError) as error:
        load_config(config, [override])
    assert all(word in str(error.value) for word in words)
    assert "\n" not in str(error.value)


def test_missing_file_broken_yaml_and_circular_base(tmp_path):
    with pytest.raises(ConfigError, match="cannot read"):
        load_config(tmp_path / "none.yaml")
    (tmp_path / "bad.yaml").write_text("a: [1")
    with pytest.raises(ConfigError, match="not valid YAML"):
        load_config(tmp_path / "bad.yaml")
    (tmp_path / "loop.yaml").write_text("base: loop.yaml")
    with pytest.raises(ConfigError, match="leads back"):
        load_config(tmp_path / "loop.yaml")
