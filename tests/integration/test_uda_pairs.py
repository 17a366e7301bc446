"""DAFormer, HRDA and MIC on pairs of data sets through the command line: official tasks, and sets of the user's own."""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file

from common.config import ConfigError, ModelConfig, load_config
from common.data import DATASETS, make_streams, toy
from common.models import build_model
from tests.integration.conftest import ROOT, assert_equal, call, weights
from tests.unit.data_files import classes, picture, save
from uda import train

CONFIGS = ROOT / "uda" / "configs"
SIZE = (64, 128)
SETS = {"gta5": {}, "synthia": {}, "cityscapes": {"val": 2}, "acdc": {"val": 4}, "dark_zurich": {"val": 2}}
PAIRS = ("gta5_to_cityscapes", "synthia_to_cityscapes", "cityscapes_to_acdc", "cityscapes_to_darkzurich")
METHODS = ("daformer/{}", "hrda/{}", "mic/{}", "mic/{}_hrda")
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "uda.train")
QUICK = ("daformer/cityscapes_to_acdc", "mic/cityscapes_to_darkzurich_hrda")
TASKS = [method.format(pair) for pair in PAIRS for method in METHODS]
SHORT = (
    "train.steps=2", "train.log_every=1", "train.save_every=1", "train.threads=1", "data.workers=0", "eval.workers=0",
    "eval.every=100", "eval.panels=1", "eval.max_images=1",
)  # fmt: skip


@pytest.fixture(scope="module")
def data(module_path) -> Path:
    """Toy scenes in the layouts of five sets, in the folders that their rows look for."""
    for name, more in SETS.items():
        toy.make(name, module_path / name, train=4, size=SIZE, **more)
    return module_path


@pytest.fixture(scope="module")
def imagenet(module_path) -> Path:
    """Weights of the small backbone, in place of ImageNet's."""
    path = module_path / "mit_b0.pth"
    torch.save(build_model(ModelConfig("segformer", 19, "mit_b0")).backbone.state_dict(), path)
    return path


def run(monkeypatch, config: Path, *words: str) -> None:
    """`python train.py CONFIG …` in this process, which saves the seconds of importing torch."""
    threads = torch.get_num_threads()
    argv = ["train.py", str(config), "--device", "cpu", *map(str, (*SHORT, *words))]
    monkeypatch.setattr(sys, "argv", argv)
    train.main()
    torch.set_num_threads(threads)


def small(task: str, imagenet: Path) -> list[str]:
    """Settings that make an official task small; all else is as shipped."""
    crops = [f"data.streams.{stream}.augment={{crop: [64, 96], box: [64, 128]}}" for stream in ("source", "target")]
    hrda = "hrda" in task
    network = [f"model.options.{word}" for word in ("channels=8", *(["crop=[48,64]"] if hrda else ()))]
    masks = ["method.mask_block=16"] if "mic" in task else []
    sliding = ["eval.crop=[64,64]", "eval.stride=[64,64]"] if hrda else ["eval.short_edge=64"]
    return [
        *crops, *network, *masks, *sliding, "model.backbone=mit_b0", f"model.pretrained={imagenet}",
        "data.streams.source.sampler.min_pixels=1", "method.margins={top: 2, bottom: 8}",
    ]  # fmt: skip


@pytest.mark.parametrize(
    "task", [task if task in QUICK else pytest.param(task, marks=pytest.mark.slow) for task in TASKS]
)
def test_official_pairs_take_two_steps(task, data, imagenet, tmp_path, monkeypatch):
    monkeypatch.setenv("LTS_DATA", str(data))
    run(monkeypatch, CONFIGS / f"{task}.yaml", f"output={tmp_path}", *small(task, imagenet))
    folder = tmp_path / Path(task).name
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    expected = {"source_ce", "feature_distance", "mixed_ce", "confident"} | ({"masked_ce"} if "mic" in task else set())
    assert expected <= lines[0].keys() and len(lines) >= 2
    assert 0 <= json.loads((folder / "evaluation.json").read_text())["miou"] <= 1


