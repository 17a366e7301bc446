"""One grammar for every program: where a config, a checkpoint and the common options stand, and what they mean."""

import argparse
import json
import runpy
import sys
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from common import cli
from common.config import ConfigError, load_config, to_tree
from common.models.carried import best_of, open_config
from semi_sup import main as semi

ROOT = Path(__file__).resolve().parents[2]
CONFIG = "fully_sup/configs/small/upernet_r18_camvid.yaml"
TRAIN = ["fully_sup/train.py", "uda/train.py", "semi_sup/main.py", "ltss_benchmark/train_net.py"]
EVALUATE = ["fully_sup/test.py", "uda/test.py", "semi_sup/main.py", "ltss_benchmark/train_net.py"]
STEPS = [
    "uda/calc_prototype.py", "uda/generate_pseudo_label.py", "uda/generate_class_distribution.py",
    "semi_sup/clustering.py",
]  # fmt: skip
MODEL = ["scripts/predict.py", "scripts/export.py", "scripts/convert_checkpoint.py"]
DATA = [
    "scripts/browse.py", "scripts/remedies.py", "scripts/prepare_splits.py", "scripts/class_stats.py",
    "scripts/make_longtail.py", "scripts/doctor.py",
]  # fmt: skip
ALL = sorted({*TRAIN, *EVALUATE, *STEPS, *MODEL, *DATA})


class Caught(Exception):
    """A program is about to read its arguments."""


@cache
def parser_of(program: str) -> argparse.ArgumentParser:
    """The parser that a program makes."""
    found = []

    def catch(self, *_, **__):
        found.append(self)
        raise Caught

    before = list(sys.path), list(sys.argv)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", catch)
        patch.setattr(argparse.ArgumentParser, "parse_intermixed_args", catch)
        sys.path.insert(0, str((ROOT / program).parent))
        sys.argv = [program]
        try:
            runpy.run_path(str(ROOT / program), run_name="a_test")["main"]()
        except Caught:
            pass
        finally:
            sys.path[:], sys.argv = before
    return found[0]


def option(program: str, flag: str) -> argparse.Action | None:
    return parser_of(program)._option_string_actions.get(flag)


@pytest.mark.parametrize("program", ALL)
def test_a_config_stands_alone_or_behind_its_option(program):
    assert option(program, "--config") is option(program, "--config-file") is option(program, "-c") is not None
    assert not option(program, "--config").required
    free = [action for action in parser_of(program)._actions if not action.option_strings]
    assert all(action.nargs in ("*", "?") for action in free), "a word that has to stand alone"


@pytest.mark.parametrize("program", ALL)
def test_common_options_have_one_form(program):
    """Whoever has one has it so: takes a value or not."""
    for flag, takes_value in (
        ("--checkpoint", True), ("--output", True), ("--device", True), ("--tta", False), ("--quiet", False),
        ("--force", False),
    ):  # fmt: skip
        action = option(program, flag)
        assert action is None or (action.nargs is None) == takes_value, flag


@pytest.mark.parametrize("flag, programs", [
    ("--resume", TRAIN), ("--checkpoint", [*EVALUATE, *MODEL]), ("--tta", EVALUATE), ("--save-predictions", EVALUATE),
    ("--output", [*TRAIN, *EVALUATE, *STEPS, *MODEL]), ("--device", [*TRAIN, *EVALUATE, *STEPS, "scripts/predict.py"]),
    ("--quiet", [*TRAIN, *EVALUATE, *STEPS, *MODEL]),
])  # fmt: skip
def test_who_has_an_option(flag, programs):
    assert [program for program in programs if option(program, flag) is None] == []


@pytest.mark.parametrize("program, aliases", [
    ("uda/test.py", {"--checkpoint": ["--resume_path", "--resume"]}), ("scripts/predict.py", {"--output": ["--out"]}),
    ("scripts/export.py", {"--output": ["--out"]}), ("semi_sup/main.py", {"--resume": ["-r"], "--config": ["-c"]}),
])  # fmt: skip
def test_the_releases_spellings_stay(program, aliases):
    for flag, others in aliases.items():
        assert all(option(program, other) is option(program, flag) for other in others)


