"""Two gloo ranks: what is logged is the mean over ranks, in one collective at the steps that are logged."""

import json
import os

import pytest
import torch
import torch.distributed as dist
from torch import nn

from common import distributed
from common.config import Config, ModelConfig, OptimConfig, TrainConfig
from common.engine import fit
from tests.contexts import BareMethod

LOSSES = (1.0, 4.0)


class Constant(BareMethod):
    """A loss of its own on every rank, and a weight with a gradient of 0."""

    def __init__(self, cfg):
        super().__init__(cfg)
        self.weight = nn.Parameter(torch.zeros(()))

    def forward(self, streams, step):
        loss = 0 * self.weight + LOSSES[distributed.rank()] + step
        return {"loss": loss, "share": loss / 10}


def train(rank, folder):
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ.update(address)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    reductions = []
    original = dist.all_reduce

    def counted(tensor, *args, **options):
        reductions.append(tensor.numel())
        return original(tensor, *args, **options)

    dist.all_reduce = counted
    cfg = Config(
        name="run", output=folder, model=ModelConfig("none", 1), optim=OptimConfig(schedule="constant"),
        train=TrainConfig(steps=4, devices=2, log_every=2),
    )  # fmt: skip
    fit(cfg, Constant(cfg), lambda step: {}, device=torch.device("cpu"))
    assert reductions == [2, 2, 3, 2, 2, 3]  # the flags of every step, and the three scalars of every second
    distributed.stop()


def test_logged_losses_are_means_over_ranks(tmp_path):
    torch.multiprocessing.spawn(train, (str(tmp_path),), nprocs=2)
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert [line["loss"] for line in lines] == pytest.approx([3.5, 5.5])
    assert [line["share"] for line in lines] == pytest.approx([0.35, 0.55])
