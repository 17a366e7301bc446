"""The benchmark's command line, the files an evaluation leaves, and COCO's run-length encoding."""

import json
import os
import signal
import types
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.multiprocessing import ProcessExitedException

from common import distributed
from common.config import Config, ConfigError, ModelConfig, load_config
from common.data import DATASETS, toy
from common.evaluation import summarise
from ltss_benchmark import launch, results, train_net
from ltss_benchmark.rle import compress, encode_labels

CONFIGS = Path(__file__).parents[2] / "ltss_benchmark" / "configs"
BASE = CONFIGS / "ade20k_full" / "mask2former" / "maskformer2_R50_bs16_200k.yaml"

# Command line -------------------------------------------------------------------------------------------------------


def test_configs_are_found_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for word in ("configs/toy/mask2former/maskformer2_R18.yaml", str(BASE)):
        args = train_net.parse(["--config", word, "--eval-only", "SOLVER.BASE_LR", "1e-3", "--resume"])
        assert train_net.open_config(args).optim.lr == 1e-3 and args.resume and args.eval_only


@pytest.mark.parametrize("words", [["--save-predictions", "out"], ["--save-rle"]])
def test_predictions_are_saved_by_an_evaluation_only(capsys, words):
    with pytest.raises(SystemExit) as end:
        train_net.parse(["--config-file", str(BASE), *words])
    assert end.value.code == 2 and f"{words[0]} belongs to --eval-only" in capsys.readouterr().err
    args = train_net.parse(["--config-file", str(BASE), *words, "--eval-only"])
    assert [args.save_predictions, args.save_rle] == (["out", False] if len(words) == 2 else [None, True])


@pytest.mark.parametrize(
    ("batch", "devices", "world", "expected"), [(16, 8, 1, 8), (4, 8, 1, 4), (2, 8, 2, 2), (12, 8, 4, 4), (16, 1, 2, 2)]
)
def test_the_batch_is_divided_as_stated_or_nearly(recwarn, batch, devices, world, expected):
    cfg = load_config(BASE, [f"data.streams.labeled.batch_size={batch}", f"train.devices={devices}"])
    assert train_net.divided(cfg, world).train.devices == expected
    assert (f"train.devices: {expected} in place of {devices}" in "".join(str(w.message) for w in recwarn)) == (
        devices != expected
    )


def test_a_batch_that_cannot_be_divided():
    with pytest.raises(ConfigError, match="16 images per step cannot be divided over 3 processes"):
        train_net.divided(load_config(BASE), 3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_gpus": 0}, "--num-gpus 0"),
        ({"machine_rank": 2}, "ranks of machines count from 0"),
        ({"num_machines": 2}, "--dist-url tcp://HOST:PORT of machine 0 is needed"),
        ({"dist_url": "host:1"}, "expected tcp://HOST:PORT"),
        ({"device": "cuda:1"}, "--device cuda:1: 2 processes need one each; give --device cuda"),
        ({"device": "cuda", "num_gpus": 9}, "--num-gpus 9: this machine has [0-8]; give --device cpu"),
    ],
)
def test_processes_that_cannot_be_started(monkeypatch, changes, message):
    monkeypatch.delenv("RANK", raising=False)
    args = {"num_gpus": 2, "num_machines": 1, "machine_rank": 0, "dist_url": "auto", "device": "cpu"} | changes
    with pytest.raises(ValueError, match=message):
        launch.check(types.SimpleNamespace(**args))


@pytest.mark.parametrize(("device", "gpus", "warned"), [(None, 0, True), ("cpu", 0, False), (None, 2, False)])
def test_processes_on_the_cpu_are_announced(monkeypatch, recwarn, device, gpus, warned):
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    args = {"num_gpus": 2, "num_machines": 1, "machine_rank": 0, "dist_url": "auto", "device": device}
    launch.check(types.SimpleNamespace(**args))
    assert [f"starts 2 CPU processes on {os.cpu_count()} cores" in str(w.message) for w in recwarn] == [True] * warned


def test_numbers_of_processes_beside_torchruns_are_said_to_be_ignored(monkeypatch):
    monkeypatch.setenv("RANK", "0")
    args = {"num_gpus": 2, "num_machines": 1, "machine_rank": 0, "dist_url": "auto", "device": None}
    with pytest.warns(UserWarning, match="--num-gpus and --num-machines are ignored"):
        launch.check(types.SimpleNamespace(**args))


def test_meeting_points():
    args = {"num_gpus": 2, "num_machines": 1, "machine_rank": 0, "dist_url": "auto", "device": "cpu"}
    host, port = launch.meeting_point(types.SimpleNamespace(**args))
    assert host == "127.0.0.1" and port > 0
    args |= {"dist_url": "tcp://10.0.0.1:1234", "num_machines": 2, "machine_rank": 1}
    assert launch.meeting_point(types.SimpleNamespace(**args)) == ("10.0.0.1", 1234)


