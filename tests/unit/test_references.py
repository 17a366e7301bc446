"""`run:STEP/FILE` in a config: in the folder of that step's run, whatever `output`, `runs` and variant say."""

import json
import re
from pathlib import Path

import pytest

from common.config import ConfigError, load_config

ROOT = Path(__file__).parents[2]
STAGED = sorted(p.parent for p in (ROOT / "uda/configs").glob("*/warm_up.yaml"))  # tasks of several stages
UDA = [p for folder in STAGED for p in sorted(folder.glob("*.yaml")) if p.stem != "task"]
USRN = sorted((ROOT / "semi_sup/configs").glob("*_usrn*.json"))
SMALL = {"model": {"name": "upernet", "num_classes": 2}}


def write(folder: Path, name: str, tree: dict) -> Path:
    path = folder / name
    path.write_text(json.dumps(tree))
    return path


def files_of_earlier_steps(cfg) -> list[str]:
    maps = [path for stream in cfg.data.streams.values() for path in stream.maps.values()]
    method = [cfg.method[key] for key in ("prototypes", "class_distribution", "teacher") if key in cfg.method]
    return [*maps, *method, *([cfg.model.checkpoint] if cfg.model.checkpoint else [])]


@pytest.mark.parametrize("path", [*UDA, *USRN], ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_output_moves_every_step(path):
    here, moved = load_config(path), load_config(path, ["output=/elsewhere"])
    assert moved.folder == Path("/elsewhere") / here.name
    before, after = files_of_earlier_steps(here), files_of_earlier_steps(moved)
    assert after == [file.replace(here.output, "/elsewhere", 1) for file in before]
    assert (len(before) == 0) == (path.stem in ("warm_up", "warm_up_blv"))


def test_no_config_spells_a_folder_of_runs():
    """`output` alone does."""
    for path in (*UDA, *(ROOT / "semi_sup/configs").rglob("*.json")):
        assert not re.search(r"\b(runs|saved)/", path.read_text()), path


def test_a_variant_means_its_own_steps_where_it_has_them(tmp_path):
    reads = {**SMALL, "method": {"a": "run:first/x", "b": "run:second/y/{name}.png", "c": ["run:first", "a run: none"]}}
    for name in ("first", "first_wide", "second", "third"):
        write(tmp_path, f"{name}.json", SMALL)
    wide = load_config(write(tmp_path, "third_wide.json", reads))
    assert wide.method == {
        "a": "runs/first_wide/x", "b": "runs/second/y/{name}.png", "c": ["runs/first_wide", "a run: none"],
    }  # fmt: skip
    plain = load_config(write(tmp_path, "third.json", reads))
    assert plain.method["a"] == "runs/first/x"


def test_a_run_of_another_name_is_found(tmp_path):
    """Its own step is called so too, unless `name` says otherwise."""
    names = ["runs.first=long"]
    first = write(tmp_path, "first.json", SMALL)
    second = write(tmp_path, "second.json", {**SMALL, "method": {"a": "run:first/x"}})
    assert load_config(first, names).folder == Path("runs/long")
    assert load_config(second, names).method["a"] == "runs/long/x"
    assert load_config(second, names).name == "second"
    assert load_config(first, [*names, "name=other"]).name == "other"


def test_a_reference_in_an_override(tmp_path):
    path = write(tmp_path, "second.json", SMALL)
    assert load_config(path, ["model.checkpoint=run:first/checkpoints/last"]).model.checkpoint == (
        "runs/first/checkpoints/last"
    )


def test_a_reference_without_a_step(tmp_path):
    with pytest.raises(ConfigError, match="second.json: 'run:/x' names no step; write run:STEP/FILE"):
        load_config(write(tmp_path, "second.json", {**SMALL, "method": {"a": "run:/x"}}))
