"""Many runs from one file: what is planned, run side by side, skipped, refused, stopped and gone on with."""

import fcntl
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import yaml

from common.config import ConfigError, load_config
from common.jobs import plan, pool, run_all, state_of, table
from common.jobs.plan import ROOT
from common.jobs.state import mark_of
from scripts import run_many

pytestmark = pytest.mark.usefixtures("unchanged")

# Notes its words; ends as its first word says. `slow` waits for SIGTERM, saves, and goes on from there the next time.
COMMAND = """#!/bin/sh
echo "$OMP_NUM_THREADS $*" >>calls
case $1 in
    fails) echo "error: no luck" >&2; exit 4 ;;
    slow)
        [ -e saved ] && exit 0
        trap 'touch saved; kill $!; exit 143' TERM
        echo $$ >ready; sleep 600 & wait ;;
    deaf) trap '' TERM; echo $$ >ready; sleep 600 ;;
esac
"""


@pytest.fixture
def jobs(tmp_path):
    """Write a file of jobs around a small command; returns its path. `changes`: keys that differ."""
    (tmp_path / "command").write_text(COMMAND)

    def write(runs, **changes) -> Path:
        tree = {"folder": str(tmp_path), "command": "sh command {name} {settings}", "output": "out", "runs": runs}
        path = tmp_path / "jobs.yaml"
        path.write_text(yaml.safe_dump(tree | changes, sort_keys=False))
        return path

    return write


def calls(folder: Path) -> list[str]:
    path = folder / "calls"
    lines = path.read_text().splitlines() if path.exists() else []
    path.unlink(missing_ok=True)
    return lines


def when(path: Path, act) -> threading.Thread:
    """Call `act` in another thread once `path` holds something."""

    def wait():
        until = time.monotonic() + 600
        while not (path.exists() and path.read_text()) and time.monotonic() < until:
            time.sleep(0.01)
        act()

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    return thread


# The plan -----------------------------------------------------------------------------------------------------------


def test_settings_seeds_and_words(jobs):
    path = jobs(
        {"a": ["x=1"], "b": {"settings": ["x=2"], "config": "other.yaml"}},
        command="python train.py {config} --resume {device} {settings}", config="{name}.yaml", settings=["y=0"],
    )  # fmt: skip
    runs = plan(path, seeds=[3, 5], device="cuda:1", threads=2)
    assert [run.label for run in runs] == ["a_3", "b_3", "a_5", "b_5"], "all runs of a seed before the next"
    own = ["y=0", "x=2", "seed=5", "output=out", "name=b_5", "train.threads=2"]
    assert list(runs[3].command) == [sys.executable, "train.py", "other.yaml", "--resume", "--device", "cuda:1", *own]
    assert runs[0].command[2] == "a.yaml" and runs[0].environment == {"OMP_NUM_THREADS": "2"}
    assert [run.label for run in plan(path, only=["b"])] == ["b_0"]


@pytest.mark.parametrize("change, message", [
    ({"command": "sh {nmae}"}, "unknown words in braces"),
    ({"command": "sh 'open"}, "No closing quotation"),
    ({"command": ""}, "is empty"),
    ({"label": "all"}, "two runs are out/all"),
    ({"runs": {}}, "names no run"),
    ({"runs": {"a": {"afterr": "b"}}}, "unknown key 'afterr'"),
    ({"runs": {"a": {"after": "b"}, "b": []}}, "'b' is no run above this one"),
    ({"seeds": [-1]}, "seeds"),
    ({"thread": 1}, "unknown key 'thread'"),
])  # fmt: skip
def test_mistakes_in_the_file_are_one_line(jobs, change, message):
    path = jobs(**{"runs": {"a": [], "b": []}} | change)
    with pytest.raises(ConfigError) as error:
        plan(path)
    assert message in str(error.value) and "\n" not in str(error.value) and str(path) in str(error.value)


def test_what_has_no_place_is_refused(jobs):
    path = jobs({"a": []})
    with pytest.raises(ConfigError, match="--device cuda has no place"):
        plan(path, device="cuda")
    with pytest.raises(ConfigError, match="has no run 'aa'.*'a'"):
        plan(path, only=["aa"])


