"""Loader processes: the one way from a data set's samples to a loop, and how its processes end.

A worker that fails says so in one line, and none outlives the main process:

- an error in a sample or in `collate` travels as a value and is raised where the loop asks for the batch;
- so does the error of a batch that cannot be handed over (full /dev/shm), which would otherwise be waited for in vain;
- a signal to the whole process group is the main process's affair: it saves and ends its workers itself. Workers ignore
  SIGINT, and SIGTERM unless the main process sent it; each one watches whether the main process is still there.
"""

import itertools
import multiprocessing
import os
import pickle
import signal
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from multiprocessing import queues
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

Collate = Callable[[list[Any]], Any]

# Python 3.14 starts processes by a fork server, which would hide from a worker whether the main process lives.
_METHOD = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
PATIENCE = 3  # seconds that a worker gets to end when it is asked to


def batches(
    dataset: Dataset,
    collate: Collate,
    workers: int,
    *,
    batch_size: int = 1,
    schedule: Iterable[Sequence[Any]] | None = None,
    pin_memory: bool = False,
) -> Iterator[Any]:
    """What `collate` makes of the samples of each batch: `batch_size` in order, or those that `schedule` names.

    In `workers` processes; with 0 in this one. ValueError for a file that cannot be used; another error as it is.
    """
    grouping = {"batch_size": batch_size} if schedule is None else {"batch_sampler": schedule}
    loader = DataLoader(
        _Guarded(dataset),
        **grouping,
        num_workers=workers,
        collate_fn=_GuardedCollate(collate),
        pin_memory=pin_memory,
        worker_init_fn=_follow_main if workers else None,
        multiprocessing_context=_PROCESSES if workers else None,
        generator=torch.Generator(),  # else making an iterator would advance torch's global generator
    )

    for batch in _watched(loader):
        if isinstance(batch, Exception):
            raise batch
        yield batch


def _watched(loader: DataLoader) -> Iterator[Any]:
    """What the loader gives; a process whose connection breaks before torch sees it dead has the same error."""
    try:
        yield from loader
    except (EOFError, ConnectionError) as error:
        raise RuntimeError("DataLoader worker exited unexpectedly") from error


def only(samples: list[Any]) -> Any:
    """`collate` of batches of one sample: that sample."""
    (sample,) = samples
    return sample


# Errors as values ---------------------------------------------------------------------------------------------------


class _Guarded(Dataset):
    """A data set whose errors are values."""

    def __init__(self, dataset: Dataset):
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: Any) -> Any:
        try:
            return self.dataset[key]
        except Exception as error:
            return as_value(error)


class _GuardedCollate:
    """A `collate` whose errors are values; of samples with errors the first one."""

    def __init__(self, collate: Collate):
        self.collate = collate

    def __call__(self, samples: list[Any]) -> Any:
        for sample in samples:
            if isinstance(sample, Exception):
                return sample
        try:
            return self.collate(samples)
        except Exception as error:
            return as_value(error)


def as_value(error: Exception) -> Exception:
    """An exception that can be sent to the main process.

    What is wrong with a file is a ValueError of one line; any other error keeps its type and, as a note, its traceback.
    """
    if isinstance(error, ValueError | OSError):
        return ValueError(str(error))
    if multiprocessing.parent_process() is None:
        return error

    note = "in a loader process:\n" + "".join(traceback.format_exception(error))

    try:
        value = pickle.loads(pickle.dumps(error))
    except Exception:  # whatever an exception's own pickling may raise
        value = RuntimeError(f"{type(error).__name__}: {error}")

    value.add_note(note)

    return value


# Processes ----------------------------------------------------------------------------------------------------------


def _follow_main(*_: Any) -> None:
    """The first act of a worker: from then on it ends by the main process's will, or with it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})  # the thread below takes it

    main_process = multiprocessing.parent_process().pid
    threading.Thread(target=_watch, args=(main_process,), daemon=True).start()


def _watch(main_process: int) -> None:
    """End this process by a SIGTERM of its parent, and soon after its parent; another sender's SIGTERM is ignored."""
    while os.getppid() == main_process:
        if not hasattr(signal, "sigtimedwait"):  # macOS
            time.sleep(1)
            continue

        sent = signal.sigtimedwait({signal.SIGTERM}, 1)
        if sent is not None and sent.si_pid == main_process:
            os._exit(0)  # an end by a signal would be reported as a worker's failure

    os._exit(1)


class _Worker(_METHOD.Process):
    """A process whose `terminate`, after which Python and torch wait for its end without a limit, does end it."""

    @staticmethod
    def _Popen(process: Any) -> Any:
        started = _METHOD.Process._Popen(process)
        ask = started.terminate

        def terminate() -> None:
            ask()
            if started.wait(PATIENCE) is None:
                started.kill()

        started.terminate = terminate

        return started


class _Results(queues.Queue):
    """A queue that sends, for what cannot be sent, the reason: by default the item would silently be dropped."""

    def _on_queue_feeder_error(
        self, error: Exception, item: tuple[int, Any]
    ) -> None:  # item: batch number, batch
        number, _ = item
        reason = " ".join(str(error).split())
        advice = "enlarge /dev/shm (docker run --shm-size) or the limit on open files, or lower data.workers"
        self.put(
            (
                number,
                ValueError(f"a loader process cannot hand over its batch ({reason}); {advice}"),
            )
        )


class _Context(type(_METHOD)):
    """How processes and their queues are made, for `DataLoader` and for pools of processes."""

    Process = _Worker

    def Queue(self, maxsize: int = 0) -> _Results:
        return _Results(maxsize, ctx=self.get_context())


_PROCESSES = _Context()


CHUNK = 8  # jobs that a process gets at once
AHEAD = 3  # chunks a process, done or to do, that wait


def parallel(
    function: Callable[[Any], Any], jobs: Sequence[Any], workers: int
) -> Iterator[Any]:
    """`function(job)` of every job in order, in `workers` processes; with less than 2 in this one.

    The first error ends it, and so does the death of a process (`multiprocessing.Pool` would wait for its job). Some
    results wait for whoever takes them, not all: they may be images.
    """
    if workers < 2:
        yield from map(function, jobs)
        return

    chunks = (jobs[start : start + CHUNK] for start in range(0, len(jobs), CHUNK))
    waiting: deque[Future[list[Any]]] = deque()
    with ProcessPoolExecutor(workers, mp_context=_PROCESSES, initializer=_follow_main) as pool:
        try:
            for chunk in itertools.islice(chunks, AHEAD * workers):
                waiting.append(pool.submit(_each, function, chunk))

            while waiting:
                found = waiting.popleft().result()
                for chunk in itertools.islice(chunks, 1):
                    waiting.append(pool.submit(_each, function, chunk))
                yield from found
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _each(function: Callable[[Any], Any], jobs: Sequence[Any]) -> list[Any]:
    return [function(job) for job in jobs]