def test_ranks_are_started_once(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    assert launch.needed(2, 1) and launch.needed(1, 2) and not launch.needed(1, 1)
    monkeypatch.setenv("RANK", "0")
    assert not launch.needed(2, 1)


@pytest.mark.parametrize(("code", "expected"), [(2, 2), (143, 143), (-9, 137)])
def test_a_rank_that_fails_gives_its_exit_code(monkeypatch, code, expected):
    class Context:
        processes = ()

        def join(self, grace_period):
            raise ProcessExitedException("", error_index=0, error_pid=1, exit_code=code)

    monkeypatch.setattr(launch.multiprocessing, "start_processes", lambda *args, **options: Context())
    args = {"num_gpus": 2, "num_machines": 1, "machine_rank": 0, "dist_url": "auto", "device": "cpu"}
    before = signal.getsignal(signal.SIGTERM)
    assert launch.start(print, types.SimpleNamespace(**args)) == expected
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.fixture(scope="module")
def toy_root(tmp_path_factory) -> Path:
    return toy.make("ade20k_full", tmp_path_factory.mktemp("ltss") / "toy", train=4, val=2, size=(32, 48))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["SOLVER.STEPS", "1"], "SOLVER.STEPS: not used here"),
        (["--eval-only"], "--eval-only needs MODEL.WEIGHTS FILE, or --resume"),
        (["--eval-only", "MODEL.WEIGHTS", "nowhere.pkl"], "nowhere.pkl"),
        (["--eval-only", "model.reset_classifier=true"], "model.reset_classifier: --eval-only cannot score a new"),
        (["data.root=/nowhere"], "no folder /nowhere"),
        (["model.num_classes=9"], "model.num_classes is 9, but data set"),
        (["--num-gpus", "3"], "4 images per step cannot be divided over 3 processes"),
        (["--num-gpus", "0"], "--num-gpus 0"),
        (["--num-gpus", "2", "MODEL.WEIGHTS", "nowhere.pkl"], "model.checkpoint: nowhere.pkl: no such weight file"),
        (["--num-gpus", "2", "--eval-only", "MODEL.WEIGHTS", "nowhere.pkl"], "nowhere.pkl: no such checkpoint"),
        (["--num-gpus", "2", "method.matcher.mode=both"], "method.matcher.mode: 'both' is not one of"),
    ],
)
def test_bad_input_is_one_line(toy_root, tmp_path, fails, unchanged, monkeypatch, words, message):
    base = CONFIGS / "toy" / "mask2former" / "maskformer2_R18.yaml"
    root = [] if any("data.root" in word for word in words) else [f"data.root={toy_root}"]
    monkeypatch.setattr(launch.multiprocessing, "start_processes", None)  # nothing is started
    settings = [*root, f"output={tmp_path}", "data.workers=0", "--device", "cpu"]
    assert message in fails(train_net.main, "--config-file", base, *settings, *words)


# Results ------------------------------------------------------------------------------------------------------------


def scored(convention: str):
    """Three classes and one that is only predicted."""
    matrix = np.array([[8, 2, 0, 0], [1, 5, 0, 4], [0, 0, 3, 0], [0, 0, 0, 0]])
    row = DATASETS["mhpv2_15k"]
    row = types.SimpleNamespace(
        name="toy", classes=("a", "b", "c", "d"), palette=row.palette[:4], tail=(), counts=None, flip_pairs=()
    )
    groups = {"image": ["frequent", "common", "rare", "rare"], "pixel": ["frequent", "frequent", "frequent", "rare"]}
    return summarise(matrix, row, convention, groups) | {"images": 3}, row, groups


def test_sections_of_a_long_tailed_set(tmp_path, capsys):
    result, row, groups = scored("ltss")
    results.write_results(tmp_path, result, row, groups)
    results.print_groups(result)
    tree = json.loads((tmp_path / "inference" / "lt_sem_seg_evaluation.json").read_text())
    iou = [100 * 8 / 11, 100 * 5 / 12, 100.0]
    assert tree["sem_seg"]["mIoU"] == pytest.approx(sum(iou) / 4) == tree["Test"]["mIoU"]
    assert tree["other"]["convention"] == "detectron2"
    assert tree["other"]["sem_seg"]["mIoU"] == pytest.approx(sum(iou) / 3)
    assert tree["sem_seg"]["IoU-b"] == pytest.approx(iou[1]) and tree["sem_seg"]["ACC-b"] == pytest.approx(50)
    assert tree["sem_seg"]["IoU-d"] is None and tree["LTSS"]["mIoU-pixel@c"] is None
    assert list(tree["LTSS"]) == [f"mIoU-{level}@{x}" for level in ("image", "pixel") for x in "rcf"]
    assert tree["LTSS"]["mIoU-image@r"] == pytest.approx(50) and tree["LTSS"]["mIoU-image@c"] == pytest.approx(iou[1])
    assert tree["LTSS"]["mIoU-pixel@f"] == pytest.approx(sum(iou) / 3) and tree["LTSS"]["mIoU-pixel@r"] == 0
    line = [text for text in capsys.readouterr().out.splitlines() if text.startswith("mIoU ")][-1]
    assert line == (
        "mIoU 53.60  mIoU-image@r 50.00  mIoU-image@c 41.67  mIoU-image@f 72.73  "
        "mIoU-pixel@r 0.00  mIoU-pixel@c -  mIoU-pixel@f 71.46"
    )


