"""First-in-first-out banks of rows that are the same on every rank."""

import torch
import torch.distributed as dist
from torch import Tensor, nn


@torch.no_grad()
def gather_rows(rows: Tensor) -> Tensor:
    """(n, …) of every rank → (world·n, …) in rank order; each rank must give the same n. Differentiates nothing."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return rows.detach()

    everywhere = rows.new_empty((dist.get_world_size() * rows.shape[0], *rows.shape[1:]))
    # the name before torch 2.14
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    gather(everywhere, rows.detach().contiguous())

    return everywhere


class RingBank(nn.Module):
    """The last `length` rows pushed, each of `shape`: a FIFO queue that never moves what it holds.

    Buffers, all in the state dict: `rows` (length, *shape), zero where nothing was pushed yet, and `count` (int64
    scalar), how many rows were ever pushed. `count` is mirrored by a Python integer, so asking where to write or
    whether the bank is full never waits for the device; the oldest row stands at `pointer` once the bank is full.
    The order of the rows is that of the ring, not of age: what reads the bank must not depend on it.
    """

    rows: Tensor
    count: Tensor

    def __init__(self, length: int, *shape: int, dtype: torch.dtype = torch.float32):
        super().__init__()
        if length < 1:
            raise ValueError(f"a bank holds at least one row, not {length}")

        self.length = length
        self.pushed = 0
        self.register_buffer("rows", torch.zeros(length, *shape, dtype=dtype))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))
        self.register_load_state_dict_post_hook(lambda bank, _: bank._restore())

    def _restore(self) -> None:
        self.pushed = int(self.count)

    @property
    def full(self) -> bool:
        """Whether every row was pushed, so that all of them may be used."""
        return self.pushed >= self.length

    @property
    def fill(self) -> float:
        """The share of rows that hold something."""
        return min(1.0, self.pushed / self.length)

    def slots(self, n: int) -> tuple[slice, ...]:
        """Where the next n rows will go: one slice, or two where the ring closes.

        A table of values derived from the rows (scores, say) is kept up to date by writing to the same slots.
        """
        if n > self.length:
            raise ValueError(f"{n} rows do not fit into a bank of {self.length}")

        start = self.pushed % self.length
        if start + n <= self.length:
            return (slice(start, start + n),)

        return slice(start, self.length), slice(0, start + n - self.length)

    @torch.no_grad()
    def push(self, rows: Tensor, gather: bool = True) -> None:
        """Replace the oldest rows by `rows` (n, *shape).

        gather: the rows of all ranks, in rank order; False where they are the same on every rank already.
        """
        rows = gather_rows(rows) if gather else rows
        write(self.rows, self.slots(rows.shape[0]), rows)
        self.pushed += rows.shape[0]
        self.count.fill_(self.pushed)


@torch.no_grad()
def write(table: Tensor, slots: tuple[slice, ...], rows: Tensor) -> None:
    """Put `rows` (n, …) into the `slots` of `table` (length, …), in place."""
    start = 0
    for slot in slots:
        size = slot.stop - slot.start
        table[slot].copy_(rows[start : start + size])
        start += size
