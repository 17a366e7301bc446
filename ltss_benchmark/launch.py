"""Starting the processes of a run, one per GPU; torchrun does the same from outside."""

import contextlib
import os
import signal
import socket
import warnings
from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import urlsplit

import torch
import torch.multiprocessing as multiprocessing

from common import cli

# seconds that the other ranks get to end after one has ended; those that were asked to save have done so
GRACE = 20


def needed(gpus: int, machines: int) -> bool:
    """Whether ranks have to be started: more than one, and this process is not one of them."""
    return gpus * machines > 1 and "RANK" not in os.environ


def start(main: Callable[[Any], None], args: Any) -> int:
    """Run `main(args)` on args.num_gpus ranks of this machine; returns the exit code of the first that fails, or 0.

    args: num_gpus, num_machines, machine_rank, dist_url ("auto" or tcp://host:port), device. `check` says whether they
    fit. SIGINT and SIGTERM reach the ranks as SIGTERM: in training they save and end, else they end at once.
    """
    address = meeting_point(args)
    received: list[int] = []

    # the ranks inherit that, so Ctrl-C is this process's affair
    with _held_back(signal.SIGINT):
        context = multiprocessing.start_processes(
            _rank, (main, args, address), args.num_gpus, join=False
        )
        before = {
            kind: signal.signal(kind, _forward(context, received))
            for kind in (signal.SIGTERM, signal.SIGINT)
        }

    try:
        while not context.join(grace_period=GRACE):
            pass
    except multiprocessing.ProcessExitedException as error:  # the rank has said why
        if received:
            return 128 + received[0]
        return error.exit_code if error.exit_code > 0 else 128 - error.exit_code
    finally:
        for kind, handler in before.items():
            signal.signal(kind, handler)

    return 0


@contextlib.contextmanager
def _held_back(kind: signal.Signals) -> Iterator[None]:
    """A signal that comes within is delivered afterwards."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {kind})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def meeting_point(args: Any) -> tuple[str, int]:
    """Host and port of rank 0; on one machine any free port. Raises ValueError."""
    if args.dist_url != "auto":
        url = urlsplit(args.dist_url)
        if url.scheme != "tcp" or not url.hostname or not url.port:
            raise ValueError(f"--dist-url {args.dist_url!r}: expected tcp://HOST:PORT")
        return url.hostname, url.port

    if args.num_machines > 1:
        raise ValueError(
            "--dist-url tcp://HOST:PORT of machine 0 is needed with --num-machines"
        )
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return "127.0.0.1", free.getsockname()[1]


def check(args: Any) -> None:
    """Whether the arguments of `start` fit each other and this machine: ValueError, or a warning."""
    if "RANK" in os.environ:
        if args.num_gpus * args.num_machines > 1:
            warnings.warn(
                "--num-gpus and --num-machines are ignored: torchrun has started the processes",
                stacklevel=2,
            )
        return

    if args.num_gpus < 1 or not 0 <= args.machine_rank < args.num_machines:
        raise ValueError(
            f"--num-gpus {args.num_gpus}, --machine-rank {args.machine_rank}, --num-machines {args.num_machines}: "
            "at least one process, and ranks of machines count from 0"
        )
    if needed(args.num_gpus, args.num_machines):
        _check_devices(args)
        meeting_point(args)


def _check_devices(args: Any) -> None:
    """A device for each of several processes: ValueError, or a warning where they are CPU processes."""
    kind, _, index = (args.device or "").partition(":")
    if index:
        raise ValueError(
            f"--device {args.device}: {args.num_gpus} processes need one each; give --device {kind}"
        )

    found = torch.cuda.device_count()
    if kind == "cuda" or (found and not kind):
        if args.num_gpus > found:
            raise ValueError(
                f"--num-gpus {args.num_gpus}: this machine has {found}; give --device cpu for CPU processes"
            )
    elif not kind:
        warnings.warn(
            f"NO GPU FOUND: --num-gpus {args.num_gpus} starts {args.num_gpus} CPU processes on {os.cpu_count()} cores",
            stacklevel=3,
        )


def _rank(local: int, main: Callable[[Any], None], args: Any, address: tuple[str, int]) -> None:
    """One rank, in a process of its own."""
    variables = {
        "MASTER_ADDR": address[0],
        "MASTER_PORT": address[1],
        "WORLD_SIZE": args.num_gpus * args.num_machines,
        "RANK": args.machine_rank * args.num_gpus + local,
        "LOCAL_RANK": local,
    }
    os.environ |= {name: str(value) for name, value in variables.items()}
    torch.set_num_threads(max(torch.get_num_threads() // args.num_gpus, 1))
    cli.run(lambda: main(args))


def _forward(
    context: multiprocessing.ProcessContext, received: list[int]
) -> Callable[[int, Any], None]:
    def handler(number: int, frame: Any) -> None:
        received.append(number)
        for process in context.processes:
            if process.is_alive():
                process.terminate()

    return handler
