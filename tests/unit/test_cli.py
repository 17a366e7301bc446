"""What entry points share: which messages reach the terminal, and from which rank."""

import logging

import pytest

from common import cli

pytestmark = pytest.mark.usefixtures("unchanged")


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
