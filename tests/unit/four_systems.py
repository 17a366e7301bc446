"""One tiny config of each of the four systems, on toy scenes in Cityscapes' layout."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[2]
SYSTEMS = ("fully_sup", "semi_sup", "uda", "ltss_benchmark")
STREAM = {"batch_size": 2, "sampler": {}}
TREES: Mapping[str, dict[str, Any]] = {
    "fully_sup": {
        "model": {"name": "upernet", "backbone": "resnet18", "options": {"channels": 16, "auxiliary": False}},
        "data": {"streams": {"labeled": {**STREAM, "augment": {"recipe": "mmseg", "crop": [32, 64]}}}},
        "method": {"heads": {"decode": {}}},
    },
    "semi_sup": {
        "base": f"{ROOT}/semi_sup/configs/_base_/usrn/baseline.yaml",
        "model": {"options": {"blocks": [1, 1, 1, 1], "width": 16, "channels": 32, "low_channels": 12}},
        "data": {"streams": {"labeled": {**STREAM, "augment": {"crop": [64, 64], "base": 96}}}},
    },
    "uda": {
        "base": f"{ROOT}/uda/configs/_base_/cpsl_small/warm_up.yaml",
        "model": {"options": {"width": 8, "head_channels": 16, "features": 16}},
        "data": {
            "streams": {
                "source": {**STREAM, "augment": {"crop": [32, 48], "width": 128, "colour_from": "target"}},
                "target": {**STREAM, "augment": {"crop": [32, 48], "width": 128}},
            }
        },
    },
    "ltss_benchmark": {
        "base": f"{ROOT}/ltss_benchmark/configs/_base_/deeplabv3p.yaml",
        "model": {"backbone": "resnet18", "options": {"channels": 16, "lateral_channels": 8}},
        "data": {
            "streams": {"labeled": {**STREAM, "augment": {"crop": [64, 64], "short_edges": [64], "max_size": 128}}}
        },
        "eval": {"short_edge": 64, "max_edge": 128, "scaled_max_edge": None},
    },
}


def tiny_config(system: str, scenes: Path, folder: Path, **sections: Any) -> Path:
    """A config file of a system in `folder`, whose runs lie there, too. sections: what lies over the tree above."""
    tree = {**TREES[system], **sections}
    tree["output"] = str(folder / "runs")
    tree["model"] = {"num_classes": 19, "norm": "bn", "pretrained": False, **tree["model"]}
    tree["data"] = {"dataset": "cityscapes", "root": str(scenes), "workers": 0, **tree["data"]}
    tree["train"] = {"steps": 1, "devices": 1, "precision": "fp32", "threads": 1, "log_every": 1, "save_every": 1}
    tree["eval"] = {"every": 1, "workers": 0, "panels": 1, **tree.get("eval", {})}
    path = folder / f"{system}.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path
