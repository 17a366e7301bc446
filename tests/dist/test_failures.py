"""However a run fails, it ends: soon, with an exit code, in one line, and with all its processes."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LIMIT = 600  # seconds: below the half hour that a rank waits for another, and far above what a busy machine needs
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node")
LINES = {  # fault → what its line says; a dead worker is noticed in one of two ways
    "step": r"KeyError: 'absent' \(faulty.py:\d+\); this is a bug",
    "step memory": "out of memory: 9 GiB; lower batch_size",
    "worker": r"KeyError: 'absent' \(in a loader process\); this is a bug",
    "worker memory": "out of memory: 9 GiB; lower batch_size",
    "worker killed": r"DataLoader worker .*(killed by signal: Killed|exited unexpectedly)",
    "worker segfault": r"DataLoader worker .*(killed by signal: Segmentation fault|exited unexpectedly)",
    "worker unsendable": r"cannot hand over its batch \(unable to allocate shared memory",
    "evaluation": r"KeyError: 'absent' \(in a loader process\); this is a bug",
    "evaluation killed": r"DataLoader worker .*(killed by signal: Killed|exited unexpectedly)",
}
QUICK = [("step", 1), ("worker", 1), ("worker killed", 1), ("worker unsendable", 1), ("evaluation killed", 1)]
QUICK += [("worker killed", 2)]
SLOW = [case for fault in LINES for case in ((fault, 1), (fault, 2)) if case not in QUICK]


@pytest.fixture
def start(tmp_path):
    """Start a run that FAULT befalls; what is left of it after the test is killed."""

    def run(fault, ranks=1, **settings):
        launcher = (*TORCHRUN, str(ranks)) if ranks > 1 else ()
        words = [sys.executable, *launcher, "-m", "tests.dist.faulty", fault, str(tmp_path)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "LTS_MARK": str(tmp_path), **settings}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        return subprocess.Popen(words, cwd=ROOT, env=environment, start_new_session=True, **pipes)

    yield run
    for process in processes(tmp_path):
        os.kill(process, signal.SIGKILL)


def processes(folder):
    """Those of the run in `folder`, known by their environment."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if f"LTS_MARK={folder}".encode() in (entry / "environ").read_bytes():
                found.append(int(entry.name))
        except OSError:
            pass  # ended, or not ours
    return found


def all_end(folder, seconds=LIMIT):
    deadline = time.monotonic() + seconds
    while processes(folder) and time.monotonic() < deadline:
        time.sleep(0.1)
    return not processes(folder)


def wait_for(path, process, seconds=LIMIT):
    deadline = time.monotonic() + seconds
    while not path.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    assert path.exists(), process.communicate(timeout=LIMIT)


@pytest.mark.parametrize(("fault", "ranks"), [*QUICK, *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW)])
def test_a_fault_ends_the_run_in_one_line(start, tmp_path, fault, ranks):
    process = start(fault, ranks)
    out, err = process.communicate(timeout=LIMIT)
    took = time.time() - float((tmp_path / "fault").read_text())
    said = [line.lstrip("\0") for line in err.splitlines()]  # torch ends its word on a segfault with a zero byte
    lines = [line for line in said if line.startswith("error: ") and "lost another rank" not in line]
    assert process.returncode not in (0, None) and took < LIMIT
    assert len(lines) == 1 and re.search(LINES[fault], lines[0]), err
    assert all_end(tmp_path)
    if ranks == 1:
        assert "Traceback" not in err and process.returncode in (1, 2)


def test_an_error_that_nobody_catches_ends_the_workers_too(start, tmp_path):
    process = start("step", LTS_BARE="1")
    _, err = process.communicate(timeout=LIMIT)
    assert process.returncode == 1 and err.strip().endswith("KeyError: 'absent'")
    assert time.time() - float((tmp_path / "fault").read_text()) < LIMIT and all_end(tmp_path)


@pytest.mark.parametrize("kind", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_a_signal_to_all_processes_saves_and_ends(start, tmp_path, kind):
    """As a terminal sends Ctrl-C, and a cluster SIGTERM."""
    process = start("none")
    wait_for(tmp_path / "fault", process)
    os.killpg(process.pid, kind)
    out, err = process.communicate(timeout=LIMIT)
    assert process.returncode == 128 + kind and "Traceback" not in err, err
    assert f"stopped by {kind.name}" in out and (tmp_path / "faulty" / "checkpoints" / "last").is_dir()
    assert all_end(tmp_path)


@pytest.mark.parametrize("fault", ["step", pytest.param("worker killed", marks=pytest.mark.slow)])
def test_a_fault_ends_the_ranks_of_the_launcher(start, tmp_path, fault):
    process = start(fault, LTS_LAUNCH="1")
    _, err = process.communicate(timeout=LIMIT)
    lines = [line for line in err.splitlines() if line.startswith("error: ") and "lost another rank" not in line]
    assert process.returncode == 1 and time.time() - float((tmp_path / "fault").read_text()) < LIMIT
    assert len(lines) == 1 and re.search(LINES[fault], lines[0]) and "Traceback" not in err, err
    assert all_end(tmp_path)


@pytest.mark.parametrize("moment", [pytest.param("start", marks=pytest.mark.slow), "loop"])
def test_ctrl_c_ends_the_ranks_of_the_launcher_quietly(start, tmp_path, moment):
    process = start("none", LTS_LAUNCH="1")
    if moment == "loop":
        wait_for(tmp_path / "fault", process)
    else:
        deadline = time.monotonic() + LIMIT
        while len(processes(tmp_path)) < 3 and time.monotonic() < deadline:
            time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=LIMIT)
    assert process.returncode == 130 and "Traceback" not in err and "error" not in err, err
    assert (tmp_path / "faulty" / "checkpoints" / "last").is_dir() == (moment == "loop")
    assert all_end(tmp_path)


@pytest.mark.parametrize("fault", [pytest.param("none", marks=pytest.mark.slow), "worker stuck"])
def test_workers_end_when_the_main_process_is_killed(start, tmp_path, fault):
    process = start(fault)
    wait_for(tmp_path / "fault", process)
    process.kill()
    process.wait(timeout=LIMIT)
    assert all_end(tmp_path)


def test_ctrl_c_outside_of_the_loop_is_quiet(start, tmp_path):
    """In a validation whose worker never answers."""
    process = start("evaluation stuck")
    wait_for(tmp_path / "fault", process)
    os.killpg(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=LIMIT)
    assert process.returncode == 130 and (out, err) == ("", "")
    assert all_end(tmp_path)