def test_sections_of_a_balanced_set(tmp_path):
    result, row, groups = scored("detectron2")
    results.write_results(tmp_path, result, row, groups, augmented=True)
    tree = json.loads((tmp_path / "inference_TTA" / "sem_seg_evaluation.json").read_text())
    assert "LTSS_TTA" not in tree and "Test_TTA" not in tree
    assert tree["sem_seg_TTA"]["mIoU"] == pytest.approx((100 * 8 / 11 + 100 * 5 / 12 + 100) / 3)


def test_predictions_of_all_ranks_are_one_list(tmp_path, monkeypatch):
    maps = {"x": torch.tensor([[0, 1], [1, 1]]), "y": torch.tensor([[2, 2, 0]])}
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    writers = []
    for rank, (name, label) in enumerate(maps.items()):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        writers.append(results.Predictions(tmp_path / "a.json"))
        writers[-1](name, label)
    for rank in (1, 0):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        writers[rank].close()
    entries = json.loads((tmp_path / "a.json").read_text())
    assert [(e["file_name"], e["category_id"]) for e in entries] == [("x", 0), ("x", 1), ("y", 0), ("y", 2)]
    for entry in entries:
        mask = decode(entry["segmentation"]["counts"], entry["segmentation"]["size"])
        assert np.array_equal(mask, maps[entry["file_name"]].numpy() == entry["category_id"])
    assert list(tmp_path.iterdir()) == [tmp_path / "a.json"]


# Run lengths --------------------------------------------------------------------------------------------------------


def decode(text: str, size) -> np.ndarray:
    """COCO's compressed counts, character by character."""
    counts, value, shift = [], 0, 0
    for character in text:
        bits = ord(character) - 48
        value |= (bits & 31) << shift
        shift += 5
        if not bits & 32:
            if bits & 16:
                value -= 1 << shift
            counts.append(value + (counts[-2] if len(counts) > 2 else 0))
            value = shift = 0
    flat, state = [], False
    for count in counts:
        flat += [state] * count
        state = not state
    return np.array(flat).reshape(size[1], size[0]).T


@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (7, 1), (13, 17), (300, 5)])
@pytest.mark.parametrize("block", [1, 4])
def test_masks_survive_the_encoding(shape, block):
    label = np.random.default_rng(0).integers(0, 4, (-(-shape[0] // block), -(-shape[1] // block)))
    label = np.kron(label, np.ones((block, block), int))[: shape[0], : shape[1]]
    encoded = encode_labels(label)
    assert set(encoded) == set(np.unique(label).tolist())
    for k, text in encoded.items():
        assert np.array_equal(decode(text, shape), label == k)


def test_run_lengths_as_characters():
    """Written out by hand: 6 and 1 fit one group; 100 needs two; 3 − 6 is negative."""
    assert compress(np.array([6, 1, 100, 3])) == "61T32"
    assert compress(np.array([40])) == "X1" and compress(np.array([0, 16])) == "0`0"


def test_large_maps_are_encoded():
    label = np.zeros((512, 700), np.int64)
    label[100:400, 50:600] = 846
    text = encode_labels(label)[846]
    assert np.array_equal(decode(text, label.shape), label == 846) and len(text) < 2000
    assert encode_labels(np.zeros((0, 5), np.int64)) == {}


def test_resumed_evaluation_is_of_the_newest_checkpoint(tmp_path):
    cfg = Config(
        name="run", output=str(tmp_path), model=ModelConfig(name="none", num_classes=2, checkpoint="start.pkl")
    )
    newest = tmp_path / "run" / "checkpoints" / "last"
    assert train_net.weights_of(cfg, resume=True) == Path("start.pkl")  # nothing trained yet
    newest.mkdir(parents=True)
    assert train_net.weights_of(cfg, resume=True) == newest
    assert train_net.weights_of(cfg, resume=False) == Path("start.pkl")
    with pytest.raises(ConfigError, match="needs MODEL.WEIGHTS FILE"):
        train_net.weights_of(replace(cfg, model=replace(cfg.model, checkpoint=None)), resume=False)
