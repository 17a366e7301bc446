"""A small training that something befalls: `python -m tests.dist.faulty FAULT FOLDER`.

FAULT happens on the last rank, at the third step or in the worker that loads it; FOLDER/fault then holds the time.
"""

import multiprocessing
import os
import signal
import sys
import time
import types
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import Dataset

from common import cli, distributed
from common.config import Config, DataConfig, EvalConfig, ModelConfig, StreamConfig, TrainConfig
from common.data.loading import batches
from common.engine import fit
from ltss_benchmark import launch
from tests.contexts import BareMethod

FAULT, FOLDER = sys.argv[1], Path(sys.argv[2])
RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


class Unsendable:
    def __reduce__(self):
        raise RuntimeError("unable to allocate shared memory(shm) for file </torch_1>: No space left on device (28)")


def mark():
    (FOLDER / "fault").write_text(str(time.time()))


def befall(place):
    """Let the fault happen, if it is one of this place and rank."""
    if not FAULT.startswith(place) or RANK != WORLD - 1:
        return None
    mark()
    if FAULT.endswith("killed"):
        os.kill(os.getpid(), signal.SIGKILL)
    if FAULT.endswith("segfault"):
        os.kill(os.getpid(), signal.SIGSEGV)
    if FAULT.endswith("memory"):
        raise MemoryError("9 GiB")
    if FAULT.endswith("unsendable"):
        return Unsendable()
    if FAULT.endswith("stuck"):
        time.sleep(1000)
    raise KeyError("absent")


class Samples(Dataset):
    def __init__(self, place, length):
        self.place, self.length = place, length

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        extra = befall(self.place) if index >= 8 and multiprocessing.parent_process() else None
        return {"x": torch.full((4,), float(index)), "extra": extra}


def collate(samples):
    return {"x": torch.stack([sample["x"] for sample in samples]), "extra": [sample["extra"] for sample in samples]}


class Line(BareMethod):
    def __init__(self, cfg):
        super().__init__(cfg)
        self.model = nn.Linear(4, 1)

    def forward(self, streams, step):
        if step == 2:
            befall("step")
        if FAULT == "none" and step == 2:
            mark()
        if FAULT == "none":
            time.sleep(0.05)
        return {"loss": F.mse_loss(self.model(streams["labeled"]["x"]), torch.zeros(4, 1))}


def validate(step):
    for _ in batches(Samples("evaluation", 40), collate, 2, batch_size=4):
        pass
    return {"miou": 0.0}


def main():
    cfg = Config(
        name="faulty", output=str(FOLDER), model=ModelConfig("none", 1),
        data=DataConfig(streams={"labeled": StreamConfig(batch_size=4)}),
        train=TrainConfig(steps=200, devices=WORLD, log_every=10, save_every=1000, threads=1),
        eval=EvalConfig(every=4 if FAULT.startswith("evaluation") else 1000),
    )  # fmt: skip
    device = distributed.start("cpu")
    samples = batches(Samples("worker", 10**6), collate, 2, batch_size=4)
    fit(cfg, Line(cfg), lambda step: {"labeled": samples}, validate, device=device)
    distributed.stop()


def launched(args):
    """What a rank of LTSS's launcher does."""
    global RANK, WORLD
    RANK, WORLD = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    main()


def launch_two():
    args = {"num_gpus": 2, "num_machines": 1, "machine_rank": 0, "dist_url": "auto", "device": "cpu"}
    return launch.start(launched, types.SimpleNamespace(**args))


if __name__ == "__main__":
    if "LTS_LAUNCH" in os.environ:
        cli.run(launch_two)
    elif FAULT == "evaluation stuck":
        cli.run(lambda: validate(0))
    elif "LTS_BARE" in os.environ:
        main()
    else:
        cli.run(main)
