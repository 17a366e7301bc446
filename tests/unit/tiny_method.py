"""A method of a few weights, and runs of it."""

import os
import signal
from copy import deepcopy

import torch
import torch.nn.functional as F
from torch import nn

from common.config import Config, DataConfig, EvalConfig, ModelConfig, OptimConfig, StreamConfig, TrainConfig
from common.engine import fit
from common.engine.method import move_average
from tests.contexts import BareMethod

CPU = torch.device("cpu")


class Tiny(BareMethod):
    """Dropout, BN, a moving-average teacher and a counter: all that a checkpoint has to hold."""

    def __init__(self, cfg, parts=1, poison=None, norm=nn.BatchNorm1d, dropout=0.5):
        super().__init__(cfg)
        self.backwards, self.poison = parts, poison
        self.model = nn.Sequential(nn.Linear(4, 8), norm(8), nn.Dropout(dropout), nn.Linear(8, 1))
        self.teacher = deepcopy(self.model)
        self.teacher.requires_grad_(False)
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))

    def forward(self, streams, step):
        x = streams["labeled"]["x"]
        if self.backwards == 1:
            return self.term(x, step)
        return (self.term(x, step) for _ in range(self.backwards))

    def term(self, x, step):
        loss = F.mse_loss(self.model(x), x.sum(1, keepdim=True)) / self.backwards
        return {"loss": loss * (float("nan") if step == self.poison else 1), "mse": loss}

    def after_step(self, step):
        move_average(self.teacher, self.model, 0.9)
        self.count += 1


def config(tmp_path, steps=20, **train):
    return Config(
        name="tiny",
        output=str(tmp_path),
        model=ModelConfig(name="none", num_classes=1),
        data=DataConfig(streams={"labeled": StreamConfig(batch_size=8)}),
        optim=OptimConfig(lr=0.05),
        train=TrainConfig(steps=steps, **{"save_every": 5, "log_every": 1} | train),
        eval=EvalConfig(every=10),
    )


def streams(cfg, micro=1):
    def open_at(step):
        def batches():
            for t in range(step, 10**6):
                for m in range(micro):
                    generator = torch.Generator().manual_seed(t * micro + m)
                    yield {"x": torch.randn(8 // micro, 4, generator=generator)}

        return {"labeled": batches()}

    return open_at


def train(cfg, method=None, resume=False, **kwargs):
    torch.manual_seed(0)
    method = method or Tiny(cfg)
    fit(cfg, method, streams(cfg), device=CPU, resume=resume, **kwargs)
    return method.state_dict()


def assert_equal(a, b):
    assert a.keys() == b.keys()
    assert all(torch.equal(a[key], b[key]) for key in a)


def stop_at(number):
    """An `evaluate` that sends this process SIGTERM at the given step."""

    def evaluate(step):
        if step == number:
            os.kill(os.getpid(), signal.SIGTERM)
        return {"miou": 0.0}

    return evaluate