@pytest.mark.parametrize("crop", ["[65,97]", "[90,170]"], ids=["odd", "larger than the image"])
@pytest.mark.parametrize("task", ["daformer/gta5_to_cityscapes", "mic/gta5_to_cityscapes_hrda"])
def test_crops_of_any_size(task, crop, data, imagenet, tmp_path, monkeypatch):
    """Networks pad to what they divide by, recipes to the crop; neither is learned."""
    monkeypatch.setenv("LTS_DATA", str(data))
    crops = [f"data.streams.{stream}.augment.crop={crop}" for stream in ("source", "target")]
    run(monkeypatch, CONFIGS / f"{task}.yaml", f"output={tmp_path}", *small(task, imagenet), *crops)
    assert (tmp_path / Path(task).name / "evaluation.json").is_file()


@pytest.mark.parametrize(
    "task, ranks",
    [
        ("daformer/gta5_to_cityscapes", 1),
        ("mic/gta5_to_cityscapes_hrda", 1),
        pytest.param("daformer/gta5_to_cityscapes", 2, marks=pytest.mark.slow),
        pytest.param("mic/gta5_to_cityscapes_hrda", 2, marks=pytest.mark.slow),
    ],
)
def test_training_resumes_bit_for_bit(task, ranks, data, imagenet, tmp_path, monkeypatch):
    """Student, teacher, optimiser, rare classes, mixing, colours, boxes, masks, counts with pseudo-labels."""
    monkeypatch.setenv("LTS_DATA", str(data))
    words = [
        f"output={tmp_path}", *small(task, imagenet), "train.steps=4", "train.save_every=2", "train.keep=9",
        f"train.devices={ranks}", "method.threshold=0.05", "optim.warmup=0", "optim.lr=1e-3",
        "remedies={logits: {name: blv}, counts: {refresh: 2}}",
    ]  # fmt: skip

    def start(*more: str) -> None:
        if ranks == 1:
            run(monkeypatch, CONFIGS / f"{task}.yaml", *words, *more)
        else:
            call(*TORCHRUN, CONFIGS / f"{task}.yaml", *SHORT, *words, "--device", "cpu", *more, LTS_DATA=str(data))

    start()
    folder = tmp_path / Path(task).name
    whole, losses = weights(folder), logged(folder)
    halfway = load_file(folder / "checkpoints" / "step_00000002" / "model.safetensors")
    for part in ("model.", "teacher."):
        assert any(name.startswith(part) and not whole[name].equal(halfway[name]) for name in whole)

    shutil.rmtree(folder / "checkpoints" / "step_00000004")  # as if it had been killed after step 3
    start("--resume")
    assert_equal(whole, weights(folder))
    assert logged(folder) == losses


def logged(folder: Path) -> dict[int, dict[str, float]]:
    """The losses of each step, by what the log said last."""
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    terms = ("loss", "source_ce", "mixed_ce", "masked_ce", "confident", "grad_norm")
    return {line["step"]: {k: line[k] for k in terms if k in line} for line in lines if "loss" in line}


# Sets of the user's own ----------------------------------------------------------------------------------------------


def write_folder(root: Path, values: tuple[int, ...], labelled: bool = True) -> None:
    """Six images of 48×80 for training and two for evaluation; stored labels are `values` of classes 0, 1, 2."""
    for split, count in (("train", 6), ("val", 2)):
        for k in range(count):
            save(picture(48, 80, k), root / "images" / split / f"{k}.png")
            if labelled or split == "val":
                label = np.array(values, np.uint8)[classes(48, 80, 3, k)]
                save(label, root / "masks" / split / f"{k}.png")