@pytest.mark.parametrize("path", sorted((ROOT / "scripts" / "jobs").glob("*.yaml")), ids=lambda path: path.stem)
def test_the_files_of_the_project_name_configs_that_load(path):
    for run in plan(path, device="cpu"):
        words = [word for word in run.command if word.endswith((".yaml", ".json"))]
        if words:
            load_config(run.cwd / words[0], [w for w in run.command if "=" in w])
        assert (run.cwd / run.command[1]).is_file() or run.command[1] == "-m"


# Running ------------------------------------------------------------------------------------------------------------


def test_each_run_runs_once(jobs, tmp_path):
    runs = plan(jobs({"a": [], "fails": [], "b": []}, seeds=[0, 1]), threads=3)
    ended = run_all(runs, at_once=2)
    assert [len(part) for part in (ended.done, ended.failed, ended.unfinished)] == [4, 2, 0]
    words = calls(tmp_path)
    assert len(words) == 6 and "3 b seed=1 output=out name=b_1 train.threads=3" in words
    assert "out/fails_0" in table(runs) and "exit code 4: error: no luck" in table(runs)

    assert len(run_all(runs, at_once=2).failed) == 2, "failed runs are tried again, finished ones are not"
    assert sorted(line.split()[1] for line in calls(tmp_path)) == ["fails", "fails"]


def test_other_threads_and_devices_are_the_same_run(jobs, tmp_path):
    path = jobs({"a": []}, command="sh command {name} {device} {settings}")
    run_all(plan(path))
    assert calls(tmp_path) and run_all(plan(path, threads=4, device="cpu")).done and not calls(tmp_path)


def test_a_finished_run_of_another_command_is_refused_before_anything_runs(jobs, tmp_path):
    run_all(plan(jobs({"a": ["lr=1"]})))
    calls(tmp_path)
    other = plan(jobs({"b": [], "a": ["lr=2"]}))
    with pytest.raises(ValueError, match="out/a_0: is finished as another run: command .*lr=1.*lr=2.*remove that"):
        run_all(other)
    assert not calls(tmp_path)


def test_a_finished_run_of_another_config_or_list_is_refused(jobs, tmp_path, config):
    names = tmp_path / "names.txt"
    names.write_text("a\n")
    setting = f"data.streams.labeled.list={names}"
    path = jobs({"a": [setting]}, command="true {config} {settings}", config=str(config))
    run_all(plan(path))
    assert run_all(plan(path)).done

    names.write_text("a\nb\n")
    with pytest.raises(ValueError, match=r"another run: the file of data\.streams\.labeled\.list;"):
        run_all(plan(path))
    names.write_text("a\n")
    config.write_text(config.read_text().replace("channels: 16", "channels: 32"))
    with pytest.raises(ValueError, match=r"model\.options\.channels \(was 16, is 32\)"):
        run_all(plan(path))


@pytest.mark.parametrize("label", ["{name}_{seed}", "{name}/{seed}", "{seed}/{name}"])
def test_a_run_waits_for_another(label, jobs, tmp_path):
    runs = {"a": {"command": "sh -c 'sleep 0.3; sh command a'"}, "b": {"after": "a"}, "c": []}
    run_all(plan(jobs(runs, label=label, seeds=[1])), at_once=3)
    assert [line.split()[1] for line in calls(tmp_path)] == ["c", "a", "b"]

    runs = {"fails": [], "b2": {"after": "fails"}}
    ended = run_all(plan(jobs(runs, label=label, seeds=[1])), at_once=3)
    assert [run.name for run in ended.failed] == ["fails"] and [run.name for run in ended.unfinished] == ["b2"]


def test_preparation_comes_once_and_its_failure_is_an_error(jobs, tmp_path):
    run_all(plan(jobs({"a": [], "b": []}, prepare=["sh command first"])), at_once=1)
    assert [line.split()[-1] for line in calls(tmp_path)][0] == "first"
    with pytest.raises(ValueError, match="sh command fails: ended with exit code 4"):
        run_all(plan(jobs({"c": []}, prepare=["sh command fails"])))


# Stopping -----------------------------------------------------------------------------------------------------------


