"""Folders of runs as a training leaves them, made up: what the tests of the report show."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
from PIL import Image

from common.evaluation import summarise, write_label

CLASSES = ("road", "sky", "person", "lamp & <post>")
PALETTE = ((128, 64, 128), (70, 130, 180), (220, 20, 60), (250, 170, 30))
GROUPS = {"image": ["frequent", "frequent", "common", "rare"], "pixel": ["frequent", "common", "common", "rare"]}
MATRIX = np.array([[700, 60, 30, 10], [30, 400, 5, 5], [20, 10, 60, 0], [9, 8, 3, 20]])
IDENTITY = {
    "dataset": "street",
    "split": "val",
    "images": 7,
    "files": "1234",
    "labels": "abcd",
    "convention": "nan_mean",
    "scales": [1.0],
}
BETTER = np.array([[690, 60, 40, 10], [30, 400, 5, 5], [10, 5, 75, 0], [4, 4, 2, 30]])


def make_run(
    folder: Path, matrix=MATRIX, convention="nan_mean", drop=(), tail=(2, 3), classes=CLASSES, **identity
) -> Path:
    """A complete run folder, without the parts in `drop`, evaluated as IDENTITY and the given keys say."""
    folder.mkdir(parents=True)
    k = len(classes)
    palette = [*PALETTE, *[(i % 256, i // 256, 7) for i in range(4, k)]]
    row = SimpleNamespace(name="street", classes=classes, palette=palette, tail=tail, counts=None)
    groups = GROUPS if k == 4 else {"image": ["rare"] * k}
    evaluation = {**summarise(matrix, row, convention, groups), "images": 7, "seconds": 1.5, "ms_per_image": 214.3}
    if "identity" not in drop:
        evaluation["identity"] = {**IDENTITY, "convention": convention, **identity}
    machine = {"processor": "Some CPU", "cores": 2, "gpu": None, "torch": "2.15"}
    record = {"command": "python train.py a.yaml", "commit": "abc123", "seed": 5, "started": "2025-01-02", "minutes": 3}
    log = [{"kind": "train", "step": 10 * i, "loss": 3 / i, "lr": 0.01 / i, "grad_norm": 1.0} for i in range(1, 60)]
    scored = {"kind": "eval", "convention": convention, "miou_tail": 0.3}
    log += [{**scored, "step": 300, "miou": 0.4}, {**scored, "step": 590, "miou": 0.5}]
    texts = {
        "config.yaml": f"name: {folder.name}\noptim:\n  lr: 0.01\n",
        "run.json": json.dumps({**record, "machine": machine}),
        "log.jsonl": "".join(json.dumps(line) + "\n" for line in log),
        "evaluation.json": json.dumps(evaluation),
        "statistics.json": json.dumps({"class_pixels": [8000, 1900, 90, 10], "class_images": [9, 9, 5, 1]}),
    }
    for name, text in texts.items():
        if name not in drop:
            (folder / name).write_text(text)
    if "panels" not in drop:
        make_panels(folder / "panels")
    return folder


def make_panels(folder: Path) -> None:
    rng, colours = np.random.default_rng(0), dict(enumerate(PALETTE))
    truth = rng.integers(-1, 4, (20, 30))
    write_label(folder / "00003_truth.png", truth, colours)
    pred = truth.clip(0)
    pred[:, :3] = 1
    write_label(folder / "00003_prediction.png", pred, colours)
    Image.fromarray(rng.integers(0, 256, (20, 30, 3), dtype=np.uint8)).save(folder / "00003_image.png")
