"""What a user can get wrong with DAFormer, HRDA and MIC: one line and exit code 2, before anything is written."""

import re
from dataclasses import replace
from pathlib import Path

import pytest

from common.config import ConfigError, load_config
from common.data import toy
from tests.contexts import context
from uda import train

CONFIGS = Path(__file__).parents[2] / "uda" / "configs"
SAMPLER = "data.streams.source.sampler"
pytestmark = pytest.mark.usefixtures("unchanged")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("mistakes")
    toy.make("gta5", root / "gta5", train=3, size=(64, 128))
    toy.make("cityscapes", root / "cityscapes", train=2, val=1, size=(64, 128))
    return root


def words(data, folder):
    streams = [f"data.streams.{name}.root={data / row}" for name, row in (("source", "gta5"), ("target", "cityscapes"))]
    return [*streams, f"data.val.root={data / 'cityscapes'}", "data.workers=0", f"output={folder}", "--device", "cpu"]


@pytest.mark.parametrize(
    "config, changes, message",
    [
        ("daformer/toy", [f"{SAMPLER}.min_pixels=5000"], "min_pixels: 5000: no image shows that much of class"),
        ("daformer/toy", [f"{SAMPLER}.min_share=0.1"], "min_pixels: 60 beside min_share: 0.1; remove one of them"),
        ("daformer/toy", ["data.streams.source.labels=false"], "rare_class needs labels, but the stream has `labels"),
        ("daformer/toy", ["data.streams.target.batch_size=4"], "batch_size is 2 of source and 4 of target; make them"),
        ("mic/toy", ["data.streams.target.augment.crop=[64,64]"], "crop is .96, 128. of source and .64, 64. of target"),
        ("hrda/toy", ["model.options.crop=[60,64]"], "crop: .*: sides must be multiples of 16"),
        ("daformer/toy", ["method.margins={top: 15, bottom: 120}"], "top 15 and bottom 120 leave nothing of a crop"),
        ("daformer/toy", ["method.margins={left: 64, right: 64}"], "left 64 and right 64 .* a crop of 128 columns"),
        ("mic/toy", ["method.masked=separate", "train.devices=2"], "half of each batch, and a process has 1 image"),
    ],
)
def test_one_line(config, changes, message, data, tmp_path, fails):
    line = fails(train.main, CONFIGS / f"{config}.yaml", *words(data, tmp_path / "runs"), *changes)
    assert re.search(message, line), line
    assert not (tmp_path / "runs" / "toy").exists()


def test_a_stream_that_is_missing():
    cfg = load_config(CONFIGS / "daformer" / "toy.yaml")
    alone = replace(cfg, data=replace(cfg.data, streams={"source": cfg.data.streams["source"]}))
    with pytest.raises(ConfigError, match="toy: data.streams: target is missing; the method trains on source and targ"):
        train.build_method(alone, context(19))
    train.build_method(replace(alone, method={**alone.method, "adapt": False}), context(19))
