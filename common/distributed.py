"""Ranks, devices and the few collectives that the engine needs; everything works on one process too."""

import inspect
import os
import warnings
from collections.abc import Mapping
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

Network = TypeVar("Network", bound=nn.Module)


def start(device: str | None = None) -> torch.device:
    """Join the process group that torchrun announced, if any, and return this rank's device.

    `cuda` is this rank's own GPU. Raises ValueError for a device that is not there, or that ranks would share.
    """
    chosen = _device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)

    if "RANK" in os.environ and not dist.is_initialized():
        dist.init_process_group("nccl" if chosen.type == "cuda" else "gloo")

    return chosen


def _device(name: str) -> torch.device:
    """The device that cpu, cuda or cuda:N names on this rank."""
    kind, _, index = name.partition(":")
    if kind not in ("cpu", "cuda") or (index and not index.isdecimal()):
        raise ValueError(f"--device {name}: give cpu, cuda or cuda:N")
    if kind == "cpu":
        return torch.device(kind)
    if index and world_size() > 1:
        raise ValueError(
            f"--device {name}: {world_size()} processes would share this GPU; give --device cuda, one for each process "
            "(CUDA_VISIBLE_DEVICES chooses among them)"
        )

    number = int(index or os.environ.get("LOCAL_RANK", 0))
    found = torch.cuda.device_count()
    if number >= found:
        raise ValueError(
            f"--device {name}: GPU {number} is asked for, and torch finds {found}; give --device cpu"
        )

    return torch.device(kind, number)


def stop() -> None:
    """Leave the process group."""
    if dist.is_initialized():
        dist.destroy_process_group()


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else int(os.environ.get("RANK", 0))


def world_size() -> int:
    return (
        dist.get_world_size() if dist.is_initialized() else int(os.environ.get("WORLD_SIZE", 1))
    )


def data_parallel(module: nn.Module) -> nn.Module:
    """`module` with gradients averaged over the ranks; its buffers are left to it after the start."""
    wrapper = nn.parallel.DistributedDataParallel
    names = inspect.signature(wrapper).parameters
    # from torch 2.13 on; the old name gives a warning
    renamed = "forward_sync_buffers" in names
    return wrapper(
        module, **{"forward_sync_buffers" if renamed else "broadcast_buffers": False}
    )


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of the host on `device`; the copy to a GPU does not wait."""
    if device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def barrier() -> None:
    if dist.is_initialized() and world_size() > 1:
        dist.barrier()


def all_max(tensor: Tensor) -> Tensor:
    """Elementwise maximum over ranks, in place."""
    if dist.is_initialized() and world_size() > 1:
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return tensor


def all_mean(tensor: Tensor) -> Tensor:
    """Elementwise mean over ranks, in place."""
    if dist.is_initialized():
        all_sum(tensor).div_(world_size())
    return tensor


def mean_scalars(scalars: Mapping[str, Tensor]) -> dict[str, float]:
    """Scalars on the device as numbers, each the mean over ranks: one collective and one host sync for all.

    Every rank has to give the same names.
    """
    values = torch.stack([value.float() for value in scalars.values()])
    return dict(zip(scalars, all_mean(values).tolist(), strict=True))


def all_sum(tensor: Tensor) -> Tensor:
    """Elementwise sum over ranks, in place."""
    if dist.is_initialized() and world_size() > 1:
        dist.all_reduce(tensor)
    return tensor


def synchronise_batchnorm(module: Network, norm: str, device: torch.device) -> Network:
    """SyncBN when it is asked for and several GPUs train; the CPU has none, so there ordinary BN stays."""
    if norm != "sync_bn" or world_size() == 1:
        return module

    if device.type != "cuda":
        if rank() == 0:
            warnings.warn(
                "SyncBN needs GPUs: on the CPU each rank normalises with its own batch",
                stacklevel=2,
            )
        return module

    # here, because programs without networks import this module
    from timm.layers import convert_sync_batchnorm

    # torch's own would drop the activation in timm's norms
    return convert_sync_batchnorm(module)


@torch.no_grad()
def average_batchnorm(module: nn.Module) -> None:
    """Make the running statistics of ordinary BN equal on all ranks, so that a checkpoint is one set of files."""
    if world_size() == 1:
        return

    plain = [m for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    plain = [
        m for m in plain if not isinstance(m, nn.SyncBatchNorm) and m.running_mean is not None
    ]
    statistics = [s for m in plain for s in (m.running_mean, m.running_var)]
    if not statistics:
        return

    flat = all_mean(torch.cat([s.reshape(-1) for s in statistics]))

    for statistic, values in zip(
        statistics, flat.split([s.numel() for s in statistics]), strict=True
    ):
        statistic.copy_(values.view_as(statistic))
