"""What entry points share: which messages reach the terminal, and from which rank."""

import logging
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from PIL import Image

from common import cli, console

pytestmark = pytest.mark.usefixtures("unchanged")
ROOT = Path(__file__).resolve().parents[2]


def talk():
    logging.getLogger("common.models.somewhere").info("w.pth: unused: %s", "fc.weight")
    logging.getLogger("common.models.somewhere").debug("a detail")
    logging.getLogger("elsewhere").info("another library")


@pytest.mark.parametrize("rank", [None, "0", "3"])
def test_the_projects_log_is_shown_once_on_rank_0(monkeypatch, capsys, rank):
    monkeypatch.delenv("RANK", raising=False)
    if rank is not None:
        monkeypatch.setenv("RANK", rank)
    for _ in range(2):
        with pytest.raises(SystemExit) as end:
            cli.run(talk)
        assert end.value.code == 0
        assert capsys.readouterr() == ("", "" if rank == "3" else "w.pth: unused: fc.weight\n")


def test_the_log_is_as_before_after_an_error(capsys):
    def fail():
        raise ValueError("key: 3 is\nno value")

    with pytest.raises(SystemExit) as end:
        cli.run(fail)
    assert end.value.code == 2 and capsys.readouterr().err == "error: key: 3 is no value\n"
    logger = logging.getLogger("common")
    assert not logger.handlers and logger.level == logging.NOTSET


def run(main, capsys):
    """Exit code and what reached stderr."""
    with pytest.raises(SystemExit) as end:
        cli.run(main)
    return end.value.code, capsys.readouterr().err


def raiser(error):
    def main():
        raise error

    return main


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (ValueError("crop: [0, 0]"), 2, "error: crop: [0, 0]\n"),
        (OSError(28, "No space left on device"), 2, "error: [Errno 28] No space left on device\n"),
        (Image.DecompressionBombError("Image size (2 pixels)"), 2, "error: Image size (2 pixels)\n"),
        (MemoryError(), 1, "error: out of memory: no more to be had; lower batch_size"),
        (torch.OutOfMemoryError("CUDA: 2 GiB. If reserved but"), 1, "error: out of memory: CUDA: 2 GiB.;"),
        (RuntimeError("DefaultCPUAllocator: can't allocate 9 bytes"), 1, "error: out of memory: DefaultCPU"),
        (dist.DistBackendError("NCCL\ncommunicator"), 1, "error: rank 0: lost another rank"),
        (KeyError("x"), 1, "error: KeyError: 'x' (test_cli.py:"),
        (RuntimeError("wrong\nshape"), 1, "error: RuntimeError: wrong shape (test_cli.py:"),
        (RecursionError("deep"), 1, "error: RecursionError: deep (test_cli.py:"),
    ],
)
def test_every_error_is_one_line(capsys, monkeypatch, error, code, line):
    monkeypatch.delenv("LTS_TRACEBACK", raising=False)
    got, text = run(raiser(error), capsys)
    assert got == code and text.startswith(line) and text.count("\n") == 1
    assert ("this is a bug" in text) == (type(error) in (KeyError, RecursionError) or "shape" in text)


def test_the_traceback_is_shown_on_request(capsys, monkeypatch):
    monkeypatch.setenv("LTS_TRACEBACK", "1")
    code, text = run(raiser(KeyError("x")), capsys)
    assert code == 1 and text.startswith("Traceback") and text.splitlines()[-1].startswith("error: KeyError: 'x'")


def test_an_interrupted_program_ends_quietly(capsys):
    assert run(raiser(KeyboardInterrupt()), capsys) == (130, "")


def test_a_program_goes_on_without_its_reader(tmp_path):
    """`… | head -1`: what follows the first line is swallowed, the work is done, and nothing is said."""
    code = (
        "import pathlib, sys\nfrom common import cli\n"
        "def main():\n"
        "    for i in range(100000): print(i)\n"
        "    print('end', flush=True)\n"
        "    pathlib.Path(sys.argv[1]).touch()\n"
        "cli.run(main)"
    )
    words = [sys.executable, "-c", code, str(tmp_path / "done")]
    program = subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert program.stdout.readline() == b"0\n"
    program.stdout.close()
    assert program.stderr.read() == b"" and program.wait(60) == 0 and (tmp_path / "done").exists()


def test_quiet_leaves_results_and_warnings(monkeypatch, capsys):
    def main():
        console.say("step 3")
        logging.getLogger("common.x").info("a notice")
        warnings.warn("mind this", stacklevel=1)
        print("mIoU 50")

    monkeypatch.setenv("LTS_QUIET", "1")
    with pytest.raises(SystemExit):
        cli.run(main)
    assert capsys.readouterr() == ("mIoU 50\n", "warning: mind this\n")


def test_bars_are_for_terminals(monkeypatch, capsys):
    """Never in a log file; on a terminal on the first rank, unless it is to be quiet."""
    assert list(console.bar(range(3), what="images")) == [0, 1, 2] and capsys.readouterr().err == ""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    list(console.bar(range(3), what="images"))
    assert "images" in capsys.readouterr().err
    for name, value in (("LTS_QUIET", "1"), ("RANK", "1")):
        with monkeypatch.context() as patch:
            patch.setenv(name, value)
            patch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
            list(console.bar(range(3), what="images"))
        assert capsys.readouterr().err == ""