def test_time_is_up_and_the_next_call_goes_on(jobs, tmp_path):
    runs = plan(jobs({"slow": [], "b": []}))
    ended = run_all(runs, at_once=1, minutes=0.01)
    assert [run.name for run in ended.unfinished] == ["slow", "b"] and not ended.signal
    assert state_of(runs[0]) == "stopped" and "goes on" in table(runs)
    with pytest.raises(ValueError, match="was begun as another run"):
        run_all(plan(jobs({"slow": ["other=1"]})))

    (tmp_path / "saved").touch()  # in case the time was up before the command had begun
    ended = run_all(runs, at_once=1)
    assert [run.name for run in ended.done] == ["slow", "b"]


def test_a_signal_stops_all(jobs, tmp_path):
    runs = plan(jobs({"slow": [], "b": []}))
    thread = when(tmp_path / "ready", lambda: os.kill(os.getpid(), signal.SIGTERM))
    ended = run_all(runs, at_once=1)
    thread.join()
    assert ended.signal == signal.SIGTERM and (tmp_path / "saved").exists() and len(ended.unfinished) == 2
    assert run_many.exit_code(ended) == 143


def test_who_does_not_listen_is_killed(jobs, tmp_path, monkeypatch):
    monkeypatch.setattr(pool, "PATIENCE", 0.2)
    runs = plan(jobs({"deaf": []}))
    thread = when(tmp_path / "ready", lambda: os.kill(os.getpid(), signal.SIGTERM))
    assert run_all(runs).unfinished == runs
    thread.join()
    assert mark_of(runs[0])["code"] == -signal.SIGKILL


def test_two_calls_do_not_run_the_same(jobs, tmp_path):
    (run,) = plan(jobs({"a": []}))
    run.folder.mkdir(parents=True)
    with (run.folder / "job.log").open("a") as log:
        fcntl.flock(log, fcntl.LOCK_EX)
        assert run_all([run]).unfinished == [run] and not calls(tmp_path)
    assert run_all([run]).done == [run]


def test_a_killed_call_leaves_runs_that_go_on(jobs, tmp_path):
    """The command outlives it, keeps its run locked, and is found unfinished afterwards."""
    path = jobs({"slow": []})
    program = [sys.executable, str(ROOT / "scripts" / "run_many.py"), str(path)]
    process = subprocess.Popen(program, env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=subprocess.DEVNULL)
    when(tmp_path / "ready", process.kill).join()
    process.wait()
    (run,) = plan(path)
    assert state_of(run) == "running" and run_all([run]).unfinished == [run]

    os.kill(int((tmp_path / "ready").read_text()), signal.SIGTERM)
    until = time.monotonic() + 600
    while not run_all([run]).done and time.monotonic() < until:
        time.sleep(0.05)
    assert state_of(run) == "done"


# The program --------------------------------------------------------------------------------------------------------


def test_the_program(jobs, tmp_path, monkeypatch, capsys, fails):
    path = jobs({"a": [], "fails": []})

    def call(*words) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["run_many.py", str(path), *words])
        return run_many.main(), capsys.readouterr().out

    code, out = call("--dry-run", "--seeds", "0", "7")
    assert code == 0 and out.count("new ") == 4 and "sh command a seed=7" in out and not calls(tmp_path)
    assert call("--only", "a", "--at-once", "1")[0] == 0
    code, out = call()
    assert code == 1 and "done    out/a_0" in out and "failed  out/fails_0" in out
    assert "exit code 4: error: no luck" in out
    assert call("--only", "a", "--minutes", "1e-9", "--seeds", "1")[0] == run_many.UNFINISHED
    assert "--at-once: 0" in fails(run_many.main, path, "--at-once", "0")


def test_a_real_training(config, tmp_path):
    path = tmp_path / "jobs.yaml"
    tree = {
        "command": "python fully_sup/train.py {config} --resume {device} {settings}",
        "config": str(config),
        "output": str(tmp_path / "out"),
        "settings": ["train.steps=2", "eval.workers=0", "eval.panels=0"],
        "runs": {"focal": ["remedies.focus.name=focal"]},
    }
    path.write_text(yaml.safe_dump(tree))
    ended = run_all(plan(path, device="cpu"), at_once=1)
    assert [run.label for run in ended.done] == ["focal_0"], table(plan(path))
    assert (tmp_path / "out/focal_0/evaluation.json").is_file()
