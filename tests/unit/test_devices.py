"""Which device a process takes, and what is said of one that it cannot have."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from common import distributed
from common.config import TrainConfig
from common.engine.runtime import arranged, use_tf32

CPU = torch.device("cpu")


@pytest.fixture
def gpus(monkeypatch):
    """A machine that says it has four GPUs; returns the list of those that are made current."""
    taken = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    monkeypatch.setattr(distributed.dist, "init_process_group", lambda backend: None)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    return taken


@pytest.mark.parametrize(("asked", "index"), [(None, 0), ("cuda", 0), ("cuda:3", 3)])
def test_device_of_one_process(gpus, asked, index):
    assert distributed.start(asked) == torch.device("cuda", index) and gpus == [torch.device("cuda", index)]
    assert distributed.start("cpu") == CPU


def test_each_rank_takes_its_own_gpu(gpus, monkeypatch):
    for name, value in (("RANK", "6"), ("WORLD_SIZE", "8"), ("LOCAL_RANK", "2")):
        monkeypatch.setenv(name, value)
    for asked in (None, "cuda"):
        assert distributed.start(asked) == torch.device("cuda", 2)
    with pytest.raises(ValueError, match="--device cuda:0: 8 processes would share this GPU; give --device cuda,"):
        distributed.start("cuda:0")
    monkeypatch.setenv("LOCAL_RANK", "4")
    with pytest.raises(ValueError, match="--device cuda: GPU 4 is asked for, and torch finds 4"):
        distributed.start("cuda")


@pytest.mark.parametrize("asked", ["gpu", "cuda:first", "cuda0"])
def test_device_that_is_none(gpus, asked):
    with pytest.raises(ValueError, match=f"--device {asked}: give cpu, cuda or cuda:N"):
        distributed.start(asked)
    assert not gpus


def test_copies_to_a_gpu_do_not_wait():
    """They come from pinned memory."""

    class Told:
        def pin_memory(self):
            return SimpleNamespace(to=lambda device, non_blocking: (device, non_blocking))

    cuda = torch.device("cuda", 1)
    assert distributed.to_device(Told(), cuda) == (cuda, True)
    assert distributed.to_device(torch.ones(2), CPU).device == CPU


@pytest.fixture
def switches():
    """What says how products of float32 are made on CUDA; afterwards it says what it said."""
    found = (torch.backends.cuda.matmul, torch.backends.cudnn)
    before = [switch.allow_tf32 for switch in found]
    yield found
    for switch, value in zip(found, before, strict=True):
        switch.allow_tf32 = value


def test_digits_of_products_are_chosen_for_a_gpu_alone(switches):
    """Torch's switch is that of products on the CPU, too."""
    for tf32 in (True, False):
        use_tf32(TrainConfig(tf32=tf32), torch.device("cuda"))
        assert [switch.allow_tf32 for switch in switches] == [tf32, tf32]
        use_tf32(TrainConfig(tf32=not tf32), CPU)
        assert [switch.allow_tf32 for switch in switches] == [tf32, tf32]
    assert torch.get_float32_matmul_precision() == "highest"


@pytest.mark.parametrize("asked", [None, True, False])
@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_memory_format_of_weights(kind, asked):
    """Channels last is the default on CUDA, of networks of convolutions; on the CPU it has to be asked for."""
    for module, convolutional in (
        (nn.Conv2d(4, 4, 3), True),
        (nn.Sequential(nn.Conv2d(4, 4, 3), nn.Linear(40, 40)), False),
    ):
        arranged(module, asked, torch.device(kind))
        kernel = next(module.parameters())
        expected = asked if asked is not None else kind == "cuda" and convolutional
        assert kernel.is_contiguous(memory_format=torch.channels_last) == expected


def test_programs_arrange_weights_as_training_does():
    """Those that evaluate a network whose config says how."""
    root = Path(__file__).parents[2]
    programs = ("fully_sup/test.py", "ltss_benchmark/train_net.py", "uda/pseudo_labels.py", "semi_sup/main.py")
    for name in (*programs, "scripts/predict.py", "scripts/rebalance.py"):
        assert "arranged(" in (root / name).read_text(encoding="utf-8"), name
