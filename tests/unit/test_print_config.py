"""What a config says with its parents, line by line: the same config again, and where each value is from."""

import sys
from pathlib import Path

import pytest

from common.config import load_config
from common.config.load import save_config
from scripts import print_config

ROOT = Path(__file__).resolve().parents[2]
SHIPPED = (
    "fully_sup/configs/small/upernet_lite0_camvid.yaml",
    "semi_sup/configs/voc_1over32_usrn.json",
    "uda/configs/daformer/gta5_to_cityscapes_blv.yaml",
    "ltss_benchmark/configs/ade20k_full/mask2former/matcher-maskformer2_R50_bs16_200k.yaml",
)


@pytest.fixture
def printed(monkeypatch, capsys):
    def run(*words) -> str:
        monkeypatch.setattr(sys, "argv", ["print_config.py", *map(str, words)])
        print_config.main()
        return capsys.readouterr().out

    return run


@pytest.mark.parametrize("name", SHIPPED)
def test_what_is_printed_is_the_same_config(name, tmp_path, printed):
    again = tmp_path / "again.yaml"
    again.write_text(printed(ROOT / name, "seed=3"), encoding="utf-8")
    for path, config in (("a", load_config(ROOT / name, ["seed=3"])), ("b", load_config(again))):
        save_config(config, tmp_path / path)
    assert (tmp_path / "a").read_text() == (tmp_path / "b").read_text()


@pytest.fixture
def family(tmp_path, monkeypatch) -> Path:
    """A config on two parents, one of which has a parent itself."""
    monkeypatch.chdir(tmp_path)
    texts = {
        "top.yaml": "model: {name: upernet, num_classes: 11}\ndata: {dataset: camvid, streams: {labeled: {}}}\n",
        "first.yaml": "base: top.yaml\nmethod: {heads: {decode: {weight: 1.0}, auxiliary: {weight: 0.4}}}\n",
        "second.yaml": "base: top.yaml\noptim: {lr: 0.1}\nmodel: {num_classes: 12}\n",
        "own.yaml": "base: [first.yaml, second.yaml]\noptim: {lr: 0.2}\n",
    }
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
    return tmp_path / "own.yaml"


def test_every_value_names_the_file_that_gives_it(family, printed):
    words = ("data.streams.labeled.batch_size=2", "method={heads: {decode: {weight: 2.0}}}")
    lines = printed(family, *words, "--given").splitlines()
    named = {" ".join(line.split("#")[0].split()): line.split("# ")[1] for line in lines if "#" in line}
    assert named == {
        "name: upernet": "top.yaml", "num_classes: 12": "second.yaml", "dataset: camvid": "data",
        "batch_size: 2": "key=value", "weight: 2.0": "key=value", "weight: 0.4": "first.yaml", "lr: 0.2": "own.yaml",
    }  # fmt: skip
    assert [line for line in lines if line.strip().startswith("dataset")][0].endswith("# top.yaml")


def test_defaults_have_no_source(family, printed):
    lines = printed(family).splitlines()
    assert "  momentum: 0.9" in lines and "seed: 0" in lines


def test_a_section_that_replaces_values_is_their_source(family, printed):
    family.write_text("base: first.yaml\nmethod: null\n")
    assert print_config.origins(str(family), []).get(("method",)) == "own.yaml"
    assert not [key for key in print_config.origins(str(family), []) if key[:1] == ("method",) and len(key) > 1]
