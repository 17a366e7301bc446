"""CPSL's pipeline on a tiny toy pair through its command lines: files handed over, resume, two ranks, errors."""

import itertools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import save_file

from common.data.toy.write import make
from tests.integration.conftest import ROOT, assert_equal, call, weights
from uda import generate_class_distribution, generate_pseudo_label

TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "uda.train")
QUICK = ("train.steps=4", "train.log_every=1", "train.save_every=2", "train.threads=1", "data.workers=0",
         "eval.max_images=1", "eval.workers=0", "eval.every=100")  # fmt: skip


@pytest.fixture(scope="module")
def task(tmp_path_factory) -> Path:
    """A copy of the toy task whose files all lie in a temporary folder, with the steps before stage 1 done."""
    root = tmp_path_factory.mktemp("uda")
    make("gta5", root / "datasets/toy_gta5", train=4, val=0, size=(64, 128), seed=0, domain="render")
    make("cityscapes", root / "datasets/toy_cityscapes", train=4, val=2, size=(64, 128), seed=0, domain="day")
    for folder in ("toy", "_base_"):
        shutil.copytree(ROOT / "uda/configs" / folder, root / folder)
    tree = yaml.safe_load((root / "toy/task.yaml").read_text())
    for stream in tree["data"]["streams"].values():
        stream["augment"] |= {"crop": [32, 48], "width": 128}
        stream["batch_size"] = 2
    tree["model"]["options"] |= {"width": 8, "head_channels": 16, "features": 16}
    (root / "toy/task.yaml").write_text(yaml.safe_dump(tree))
    for path in (*(root / "toy").glob("*.yaml"), *(root / "_base_/cpsl_small").glob("*.yaml")):
        text = path.read_text().replace("runs/toy", f"{root}/runs").replace("datasets/toy_", f"{root}/datasets/toy_")
        path.write_text(text.replace("bank: 4096", "bank: 128").replace("samples: 128", "samples: 32"))
    call("uda/train.py", root / "toy", "--stage", "warm_up", *QUICK)
    call("uda/generate_pseudo_label.py", root / "toy", "--soft", *QUICK)
    call("uda/calc_prototype.py", root / "toy", *QUICK)
    call("uda/generate_class_distribution.py", root / "toy", *QUICK)
    return root


def test_files_of_the_first_steps(task):
    soft = sorted((task / "runs/warm_up/pseudo_soft").glob("*.npy"))
    array = np.load(soft[0])
    assert len(soft) == 4 and array.dtype == np.float16 and array.shape == (19, 9, 17)
    assert array.sum(0) == pytest.approx(1, abs=1e-2)
    assert np.load(task / "runs/warm_up/class_distribution.npy").sum() == pytest.approx(1)


def here(program, *words) -> None:
    """Run a program in this process, which saves the seconds of importing torch."""
    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["program.py", *map(str, words), *QUICK, "--device", "cpu"])
        program.main()
    torch.set_num_threads(threads)


def test_files_are_those_of_the_checkpoint_that_is_named(task, tmp_path, capsys):
    """Whatever lies there from another one; where the same one made them, they are kept."""
    other = tmp_path / "other.safetensors"
    moved = {
        name: tensor + 0.05 * torch.randn_like(tensor.float())
        for name, tensor in weights(task / "runs/warm_up").items()
    }
    save_file(moved, other, {"predict_prefix": "model."})
    first = task / "runs/warm_up/checkpoints/last"

    def made(name: str, checkpoint: Path) -> tuple[np.ndarray, np.ndarray, str]:
        words = (task / "toy", "--checkpoint", checkpoint, f"name={name}")
        here(generate_pseudo_label, *words, "--soft")
        said = capsys.readouterr().out
        here(generate_class_distribution, *words)
        folder = task / "runs" / name
        soft = np.stack([np.load(path) for path in sorted((folder / "pseudo_soft").glob("*.npy"))])
        return soft, np.load(folder / "class_distribution.npy"), said

    (a, shares_a, _), (b, shares_b, _) = made("a", first), made("b", other)
    assert (a != b).any() and (shares_a != shares_b).any()
    soft, shares, said = made("a", other)
    assert (soft == b).all() and shares == pytest.approx(shares_b) and "(4 new)" in said
    soft, shares, said = made("a", other)
    assert (soft == b).all() and "(0 new)" in said

    here(generate_class_distribution, task / "toy", "--checkpoint", first, "name=a")  # not read off the other's labels
    shares = np.load(task / "runs/a/class_distribution.npy")
    assert shares == pytest.approx(shares_a, abs=0.01)  # half precision decides a few ties otherwise
    assert abs(shares - shares_b).max() > 0.02


