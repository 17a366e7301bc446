"""The benchmark's command line on a toy set: training, bit-exact resume, evaluation, several processes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from common.data import SegmentationDataset
from common.data.toy.write import make
from common.evaluation.pictures import stored_values
from ltss_benchmark import train_net
from tests.integration.conftest import ROOT, call
from tests.unit.test_train_net import decode

CONFIGS = ROOT / "ltss_benchmark" / "configs" / "toy"
EVERY = CONFIGS / "mask2former" / "benchmark-maskformer2_R18.yaml"
DEEPLAB = CONFIGS / "deeplabv3p" / "blv-deeplabv3p_R18.yaml"
SMALL = {
    EVERY: "hidden_dim: 32, heads: 4, num_queries: 20, encoder_hidden: 32, decoder_layers: 1, decoder_hidden: 32",
    DEEPLAB: "channels: 8, lateral_channels: 4",
}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return make("ade20k_full", tmp_path_factory.mktemp("ltss") / "toy", train=6, val=3, size=(32, 48))


def words(config: Path, data: Path, out: Path, *more: str) -> list[str]:
    """A run of four steps of two images."""
    settings = [
        f"data.root={data}", f"data.cache={data / 'cache'}", f"model.options={{{SMALL[config]}}}", "train.threads=1",
        "data.streams.labeled.augment.crop=[32,32]", "data.streams.labeled.augment.short_edges=[32,40]",
        "data.workers=0", "eval.workers=0", "eval.panels=0", "eval.short_edge=64", "train.log_every=1",
        "SOLVER.IMS_PER_BATCH", "2", "SOLVER.MAX_ITER", "4", "SOLVER.CHECKPOINT_PERIOD", "2", "TEST.EVAL_PERIOD", "4",
    ]  # fmt: skip
    points = ["method.criterion.points=64"] if config == EVERY else []
    return ["--config-file", str(config), *settings, *points, *more, "OUTPUT_DIR", str(out), "--device", "cpu"]


def here(*arguments: str) -> None:
    """Run the program in this process, which saves the seconds of importing torch."""
    threads = torch.get_num_threads()
    assert train_net.main(list(arguments)) == 0
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(False)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "checkpoints" / "last" / "model.safetensors")


@pytest.mark.parametrize("config", [EVERY, DEEPLAB], ids=["all remedies", "blv"])
def test_a_resumed_run_equals_an_uninterrupted_one(data, tmp_path, config):
    """With repeat-factor sampling, Copy-Paste, Seesaw's counts and the Frequency-based Matcher."""
    here(*words(config, data, tmp_path / "whole"))
    here(*words(config, data, tmp_path / "parts"))
    (tmp_path / "parts" / "checkpoints" / "step_00000004" / "model.safetensors").write_bytes(b"torn")
    here(*words(config, data, tmp_path / "parts", "--resume", "DATALOADER.NUM_WORKERS", "1"))
    a, b = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    assert a.keys() == b.keys() and all(a[name].equal(b[name]) for name in a)
    if config == EVERY:
        assert a["criterion.seesaw.counts"].sum() > 0


def test_evaluation_leaves_scores_and_masks(data, tmp_path, capsys):
    run = tmp_path / "run"
    here(*words(EVERY, data, run))
    trained = json.loads((run / "evaluation.json").read_text())
    assert "<h1>" in (run / "report.html").read_text() and (run / "done").exists()
    capsys.readouterr()
    pictures = tmp_path / "out"
    saved = ["--save-predictions", str(pictures), "--save-rle"]
    asked = ["--eval-only", *saved, "TEST.AUG.ENABLED", "True", "MODEL.WEIGHTS", str(run)]
    here(*words(EVERY, data, run, *asked))
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("mIoU ") and "@" in line]
    tree = json.loads((run / "inference" / "lt_sem_seg_evaluation.json").read_text())
    assert len(lines) == 2 and lines[0].count("@") == 3 * len(trained["groups"])
    assert tree["sem_seg"]["mIoU"] == pytest.approx(100 * trained["miou"])
    assert tree["images"] == 3 and set(tree["LTSS"]) == {f"mIoU-{n}@{x}" for n in trained["groups"] for x in "rcf"}
    masks = json.loads((run / "inference" / "lt_sem_seg_predictions.json").read_text())
    names = sorted({mask["file_name"] for mask in masks})
    covered = {name: 0 for name in names}
    for mask in masks:
        segmentation = mask["segmentation"]
        covered[mask["file_name"]] = covered[mask["file_name"]] + decode(segmentation["counts"], segmentation["size"])
    assert len(names) == 3 and all(np.all(total == 1) for total in covered.values())  # each pixel has one class
    augmented = json.loads((run / "inference_TTA" / "lt_sem_seg_evaluation.json").read_text())
    kept = sorted((run / "test").glob("*/evaluation.json"))
    assert [path.parent.name.partition("-")[0] for path in kept] == ["step_00000004", "step_00000004_tta"]
    assert "LTSS_TTA" in augmented
    cfg = train_net.open_config(train_net.parse(words(EVERY, data, run)))
    values = stored_values(SegmentationDataset(cfg.data.val).row)
    check_pictures(pictures, values, json.loads((run / "inference_TTA" / "lt_sem_seg_predictions.json").read_text()))

    with pytest.raises(ValueError, match="there already, and 2 more"):
        train_net.main(words(EVERY, data, run, *asked))

    (run / "inference" / "lt_sem_seg_evaluation.json").unlink()
    here("--eval-only", "--checkpoint", str(run), "--device", "cpu")  # the config is the checkpoint's own
    again = json.loads((run / "inference" / "lt_sem_seg_evaluation.json").read_text())
    assert again["sem_seg"] == tree["sem_seg"]


def check_pictures(folder: Path, values: np.ndarray, masks: list[dict]) -> None:
    """The PNG files show what the masks of the same evaluation cover, in the values of the label files (K,)."""
    for name in {mask["file_name"] for mask in masks}:
        with Image.open(folder / f"{name}.png") as png:
            shown = np.array(png)
        for mask in (mask for mask in masks if mask["file_name"] == name):
            covered = decode(mask["segmentation"]["counts"], mask["segmentation"]["size"])
            assert np.array_equal(shown == values[mask["category_id"]], covered == 1)
    assert len(list(folder.glob("*.png"))) == 3


def test_two_processes_started_by_the_program(data, tmp_path):
    """--num-gpus 2 on the CPU: one set of files, and scores that one process gives too."""
    out = tmp_path / "run"
    call(
        "-m",
        "ltss_benchmark.train_net",
        *words(EVERY, data, out, "--num-gpus", "2", "data.streams.labeled.batch_size=4"),
    )
    assert "devices: 2" in (out / "config.yaml").read_text()
    trained = json.loads((out / "evaluation.json").read_text())
    here(*words(EVERY, data, out, "--eval-only", "--resume"))
    tree = json.loads((out / "inference" / "lt_sem_seg_evaluation.json").read_text())
    assert tree["sem_seg"]["mIoU"] == pytest.approx(100 * trained["miou"]) and trained["images"] == 3


def test_it_starts_in_its_own_folder(data):
    """`cd ltss_benchmark && python train_net.py`, with a path as the release's guide has it."""
    command = [sys.executable, "train_net.py", "--config-file", "configs/toy/mask2former/maskformer2_R18.yaml"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, "SOLVER.STEPS", "3"], cwd=ROOT / "ltss_benchmark", env=env, capture_output=True)
    assert done.returncode == 2 and done.stderr.decode().startswith("error: SOLVER.STEPS: not used here")
