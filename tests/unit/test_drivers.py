"""The drivers of pipelines, `uda/main.sh` and `semi_sup/main.sh`, on programs that only leave what they should make."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

PYTHON = f"""#!/bin/sh
case "$2" in common.steps) exec {sys.executable} "$@" ;; esac
echo "$*" >>"$CALLS"
case "$*" in *"$FAILS"*) exit 2 ;; esac
case "$*" in */scripts/* | *--check* | *--history*) exit ;; esac
output=$RUNS
case $1 in -m) shift && set -- "${{1#*.}}.py" "$@" ;; esac
for word; do
    case $word in *.yaml | *.json) name=$(basename "${{word%.*}}") ;; esac
    case $word in output=*) output=${{word#output=}} ;; esac
    case $word in name=* | runs.$name=*) name=${{word#*=}} ;; esac
    case $word in *_kmeans) algorithm=$word ;; esac
done
case $* in
    *--soft*) makes=pseudo_soft/made.json ;;
    *--save_feature*) makes=features/index.json ;;
    *--test*) makes=report.html ;;
    generate_pseudo_label*) makes=pseudo_hard/made.json ;;
    calc_prototype*) makes=prototypes.pt ;;
    generate_class*) makes=class_distribution.npy ;;
    test.py*) makes=test/x/evaluation.json ;;
    clustering*) makes=label_subcls_$algorithm/subclasses.json ;;
    *) makes=checkpoints/last ;;
esac
mkdir -p "$(dirname "$output/$name/$makes")"
echo made >"$output/$name/$makes"
"""


@pytest.fixture
def driver(tmp_path):
    """Call a copy of a system's main.sh with a `python` that notes its words; returns these, and what was printed."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/python").write_text(PYTHON)
    (tmp_path / "bin/python").chmod(0o755)

    def run(system, *words, fails="nothing", code=0, here=None, **environment):
        """here: the working directory, where that is not the system's folder."""
        folder, calls = tmp_path / system, tmp_path / "calls"
        folder.mkdir(exist_ok=True)
        shutil.copy(ROOT / system / "main.sh", folder)
        if not (folder / "configs").exists():
            (folder / "configs").symlink_to(ROOT / system / "configs")
        calls.write_text("")

        path = f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}"
        runs = "saved" if system == "semi_sup" else f"runs/{words[0] if words else ''}"
        given = {
            "PATH": path,
            "CALLS": str(calls),
            "FAILS": fails,
            "RUNS": runs,
            "PYTHONPATH": str(ROOT),
            **environment,
        }
        command = ["sh", "main.sh" if here is None else str(folder / "main.sh"), *words]
        environment = {**os.environ, **given}
        done = subprocess.run(command, cwd=here or folder, env=environment, capture_output=True, text=True)
        assert done.returncode == code, done.stdout + done.stderr
        return calls.read_text().splitlines(), done.stdout + done.stderr

    return run


def steps_of(calls: list[str]) -> list[str]:
    """Program and config of each call that belongs to a run."""
    words = [call.split() for call in calls if "/scripts/" not in call.split()[0]]
    return [f"{w[0]} {Path(next(x for x in w if x.endswith(('.yaml', '.json')))).stem}" for w in words]


UDA = [
    "train.py warm_up", "generate_pseudo_label.py warm_up", "calc_prototype.py warm_up",
    "generate_class_distribution.py warm_up", "train.py stage1", "generate_pseudo_label.py stage1", "train.py stage2",
    "generate_pseudo_label.py stage2", "train.py stage3", "test.py stage3",
]  # fmt: skip
CHECK, HISTORY = "train.py stage2", "test.py stage3"  # the look for weights and the printed results are no steps
USRN = [
    "main.py toy_1over8_baseline", "main.py toy_1over8_baseline", "clustering.py toy_1over8_baseline",
    "main.py toy_1over8_usrn", "main.py toy_1over8_usrn",
]  # fmt: skip


def test_each_step_runs_once(driver):
    calls, _ = driver("uda", "toy", OVERRIDES="seed=3")
    assert calls[0].startswith("../scripts/make_toy.py gta5") and calls[1].startswith("../scripts/make_toy.py citysc")
    assert steps_of(calls) == [CHECK, *UDA, HISTORY]
    assert calls[2] == "train.py configs/toy/stage2.yaml --check seed=3"
    assert calls[3] == "train.py configs/toy/warm_up.yaml --resume seed=3"
    assert calls[4] == "generate_pseudo_label.py configs/toy/warm_up.yaml --soft seed=3"
    assert calls[-1] == "test.py configs/toy/stage3.yaml --history seed=3"
    calls, out = driver("uda", "toy", OVERRIDES="seed=3")
    assert steps_of(calls) == [CHECK, HISTORY] and out.count("done already") == 10
    _, out = driver("uda", "toy", OVERRIDES="seed=4", code=2)
    assert "error: runs/toy/warm_up: trained from something else: seed (was 3, is 4)" in out


def test_output_and_the_names_of_runs_carry_over(driver, tmp_path):
    """Every file of every step lies where they say, and nothing elsewhere."""
    uda, usrn, short = (tmp_path / name for name in ("for_uda", "for_usrn", "short"))
    driver("uda", "toy", OVERRIDES=f"output={uda} runs.warm_up=long")
    assert sorted(path.name for path in uda.iterdir()) == ["long", "stage1", "stage2", "stage3"]
    driver("semi_sup", "toy_1over8", OVERRIDES=f"output={usrn}")
    driver("semi_sup", "toy_1over8", "selftrain", SAVED=str(short))
    assert sorted(path.name for path in usrn.iterdir()) == ["toy_1over8_baseline", "toy_1over8_usrn"]
    assert [path.name for path in short.iterdir()] == ["toy_1over8_selftrain"]
    assert not list(tmp_path.glob("*/runs")) and not list(tmp_path.glob("*/saved"))

    for system, task in (("uda", "toy"), ("semi_sup", "toy_1over8")):
        calls, out = driver(system, task, OVERRIDES="seed=1 name=x", code=2)
        assert not calls and out.startswith("error: OVERRIDES: name= would put all steps into one folder; give output=")