# What the words mean --------------------------------------------------------------------------------------------------


def read(*words):
    parser = argparse.ArgumentParser()
    cli.add_config(parser)
    cli.add_checkpoint(parser)
    args = cli.parse(parser, words)
    return args.config, args.checkpoint, args.overrides


def test_words_are_told_apart():
    expected = ("a.yaml", "runs/x", ["seed=1", "output=o"])
    assert read("a.yaml", "runs/x", "seed=1", "--output", "o") == expected
    assert read("seed=1", "runs/x", "--config", "a.yaml", "--output", "o") == expected
    assert read("--checkpoint", "runs/x", "seed=1", "a.yaml", "--output", "o") == expected
    assert read("--config-file", "a.yaml") == ("a.yaml", None, [])
    assert read("runs/x") == (None, "runs/x", [])


@pytest.mark.parametrize("words, message", [
    ((), "required: CONFIG"), (("seed=1",), "required: CONFIG"), (("a.yaml", "b", "c"), "unrecognized arguments: c"),
])  # fmt: skip
def test_words_too_few_or_too_many(capsys, words, message):
    with pytest.raises(SystemExit) as end:
        read(*words)
    assert end.value.code == 2 and message in capsys.readouterr().err


def test_a_folder_of_configs_is_one_and_a_run_is_none(tmp_path):
    (tmp_path / "task").mkdir()
    (tmp_path / "task/stage1.yaml").touch()
    (tmp_path / "run").mkdir()
    (tmp_path / "run/config.yaml").touch()
    assert cli.is_config(str(tmp_path / "task")) and not cli.is_config(str(tmp_path / "run"))


@pytest.mark.parametrize("words, checkpoint, resume", [
    (["--config", "c.json", "--resume", "x.pth", "--test"], "x.pth", True),
    (["--test", "c.json", "--checkpoint", "x.pth"], "x.pth", False),
    (["--resume", "c.json"], None, True),  # a config is no checkpoint
    (["-c", "c.json", "--resume", "seed=3"], None, True),
    (["c.json", "--test", "True", "-r", "x.pth"], "x.pth", True),
])  # fmt: skip
def test_usrns_words(words, checkpoint, resume):
    args = semi.parse(words)
    assert (args.config, args.checkpoint, args.resume) == ("c.json", checkpoint, resume)


def test_predictions_belong_to_a_test(monkeypatch):
    """As in LTSS, where the parser says so: nothing else predicts images."""
    words = ["main.py", "--config", str(ROOT / "semi_sup/configs/toy_1over8_usrn.json"), "--save-predictions", "x"]
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(ValueError, match="--save-predictions belongs to --test"):
        semi.main()


# The config inside a checkpoint ---------------------------------------------------------------------------------------


def test_a_checkpoint_brings_its_config(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cfg = load_config(ROOT / CONFIG, ["seed=4"])
    file = tmp_path / "a.safetensors"
    save_file({"x": torch.zeros(1)}, file, {"config": json.dumps(to_tree(cfg))})
    assert open_config(None, file) == cfg
    assert open_config(None, file, ["seed=5"]).seed == 5
    assert open_config(ROOT / CONFIG, file).seed == 0

    save_file({"x": torch.zeros(1)}, file)
    with pytest.raises(ConfigError, match=r"a.safetensors: .* has no config inside; give --config FILE"):
        open_config(None, file)
    with pytest.raises(ConfigError, match="none: no such checkpoint"):
        open_config(None, "none")
    with pytest.raises(ConfigError, match="neither a config nor a checkpoint is named"):
        open_config(None, None)
    with pytest.raises(ConfigError, match="checkpoints/best: no checkpoint there; train upernet_r18_camvid first"):
        best_of(cfg)
