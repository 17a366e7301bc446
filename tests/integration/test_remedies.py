"""Remedies that ask something of the network or the data, in runs of two steps of every system by its command line."""

import json
import shutil
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import yaml

from common.data.toy.write import make
from fully_sup import train as fully_sup
from ltss_benchmark import train_net
from semi_sup import main as semi_sup
from tests.integration.conftest import assert_equal, weights
from uda import train as uda

CROP = {"crop": [32, 64]}
USRN_NET = {"blocks": [1, 1, 1, 1], "width": 4, "channels": 8, "low_channels": 4}
CPSL_NET = {"blocks": [1, 1, 1, 1], "width": 4, "head_channels": 8, "features": 8}
D2_NET = {"channels": 8, "lateral_channels": 4}
LABELED = {"labeled": {"augment": {"recipe": "usrn", "base": 64, **CROP}}}
VIEWS = {"recipe": "unimatch", **CROP}
PAIR = {
    "labeled": {"augment": VIEWS},
    "unlabeled": {"labels": False, "augment": {**VIEWS, "views": 2, "partner": True}},
}


def domains(recipe: str) -> dict[str, Any]:
    return {
        "source": {"augment": {"recipe": recipe, **CROP}},
        "target": {"labels": False, "augment": {"recipe": recipe, **CROP}},
    }


SYSTEMS: dict[str, tuple[ModuleType, dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    # program, model, method, streams
    "supervised": (
        fully_sup,
        {"name": "upernet", "backbone": "resnet18", "options": {"channels": 8, "auxiliary": False}},
        {},
        {"labeled": {"augment": {"recipe": "mmseg", **CROP}}},
    ),
    "baseline": (
        semi_sup,
        {"name": "deeplabv3plus", "backbone": "resnet50", "align_corners": True, "options": USRN_NET},
        {"name": "baseline"},
        LABELED,
    ),
    "unimatch": (
        semi_sup,
        {"name": "deeplabv3plus_unimatch", "backbone": "resnet18", "align_corners": True, "options": D2_NET},
        {"name": "unimatch", "threshold": 0.0},
        PAIR,
    ),
    "warm_up": (
        uda,
        {"name": "deeplabv2", "mean": [0, 0, 0], "std": [255] * 3, "align_corners": True, "options": CPSL_NET},
        {"name": "warm_up", "discriminator_width": 4},
        domains("cpsl"),
    ),
    "daformer": (
        uda,
        {"name": "daformer", "backbone": "mit_b0", "options": {"channels": 8}},
        {"name": "daformer", "threshold": 0.0, "feature_distance": {"weight": 0.0}},
        domains("mmseg"),
    ),
    "deeplabv3plus": (
        train_net,
        {"name": "deeplabv3plus_d2", "backbone": "resnet18", "options": D2_NET},
        {"name": "deeplabv3plus"},
        {"labeled": {"augment": {"recipe": "detectron2", "short_edges": [64], **CROP}}},
    ),
}


class Place:
    """A toy set, and runs on it."""

    def __init__(self, root: Path):
        self.root = root
        self.data = make("cityscapes", root / "data", train=4, val=1, size=(64, 128), seed=0, domain="day")

    def config(self, system: str, name: str, remedies: dict[str, Any], options: dict[str, Any]) -> Path:
        """The file of a run of two steps. options: further ones of the network."""
        _, model, method, streams = SYSTEMS[system]
        source = {"dataset": "cityscapes", "root": str(self.data), "cache": str(self.root / "cache"), "workers": 0}
        tree = {
            "name": name,
            "output": str(self.root / "runs"),
            "model": {"num_classes": 19, "norm": "bn", **model, "options": {**model["options"], **options}},
            "data": {**source, "streams": streams},
            "method": method,
            "remedies": remedies,
            "optim": {"lr": 0.01},
            "train": {"steps": 2, "log_every": 1, "save_every": 1, "threads": 1},
            "eval": {"every": 100, "workers": 0, "panels": 0},
        }
        path = self.root / f"{name}.yaml"
        path.write_text(yaml.safe_dump(tree))
        return path

    def run(self, system: str, name: str, remedies: dict[str, Any], *more: str, **options: Any) -> Path:
        """Train in this process, which saves the seconds of importing torch; the folder of the run."""
        program = SYSTEMS[system][0]
        path = self.config(system, name, remedies, options)
        flag = {semi_sup: ["--config"], train_net: ["--config-file"]}.get(program, [])
        threads = torch.get_num_threads()

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", ["program.py", *flag, str(path), *more, "--device", "cpu"])
            program.main()

        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(False)
        return self.root / "runs" / name


@pytest.fixture(scope="module")
def place(module_path) -> Place:
    return Place(module_path)


@pytest.mark.parametrize("system", SYSTEMS)
def test_ldam_on_a_cosine_classifier(place, system):
    folder = place.run(system, f"{system}_ldam", {"logits": {"name": "ldam"}}, classifier="cosine")
    found = [name for name in weights(folder) if name.endswith("directions")]
    assert found and all(tensor.isfinite().all() for tensor in weights(folder).values())


@pytest.mark.parametrize("system", SYSTEMS)
def test_a_run_with_a_classifier_of_regions_resumes_bit_for_bit(place, system):
    remedies = {"sets": [{"name": "region"}]}
    folder = place.run(system, f"{system}_region", remedies)
    whole = weights(folder)
    assert any("trained.0.classifier" in name for name in whole)

    shutil.rmtree(folder / "checkpoints" / "step_00000002")
    place.run(system, f"{system}_region", remedies, "--resume")
    assert_equal(whole, weights(folder))


def test_a_run_counts_what_its_sampler_shows(place, capsys):
    """The offsets are those of the sampled counts, and the run says so."""
    remedies = {"logits": {"name": "logit_adjustment"}, "counts": {"of": "sampled"}}
    sampler = "data.streams.labeled.sampler={order: repeat_factor, level: pixel, threshold: 0.3}"
    folder = place.run("supervised", "sampled", remedies, sampler)
    assert "counts.of: sampled" in capsys.readouterr().out
    assert json.loads((folder / "run.json").read_text())["counts_of"] == "sampled"
    told = json.loads((folder / "statistics.json").read_text())
    assert len(told["sampled_pixels"]) == len(told["class_pixels"]) == 19
    assert told["sampled_pixels"] != told["class_pixels"]

    place.run("supervised", "counted", {"logits": {"name": "logit_adjustment"}}, sampler)
    assert json.loads((place.root / "runs/counted/run.json").read_text())["counts_of"] == "dataset"
