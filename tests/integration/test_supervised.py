"""Whole supervised runs through the command line: kills and bit-exact resumes, two ranks, testing, bad input."""

import json
import random
import re
import shutil
import signal
import time

import pytest

from tests.integration.conftest import assert_equal, call, command, weights

TRAIN = "fully_sup/train.py"


@pytest.fixture
def whole(config, tmp_path):
    """The weights of the uninterrupted run."""
    call(TRAIN, config, "name=whole")
    return weights(tmp_path / "whole")


def kill_and_resume(config, tmp_path, name, moment, *overrides):
    """Train, kill -9 after `moment` seconds, resume; returns the final weights."""
    process = command(TRAIN, config, f"name={name}", *overrides)
    time.sleep(moment)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    call(TRAIN, config, f"name={name}", "--resume", *overrides)
    return weights(tmp_path / name)


@pytest.mark.parametrize("seed", [0, 1, 2, *(pytest.param(s, marks=pytest.mark.slow) for s in range(3, 20))])
def test_killed_runs_resume_bit_for_bit(config, tmp_path, seed):
    """The moments spread over start-up, steps, saving and evaluation; each run is compared with a whole one."""
    if not (config.parent / "whole").exists():
        call(TRAIN, config, "name=whole")
    moment = random.Random(seed).uniform(3, 9)
    workers = f"data.workers={seed % 3}"  # whatever the number of loader processes
    assert_equal(weights(tmp_path / "whole"), kill_and_resume(config, tmp_path, "killed", moment, workers))
    steps = [json.loads(line) for line in (tmp_path / "killed" / "log.jsonl").read_text().splitlines()]
    assert [record["step"] for record in steps if record["kind"] == "train"] == list(range(1, 21))


def test_sigterm_saves_and_resumes_bit_for_bit(config, tmp_path, whole):
    process = command(TRAIN, config, "name=stopped", "train.save_every=1000", "train.steps=20")
    log = tmp_path / "stopped" / "log.jsonl"
    deadline = time.monotonic() + 600
    while not (log.exists() and log.read_text().count("\n") >= 3) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.terminate()
    out, _ = process.communicate(timeout=600)
    assert process.returncode in (0, 143), out  # 0: it ended before the signal came
    call(TRAIN, config, "name=stopped", "train.save_every=1000", "--resume")
    assert_equal(whole, weights(tmp_path / "stopped"))


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_refused_starts_leave_a_run_as_it_was(config, tmp_path):
    call(TRAIN, config, "name=run", "train.steps=3")
    before = contents(tmp_path / "run")
    other_counts = "data.streams.labeled.split=val"
    refusals = {
        "holds an earlier run": [other_counts],
        "trained on|tensors differ": ["--resume", other_counts, "model.options.channels=8"],
        "its optimisers are": ["--resume", other_counts, "optim.name=adamw"],
        "method.heads": ["--resume", other_counts, "method.heads.decode.loss=none"],
    }
    for words, overrides in refusals.items():
        assert re.search(words, call(TRAIN, config, "name=run", *overrides, expect=2)), words
    for checkpoint in (tmp_path / "run" / "checkpoints").glob("step_*"):
        (checkpoint / "state.pt").write_bytes(b"torn")
    damaged = contents(tmp_path / "run")
    assert "all are damaged" in call(TRAIN, config, "name=run", "--resume", other_counts, expect=2)
    assert contents(tmp_path / "run") == damaged and damaged.keys() == before.keys()
    assert [path for path in damaged if damaged[path] != before[path] and path.name != "state.pt"] == []


def test_a_checkpoint_evaluates_as_it_did_in_training(config, tmp_path, whole):
    assert "whole" in (tmp_path / "whole" / "report.html").read_text()
    out = call("fully_sup/test.py", config, tmp_path / "whole" / "checkpoints" / "best", "--save-predictions",
               tmp_path / "predictions", "name=whole")  # fmt: skip
    result = json.loads(next((tmp_path / "whole" / "test").glob("*/evaluation.json")).read_text())
    assert result["miou"] == json.loads((tmp_path / "whole" / "evaluation.json").read_text())["miou"]
    assert len(list((tmp_path / "predictions").glob("*.png"))) == 5
    assert "mIoU(tail)" in out and "nan_mean" in out


@pytest.mark.parametrize(
    "overrides, words",
    [
        (["train.stps=3"], "unknown key 'stps'; did you mean 'steps'"),
        (["data.root=/nowhere"], "/nowhere"),
        (["model.num_classes=11"], "num_classes is 11"),
        (["remedies.logits.preset=papr"], "remedies.logits.preset: unknown 'papr'; did you mean 'paper'"),
        (["output=/proc/none"], "/proc/none"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(config, overrides, words):
    out = call(TRAIN, config, *overrides, expect=2)
    lines = [line for line in out.splitlines() if line.startswith("error:")]
    assert len(lines) == 1 and words in lines[0], out
    assert "Traceback" not in out


def test_wrong_class_count_in_a_checkpoint(config, tmp_path, whole):
    out = call("fully_sup/test.py", config, tmp_path / "whole" / "checkpoints" / "last", "model.num_classes=16",
               "data.dataset=cityscapes16", expect=2)  # fmt: skip
    assert "trained on 19 classes, the model has 16" in out


def test_compiled_training_runs(config):
    if not any(shutil.which(name) for name in ("cc", "gcc", "clang")):
        pytest.skip("no C compiler: Inductor cannot build CPU kernels")
    out = call(TRAIN, config, "name=compiled", "train.compile=true", "train.steps=2", "eval.max_images=1")
    assert "2/2" in out
