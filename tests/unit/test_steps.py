"""Steps of a pipeline: skipped where they would read the same, made again or refused where they would not."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest

from common import steps
from common.files import seal
from common.steps import Step, differences, digest_of

ROOT = Path(__file__).parents[2]
TREE = {"model": {"name": "upernet", "num_classes": 2}, "output": "runs", "method": {"teacher": "weights.pt", "a": 1}}
NOTES = """
import pathlib, sys
what, folder = sys.argv[1:3]
made = pathlib.Path(folder) / what
made.mkdir(parents=True, exist_ok=True)
(made / "last").write_text(" ".join(sys.argv[3:]))
with open("calls", "a") as file:
    print(what, file=file)
"""


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """A folder with a config, the weights that it names, and a program that notes each call."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "plain.json").write_text(json.dumps(TREE))
    (tmp_path / "weights.pt").write_text("first")
    (tmp_path / "program.py").write_text(NOTES)
    (tmp_path / "calls").touch()
    return tmp_path


def step(makes: str, *words: str, folder: str = "runs/plain") -> Step:
    return Step(makes, [sys.executable, "program.py", makes, folder, "plain.json", *words])


def calls() -> list[str]:
    return Path("calls").read_text().split()


def pipeline(*words: str, changed: str = "") -> list[str]:
    """What was made by a training and a tool after it."""
    before = len(calls())
    for makes in ("checkpoints", "labels"):
        assert step(makes, *words).run(changed) == 0
    return calls()[before:]


def test_the_same_is_made_once(here):
    assert pipeline("seed=1") == ["checkpoints", "labels"]
    assert pipeline("seed=1") == []
    assert not list(here.glob("runs/plain/begun*"))


def test_settings_that_change_no_result_change_nothing(here):
    pipeline()
    assert pipeline("train.log_every=3", "data.workers=0", "eval.panels=1") == []
    shutil.move("runs", "elsewhere")
    assert pipeline("output=elsewhere") == []


def test_keys_of_later_versions_are_what_earlier_ones_did():
    now = {"seed": 1, "eval.windows": "shifted"}
    assert differences({"seed": 1}, now) == []
    assert differences({"seed": 1}, {**now, "eval.windows": "cut"}) == ["eval.windows (was 'shifted', is 'cut')"]
    assert differences({"$THREADS": "1"}, {"$THREADS": "1"}) == [], "of commands without a config"


@pytest.mark.parametrize("change", ["seed", "file"])
def test_a_training_that_would_read_something_else_is_refused(here, change):
    pipeline()
    words = ["seed=7"] if change == "seed" else []
    if change == "file":
        Path("weights.pt").write_text("second")
    with pytest.raises(ValueError) as error:
        pipeline(*words)
    line = str(error.value)
    assert line.startswith("runs/plain: trained from something else: ") and "\n" not in line
    assert ("seed (was 0, is 7)" if change == "seed" else "the file of method.teacher") in line
    assert "CHANGED=keep" in line and "CHANGED=anew" in line

    assert pipeline(*words, changed="keep") == []
    assert pipeline(*words) == []


def test_a_training_set_aside_takes_its_tools_with_it(here):
    pipeline()
    assert pipeline("seed=7", changed="anew") == ["checkpoints", "labels"]
    assert pipeline("seed=8", changed="anew") == ["checkpoints", "labels"]
    assert sorted(path.name for path in here.glob("runs/*")) == ["plain", "plain.old-1", "plain.old-2"]
    assert pipeline("seed=8", changed="anew") == []


def test_a_tool_runs_again_by_itself(here, capsys):
    pipeline()
    (here / "runs/plain/checkpoints/last").write_text("trained on")
    assert pipeline() == ["labels"] and pipeline() == []
    assert "labels: made again; changed: the file of last" in capsys.readouterr().out
    assert step("labels", "--soft").run("") == 0 and calls()[-1] == "labels"
    shutil.rmtree("runs/plain/labels")
    assert step("labels", "--soft").run("") == 0 and calls().count("labels") == 4


def test_runs_without_a_record(here):
    """Of earlier versions, or trained without the pipeline: a mark that is empty, or none."""
    for mark in (None, "done"):
        shutil.rmtree("runs", ignore_errors=True)
        for name in ("checkpoints", "labels"):
            (here / "runs/plain" / name).mkdir(parents=True)
        if mark:
            (here / "runs/plain" / mark).touch()
        with pytest.raises(ValueError, match="holds a training that did not record what it read"):
            pipeline()
        expected = [] if mark else ["checkpoints"]  # without the mark it may not have ended, so it continues
        assert pipeline(changed="keep") == expected
        assert pipeline() == []