def test_it_goes_on_after_the_step_that_failed(driver):
    calls, _ = driver("uda", "camvid_day_to_dusk", fails="stage1.yaml --resume", code=2)
    assert steps_of(calls)[-1] == "train.py stage1"
    calls, out = driver("uda", "camvid_day_to_dusk")
    assert steps_of(calls) == [CHECK, *UDA[4:], HISTORY] and out.count("done already") == 4


def test_it_recovers_from_changed_files(driver, tmp_path):
    """Removed labels are made again; a stage that was trained from other weights has to be accepted or trained anew."""
    driver("uda", "toy")
    run = tmp_path / "uda/runs/toy/stage1"
    shutil.rmtree(run / "pseudo_hard")
    (run / "checkpoints/last").write_text("trained on")
    calls, out = driver("uda", "toy", code=2)
    assert steps_of(calls) == [CHECK, "generate_pseudo_label.py stage1"]
    changed = "the file of model.checkpoint, the file of method.teacher"  # its start and its teacher are stage 1's
    assert f"error: runs/toy/stage2: trained from something else: {changed}" in out
    calls, _ = driver("uda", "toy", CHANGED="anew")  # stage 2 comes out as before, so stage 3 stands
    assert steps_of(calls) == [CHECK, *UDA[6:8], HISTORY]


def test_variants(driver):
    """A variant's stages take its configs, and the plain one where it has none; weights are looked for first."""
    calls, _ = driver("uda", "gta5_to_cityscapes", "proda", TRAIN="python train.py --device cpu")
    assert calls[0] == "train.py configs/gta5_to_cityscapes/stage2_proda.yaml --check"
    assert [("_proda.yaml" in call) for call in calls] == [True, *[False] * 4, *[True] * 7]
    assert calls[1] == "train.py --device cpu configs/gta5_to_cityscapes/warm_up.yaml --resume"
    calls, _ = driver("uda", "gta5_to_cityscapes", "blv")
    assert all("_blv.yaml" in call for call in calls)
    _, out = driver("uda", "toy", "bvl", code=2)
    assert out.startswith("error: usage") and "toy/stage1_proda" in out and out.count("\n") == 1
    driver("uda", code=2)


