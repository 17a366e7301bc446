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
    assert load_config(config, ["data.val.root=there"]).data.val.split == "val"  # another root, no training images


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
        ("optim.lr=fast", ["run.yaml: optim.lr: expected float, got 'fast'"]),
        ("train.steps=true", ["steps", "expected int"]),
        ("steps", ["section.key=value"]),
        ("train.log_every=0", ["run.yaml: train.log_every: 0 is less than 1", "give the number of train.steps"]),
        ("train.save_every=-5", ["train.save_every: -5 is less than 1"]),
        ("eval.every=0", ["eval.every: 0 is less than 1"]),
        ("train.devices=0", ["train.devices: 0 is less than 1"]),
        ("train.steps=0", ["run.yaml: train.steps: 0 is less than 1"]),
        ("train.keep=0", ["train.keep: 0 is less than 1"]),
        ("seed=-1", ["run.yaml: seed: -1 is less than 0"]),
        ("optim.lr=-1", ["optim.lr: -1.0 is less than 0"]),
        ("optim.lr=.inf", ["optim.lr: inf is not finite"]),
        ("optim.lr=.nan", ["optim.lr: nan is not finite"]),
        ("optim.clip=0", ["optim.clip: 0.0 is not above 0"]),
        ("optim.momentum=1", ["optim.momentum: 1.0 is not below 1"]),
        ("optim.groups=[{match: '('}]", ["optim.groups[0].match: '(' is no regular expression"]),
        ("optim={nesterov: true, momentum: 0}", ["optim.nesterov: true needs a momentum above 0"]),
        ("model.num_classes=32769", ["model.num_classes: 32769 is more than 32768"]),
        ("model.std=[1, 0, 1]", ["model.std[1]: 0.0 is not above 0"]),
        ("data.streams.labeled.batch_size=0", ["data.streams.labeled.batch_size: 0 is less than 1"]),
        ("data.workers=-1", ["data.workers: -1 is less than 0"]),
        ("eval.crop=[0, 0]", ["eval.crop[0]: 0 is less than 1"]),
        ("eval.best=accuracy", ["eval.best: 'accuracy' is not one of miou, miou_tail"]),
        ("eval.mode=slide", ["run.yaml: eval.mode: slide needs crop: [height, width]"]),
        ("eval={mode: slide, crop: [4, 4], stride: [5, 4]}", ["eval.stride: [5, 4] is more than crop [4, 4]"]),
        ("eval.scales=[]", ["eval.scales: () is empty"]),
        ("eval.scales=[0.0]", ["eval.scales[0]: 0.0 is less than 0.01"]),
        ("eval.max_edge=9", ["eval.max_edge: 9 has no effect without short_edge"]),
        ("train.compile=1", ["train.compile: expected bool or ", "got 1"]),
        ("optim.lr=[", ["override 'optim.lr=[': not valid YAML"]),
        ("optim={lr: 1, lr: 2}", ["override", "key 'lr' stands twice in line 1; keep one"]),
    ],
)
def test_bad_override_names_key_and_fix(config, override, words):
    with pytest.raises(ConfigError) as error:
        load_config(config, [override])
    assert all(word in str(error.value) for word in words)
    assert "\n" not in str(error.value)


def test_of_two_equal_keys_both_places_are_named(tmp_path):
    texts = {
        "a.yaml": "model: {name: a, num_classes: 2}\noptim:\n  lr: 1.0\ntrain:\n  steps: 3\noptim:\n  power: 1.0\n",
        "b.yaml": "model:\n  name: a\n  num_classes: 2\ndata:\n  folder:\n    label_map:\n      1: 1\n      '1': 2\n",
        "c.json": '{"model": {"name": "{",\n "num_classes": 2},\n "data": {"streams": {"x": [],\n "y": 1, "x": 2}}}',
        "d.yaml": "data:\n  folder: &a\n    x: 1\n  val:\n    <<: *a\n    x: 2\n    <<: *a\n",
        "e.json": '{"n\\u0061me": 1,\n"name": 2}',
    }
    places = {
        "a.yaml": "key 'optim' stands in lines 2 and 6",
        "b.yaml": "key '1' stands in lines 7 and 8",
        "c.json": "key 'x' stands in lines 3 and 4",
        "d.yaml": "key '<<' stands in lines 5 and 7",
        "e.json": "key 'name' stands in lines 1 and 2",
    }
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
        with pytest.raises(ConfigError, match=f"{name}: {places[name]}; keep one"):
            load_config(tmp_path / name)


def test_what_an_alias_names_is_not_shared(tmp_path):
    text = BASE + "method: {a: &heads {x: 1, y: [1]}, b: *heads, c: {<<: [{z: 3}, *heads], x: 4}}\n"
    (tmp_path / "run.yaml").write_text(text)
    method = load_config(tmp_path / "run.yaml", ["method.a.x=2"]).method
    assert method == {"a": {"x": 2, "y": [1]}, "b": {"x": 1, "y": [1]}, "c": {"z": 3, "x": 4, "y": [1]}}


def test_missing_file_broken_yaml_and_circular_base(tmp_path):
    with pytest.raises(ConfigError, match="cannot read"):
        load_config(tmp_path / "none.yaml")
    (tmp_path / "bad.yaml").write_text("a: [1")
    with pytest.raises(ConfigError, match="not valid YAML"):
        load_config(tmp_path / "bad.yaml")
    (tmp_path / "loop.yaml").write_text("base: loop.yaml")
    with pytest.raises(ConfigError, match="leads back"):
        load_config(tmp_path / "loop.yaml")
