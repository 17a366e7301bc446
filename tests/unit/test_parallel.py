"""Jobs in processes: in order, with a bounded number of results that wait, and errors that end it."""

import time
from pathlib import Path

import pytest

from common.data.loading import AHEAD, CHUNK, parallel


def twice(number: int) -> int:
    return 2 * number


def touch(path: Path) -> Path:
    path.touch()
    return path


def fail(number: int) -> int:
    if number == 11:
        raise ValueError("11 is damaged")
    return number


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("count", [0, 1, CHUNK, 9 * CHUNK + 3])
def test_results_come_in_order(workers, count):
    assert list(parallel(twice, range(count), workers)) == [2 * k for k in range(count)]


def test_results_wait_for_a_slow_taker_but_not_all(tmp_path):
    """They may be images: beyond some chunks a process, nothing is made before it is asked for."""
    jobs = [tmp_path / f"{k:03d}" for k in range(20 * CHUNK)]
    done = parallel(touch, jobs, 2)
    next(done)
    time.sleep(1.0)
    most = (2 * AHEAD + 1) * CHUNK
    assert len(list(tmp_path.iterdir())) <= most < len(jobs)
    assert len(list(done)) == len(jobs) - 1 and len(list(tmp_path.iterdir())) == len(jobs)


@pytest.mark.parametrize("workers", [0, 2])
def test_the_first_error_ends_it(workers):
    found = []
    with pytest.raises(ValueError, match="11 is damaged"):
        found += parallel(fail, range(100), workers)
