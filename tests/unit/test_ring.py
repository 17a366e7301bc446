"""The bank against a queue that shifts, over restarts and over ranks."""

import pytest
import torch
import torch.distributed as dist

from common.ops.ring import RingBank, write


def test_bank_holds_what_a_shifted_queue_holds():
    bank, queue = RingBank(10, 2), torch.zeros(10, 2)
    for step, n in enumerate((4, 3, 4, 10, 1, 4)):
        rows = torch.arange(2 * n).view(n, 2) + 100.0 * step + 1
        bank.push(rows)
        queue = torch.cat((rows.flip(0), queue))[:10]
        assert {tuple(r) for r in bank.rows.tolist()} == {tuple(r) for r in queue.tolist()}
        assert bank.full == bool(queue[-1].any())
    assert bank.pushed == int(bank.count) == 26


def test_bank_is_full_after_64_steps_of_four_images():
    bank = RingBank(65536, 1)
    for step in range(64):
        assert not bank.full and bank.fill == step / 64
        for _ in range(4):
            bank.push(torch.ones(256, 1))
    assert bank.full and bank.rows.all()


def test_bank_goes_on_from_its_state():
    ours, other = RingBank(7, 3), RingBank(7, 3)
    ours.push(torch.randn(5, 3))
    other.load_state_dict(ours.state_dict())
    for bank in (ours, other):
        bank.push(torch.ones(4, 3))
    assert torch.equal(ours.rows, other.rows) and ours.pushed == other.pushed == 9
    assert set(ours.state_dict()) == {"rows", "count"}


def test_slots_say_where_rows_will_stand():
    bank, table = RingBank(5, 2), torch.zeros(5)
    for rows in torch.arange(24.0).view(4, 3, 2):
        write(table, bank.slots(3), rows.sum(1))
        bank.push(rows)
    assert torch.equal(table, bank.rows.sum(1))
    assert bank.slots(4) == (slice(2, 5), slice(0, 1))
    with pytest.raises(ValueError, match="6 rows do not fit into a bank of 5"):
        bank.push(torch.zeros(6, 2))


def _two_ranks(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    bank = RingBank(8, 1, dtype=torch.int64)
    for step in range(3):
        bank.push(torch.tensor([[10 * step + 2 * rank], [10 * step + 2 * rank + 1]]))
    torch.save((bank.rows, bank.pushed), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_bank_is_the_same_on_one_and_two_ranks(tmp_path):
    torch.multiprocessing.spawn(_two_ranks, (str(tmp_path),), nprocs=2)
    alone = RingBank(8, 1, dtype=torch.int64)
    for step in range(3):
        alone.push(10 * step + torch.arange(4)[:, None])
    for rank in range(2):
        rows, pushed = torch.load(tmp_path / f"{rank}.pt")
        assert torch.equal(rows, alone.rows) and pushed == alone.pushed == 12