def test_a_step_that_failed_or_was_killed_runs_again(here):
    (here / "program.py").write_text("raise SystemExit(3)")
    assert step("checkpoints").run("") == 3
    (here / "program.py").write_text(NOTES)
    assert pipeline() == ["checkpoints", "labels"]

    os.replace("runs/plain/done", "runs/plain/begun")  # as a kill between the training's end and the mark leaves it
    assert pipeline() == ["checkpoints"]
    os.replace("runs/plain/done", "runs/plain/begun")
    with pytest.raises(ValueError, match="trained from something else"):
        pipeline("seed=7")


def test_a_command_that_does_not_make_what_it_should(here):
    with pytest.raises(ValueError, match="runs/plain/labels: not made by"):
        step("labels", folder="runs/other").run("")
    assert not (here / "runs/plain/done_labels").exists()


@pytest.mark.parametrize(
    "words, message",
    [
        ([], "usage: python -m common.steps MAKES COMMAND"),
        (["labels", "true"], "true: names 0 config files, not one"),
        (["labels", "true", "a.json", "b.yaml"], "names 2 config files"),
        (["labels", "no-such-program", "plain.json"], "no-such-program: cannot be run"),
    ],
)
def test_wrong_words(here, fails, words, message):
    assert message in fails(steps.main, *words)


def test_changed_is_keep_or_anew(here):
    with pytest.raises(ValueError, match="CHANGED=yes: give keep or anew"):
        step("labels").run("yes")


# Digests --------------------------------------------------------------------------------------------------------------


def test_digests(tmp_path):
    checkpoint, labels = tmp_path / "step_1", tmp_path / "labels"
    checkpoint.mkdir(), labels.mkdir()
    assert digest_of(tmp_path / "none") is None and digest_of(labels) is None

    (checkpoint / "model.safetensors").write_bytes(b"a")
    seal(checkpoint, {"step": 1})
    (tmp_path / "last").symlink_to("step_1")
    (tmp_path / "best").write_text("link: step_1\n")
    first = digest_of(checkpoint)
    assert first == digest_of(tmp_path / "last") == digest_of(tmp_path / "best")
    (tmp_path / "run").mkdir()
    (tmp_path / "run/evaluation.json").write_text("{}")
    (tmp_path / "run/checkpoints").mkdir()
    (tmp_path / "run/checkpoints/last").symlink_to(checkpoint)
    assert digest_of(tmp_path / "run") == first
    (checkpoint / "model.safetensors").write_bytes(b"b")
    seal(checkpoint, {"step": 1})
    assert digest_of(checkpoint) != first

    (labels / "made_from.json").write_text("{}")
    known = digest_of(labels)
    (labels / "x.png").write_bytes(b"x")
    assert digest_of(labels) == known
    (labels / "made_from.json").write_text('{"flip": true}')
    assert digest_of(labels) != known


def test_files_of_a_template_are_their_folder(here):
    (here / "labels").mkdir()
    (here / "labels/made_from.json").write_text("{}")
    path = here / "plain.json"
    path.write_text(json.dumps(TREE | {"method": {"pseudo": "labels/{name}.png", "free": "{name}.png"}}))
    reads = step("checkpoints").reads
    assert reads["method.pseudo"] == digest_of(here / "labels") and reads["method.free"] == "{name}.png"


# Signals --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 7), (signal.SIGTERM, 143)])
def test_the_command_decides_what_a_signal_means(here, number, code):
    """An interrupt reaches both, as from a keyboard; the step waits for the command's own end."""
    (here / "program.py").write_text(
        "import sys, time\n"
        "try:\n    open('calls', 'w').write('x')\n    time.sleep(60)\n"
        "except KeyboardInterrupt:\n    time.sleep(0.3)\n    sys.exit(7)\n"
    )
    words = [sys.executable, "-m", "common.steps", "labels", sys.executable, "program.py", "plain.json"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    # tests that run in the background of a shell inherit that interrupts are ignored
    heeding = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    process = subprocess.Popen(words, cwd=here, env=environment, start_new_session=True, preexec_fn=heeding)
    try:
        while not calls():
            time.sleep(0.02)
        time.sleep(0.1)
        if number == signal.SIGINT:
            os.killpg(process.pid, number)
        else:
            process.send_signal(number)
        assert process.wait(timeout=60) == code
    finally:
        process.kill()