def test_labels_that_do_not_say_what_they_were_made_from(task, capsys):
    folder = task / "runs/c/pseudo_soft"
    folder.mkdir(parents=True)
    (folder / "hand_made.npy").write_bytes(b"?")
    words = (task / "toy", "--soft", "name=c", "--checkpoint", task / "runs/warm_up/checkpoints/last")
    with pytest.raises(ValueError, match="pseudo_soft: its files do not say what they were made from.*--force"):
        here(generate_pseudo_label, *words)
    assert (folder / "hand_made.npy").read_bytes() == b"?"
    here(generate_pseudo_label, *words, "--force")
    assert len(list(folder.glob("*.npy"))) == 4


@pytest.mark.parametrize("ranks", [1, 2])
def test_stage_1_resumes_bit_for_bit(task, ranks):
    """Teacher, prototypes, bank and pointer, optimisers: all of it is in the checkpoint."""
    launch = ("uda/train.py",) if ranks == 1 else TORCHRUN
    words = (task / "toy", "--stage", "stage1", *QUICK, f"train.devices={ranks}")
    whole, parts = f"whole{ranks}", f"parts{ranks}"
    call(*launch, *words, f"name={whole}")
    call(*launch, *words, f"name={parts}")
    torn = task / "runs" / parts / "checkpoints" / "step_00000004" / "model.safetensors"
    torn.write_bytes(b"torn")
    call(*launch, *words, f"name={parts}", "--resume")
    assert_equal(weights(task / "runs" / whole), weights(task / "runs" / parts))


def test_later_stages_and_test(task):
    call("uda/train.py", task / "toy", "--stage", "stage1", *QUICK)
    call("uda/generate_pseudo_label.py", task / "toy", "--stage", "stage1", *QUICK)
    call("uda/train.py", task / "toy", "--stage", "stage2", *QUICK)
    call("uda/generate_pseudo_label.py", task / "toy", "--stage", "stage2", *QUICK)
    call("uda/train.py", task / "toy", "--stage", "stage3", *QUICK)
    out = call("uda/test.py", task / "toy", *QUICK)
    assert "Mean IoU" in out and "miou13" in out
    out = call("uda/test.py", task / "toy", *QUICK, "--history")
    assert [line.split()[0] for line in out.splitlines()[:-1]] == ["warm_up", "stage1", "stage2", "stage3"]
    assert "<h1>stage1, stage2, stage3 against warm_up</h1>" in (task / "runs" / "report.html").read_text()
    assert "<h1>stage3</h1>" in (task / "runs" / "stage3" / "report.html").read_text()


def test_proda_in_place_of_stage_1(task):
    """From the same warm-up; two images per step, back-propagated one by one."""
    out = call("uda/train.py", task / "toy", "--stage", "stage1", "--variant", "proda", *QUICK, "train.devices=2")
    assert "mIoU" in out
    start = torch.load(task / "runs/warm_up/prototypes.pt")
    start = start[start.any(1)]  # a class without a prototype does not take part
    moved = weights(task / "runs/stage1_proda")["prototypes"]
    assert moved.shape == start.shape and 0 < (moved - start).abs().max() < 1


def test_missing_step_names_its_command(task):
    out = call("uda/train.py", task / "toy", "--stage", "stage1", *QUICK, "method.prototypes=none.pt", expect=2)
    assert "none.pt: no prototypes there; calc_prototype.py makes them" in out and "Traceback" not in out
    out = call("uda/train.py", task / "toy", "--stage", "stage1", *QUICK, "model.checkpoint=none/warm_up/x", expect=2)
    assert "train.py --stage warm_up makes it" in out
    out = call("uda/train.py", task / "toy", "--stage", "stage1", *QUICK, "model.num_classes=16", expect=2)
    assert "for 16 classes" in out


@pytest.mark.slow
def test_the_toy_task_rises_from_stage_to_stage(tmp_path):
    """All steps as shipped, some six minutes; a second call skips them."""
    shutil.copytree(ROOT / "uda", tmp_path / "uda", ignore=shutil.ignore_patterns("runs", "datasets", "__pycache__"))
    (tmp_path / "scripts").symlink_to(ROOT / "scripts")
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"

    def run() -> str:
        words = {"cwd": tmp_path / "uda", "env": {**os.environ, "PATH": path}, "check": True}
        return subprocess.run(["sh", "main.sh", "toy"], stdout=subprocess.PIPE, text=True, **words).stdout

    run()
    stages = ("warm_up", "stage1", "stage2", "stage3")
    results = [json.loads((tmp_path / f"uda/runs/toy/{s}/evaluation.json").read_text())["miou"] for s in stages]
    assert all(after > before - 0.005 for before, after in itertools.pairwise(results)), results
    assert results[3] > results[0] + 0.02 > 0.17, results
    assert run().count("done already") == 10