def own_task(tmp_path: Path, *, source: dict, target: dict) -> Path:
    """A config of DAFormer from one described folder to another."""
    augment = {"recipe": "mmseg", "crop": [32, 48], "ratio": [1.0, 1.0], "photometric": False}
    tree = {
        "output": str(tmp_path / "runs"),
        "model": {
            "name": "daformer", "num_classes": 3, "backbone": "mit_b0", "norm": "bn", "options": {"channels": 8},
        },
        "data": {
            "streams": {
                "source": {
                    **source, "augment": augment,
                    "sampler": {"order": "rare_class", "min_share": 0.001, "temperature": 0.5},
                },
                "target": {**target, "augment": augment, "labels": False},
            },
            "val": {**target, "split": "val"},
        },
        "method": {"name": "daformer", "feature_distance": {"weight": 0.0}},
        "remedies": {"logits": {"name": "blv"}},
        "optim": {"name": "adamw", "lr": 1e-4},
    }  # fmt: skip
    path = tmp_path / "own.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def described(root: Path, names: list[str], **more) -> dict:
    folder = {"images": "images/{split}", "labels": "masks/{split}", "classes": names, **more}
    return {"dataset": "folder", "root": str(root), "folder": folder}


def test_folders_whose_labels_have_other_values(tmp_path, monkeypatch):
    """A label map brings the source's values to the target's classes; the target has labels for evaluation alone."""
    names = ["belt", "part", "scratch"]
    write_folder(tmp_path / "a", (7, 0, 9))
    write_folder(tmp_path / "b", (0, 1, 2), labelled=False)
    source = described(tmp_path / "a", names, label_map={"7": 0, "0": 1, "9": 2})
    target = described(tmp_path / "b", names)
    run(monkeypatch, own_task(tmp_path, source=source, target=target))
    mapped = weights(tmp_path / "runs" / "own")

    write_folder(tmp_path / "a", (0, 1, 2))
    run(monkeypatch, own_task(tmp_path, source=described(tmp_path / "a", names), target=target), "name=again")
    assert_equal(mapped, weights(tmp_path / "runs" / "again"))


def test_a_class_that_no_source_image_shows(tmp_path, monkeypatch):
    """It is named, and rare-class sampling leaves it out."""
    names = ["belt", "part", "scratch"]
    write_folder(tmp_path / "a", (0, 1, 1))
    write_folder(tmp_path / "b", (0, 1, 2))
    path = own_task(tmp_path, source=described(tmp_path / "a", names), target=described(tmp_path / "b", names))
    with pytest.warns(UserWarning, match="class 2 .scratch. has no pixel in the 6 training labels"):
        run(monkeypatch, path)

    cfg = load_config(path, SHORT)
    order = make_streams(cfg.data, cfg.seed, tmp_path / "cache")["source"].order
    assert {order.focus(draw).class_id for draw in range(200)} == {0, 1}


def test_a_folder_as_source_or_target_of_a_known_set(data, tmp_path, monkeypatch):
    """It names Cityscapes' classes, of which it shows three."""
    monkeypatch.setenv("LTS_DATA", str(data))
    names = list(DATASETS["cityscapes"].classes)
    write_folder(tmp_path / "a", (0, 1, 2))
    own = described(tmp_path / "a", names)
    known = {"dataset": "cityscapes"}
    for name, source, target in (("from", own, known), ("to", known, own)):
        path = own_task(tmp_path, source=source, target=target)
        run(monkeypatch, path, f"name={name}", "model.num_classes=19")
        assert (tmp_path / "runs" / name / "evaluation.json").is_file()


def test_classes_of_other_names_and_orders(tmp_path, monkeypatch):
    """Names in another order are a mistake for certain; other names may be other words for the same."""
    for name in "ab":
        write_folder(tmp_path / name, (0, 1, 2))
    target = described(tmp_path / "b", ["belt", "part", "scratch"])

    other_order = described(tmp_path / "a", ["part", "belt", "scratch"])
    with pytest.raises(ConfigError, match="streams.source: class 0 is 'part' .* but 'belt' .* different orders; list"):
        run(monkeypatch, own_task(tmp_path, source=other_order, target=target))
    assert not (tmp_path / "runs" / "own").exists()

    other_words = described(tmp_path / "a", ["belt", "piece", "scratch"])
    with pytest.warns(UserWarning, match="class 1 is 'piece' in 'folder', but 'part' in 'folder' .val.: equal numbers"):
        run(monkeypatch, own_task(tmp_path, source=other_words, target=target))