def test_semi_supervised(driver, tmp_path):
    calls, _ = driver("semi_sup", "toy_1over8")
    assert steps_of(calls) == USRN
    assert calls[0].startswith("../scripts/make_toy.py voc") and calls[1].startswith("../scripts/prepare_splits.py")

    calls, out = driver("semi_sup", "toy_1over8", ALGORITHM="normal_kmeans")
    assert steps_of(calls) == USRN[2:] and out.count("done already") == 2
    name = "toy_1over8_usrn_normal_kmeans"
    labels = "data.streams.labeled.maps.sub_label=run:toy_1over8_baseline/label_subcls_normal_kmeans"
    assert calls[-1] == f"main.py --config configs/toy_1over8_usrn.json --test name={name} {labels}"
    assert (tmp_path / "semi_sup/saved" / name / "report.html").exists()

    lists = tmp_path / "semi_sup/datasets/toy_voc"  # the list of labelled images is a file that the config names
    lists.mkdir(parents=True)
    (lists / "20_train_supervised.txt").write_text("another")
    _, out = driver("semi_sup", "toy_1over8", code=2)
    assert "saved/toy_1over8_baseline: trained from something else: the file of data.streams.labeled.list" in out
    calls, _ = driver("semi_sup", "toy_1over8", CHANGED="anew")
    assert steps_of(calls) == USRN
    _, out = driver("semi_sup", "toy_1over9", code=2)
    assert out.startswith("error: usage") and "toy_1over8_usrn" in out


# A folder of one's own ------------------------------------------------------------------------------------------------

OWN = """
data:
  dataset: folder
  folder: {name: factory, images: i, labels: l, classes: [a, b]}
model: {num_classes: 2}
output: out
"""


@pytest.fixture
def own(tmp_path):
    """A working directory with a task folder in it, and folders that hide modules if Python looks there first."""
    here = tmp_path / "my work"
    for name in ("common", "semi_sup", "uda", "task"):
        (here / name).mkdir(parents=True)
    (here / "task/task.yaml").write_text(OWN)
    for name in ("warm_up", "stage1", "stage2", "stage3"):
        (here / f"task/{name}.yaml").write_text(f"base: [uda/configs/_base_/cpsl_small/{name}.yaml, task.yaml]")
    for name in ("baseline", "usrn"):
        (here / f"task/{name}.yaml").write_text(f"base: [semi_sup/configs/_base_/usrn/{name}.yaml, task.yaml]")
    return here


def test_a_folder_of_ones_own(driver, own):
    """Its configs may lie anywhere; what they name and what the steps leave counts from where the driver starts."""
    calls, _ = driver("uda", "task", here=own, RUNS="out")
    programs = [step.split(".py")[0] for step in (CHECK, *UDA, HISTORY)]
    assert [call.split()[:2] for call in calls] == [["-m", f"uda.{program}"] for program in programs]
    assert calls[1] == "-m uda.train task/warm_up.yaml --resume"
    assert sorted(path.name for path in (own / "out").iterdir()) == ["stage1", "stage2", "stage3", "warm_up"]
    calls, out = driver("uda", "task/", here=own, RUNS="out")
    assert len(calls) == 2 and out.count("done already") == 10

    calls, _ = driver("semi_sup", "task", here=own, RUNS="out")
    assert calls[0].endswith("/scripts/prepare_splits.py task/usrn.yaml")
    assert calls[1] == "-m semi_sup.main --config task/baseline.yaml --resume"
    assert (own / "out/usrn/report.html").exists() and (own / "out/baseline/features").exists()
    calls, _ = driver("semi_sup", "task", here=own, RUNS="out", ALGORITHM="normal_kmeans")
    labels = "name=usrn_normal_kmeans data.streams.labeled.maps.sub_label=run:baseline/label_subcls_normal_kmeans"
    assert calls[-1] == f"-m semi_sup.main --config task/usrn.yaml --test {labels}"

    for system, missing in (("uda", "task/stage1_blv.yaml"), ("semi_sup", "task/blv.yaml")):
        _, out = driver(system, "task", "blv", here=own, code=2)
        assert out.startswith("error: usage") and f"there is no {missing}" in out and out.count("\n") == 1
