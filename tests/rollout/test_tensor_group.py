"""Tensors from one process to others, and what a server must be able to do for it."""

from __future__ import annotations

import threading

import pytest
import torch

from truestep.errors import UserError
from truestep.rollout.tensor_group import TensorGroup
from truestep.rollout.vllm_broadcast import address_towards, require_transfer
from truestep.rollout.vllm_weights import Abilities

CPU = torch.device("cpu")
SENT = [
    torch.randn(3, 4), torch.randn(5).bfloat16(), torch.tensor(7), torch.randn(2, 2, 2).half(),
    torch.randn(3, dtype=torch.float64), torch.tensor([True, False]), torch.randn(0, 3),
]  # fmt: skip


def others(first: TensorGroup, size: int, got: dict[int, list[torch.Tensor]]) -> list[threading.Thread]:
    def run(rank: int) -> None:
        group = TensorGroup("127.0.0.1", first.port, rank, size, 20)
        group.meet(CPU)
        for tensor in SENT:
            mine = torch.empty_like(tensor)
            group.broadcast(mine)
            got.setdefault(rank, []).append(mine)

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(1, size)]
    for thread in threads:
        thread.start()
    return threads


@pytest.mark.parametrize("size", [2, 4])
def test_every_dtype_and_shape_arrives_bit_for_bit(size: int) -> None:
    first = TensorGroup("127.0.0.1", 0, 0, size, 20)
    got: dict[int, list[torch.Tensor]] = {}
    threads = others(first, size, got)
    first.meet(CPU)
    for tensor in SENT:
        kept = tensor.clone()
        first.broadcast(tensor)
        assert torch.equal(tensor, kept), "the sender's tensor does not change"
    for thread in threads:
        thread.join()
    assert sorted(got) == list(range(1, size))
    assert all(
        a.dtype == b.dtype and torch.equal(a, b)
        for mine in got.values()
        for a, b in zip(SENT, mine, strict=True)
    )


def test_a_process_that_does_not_come_is_an_error() -> None:
    first = TensorGroup("127.0.0.1", 0, 0, 2, 1.0)
    with pytest.raises(RuntimeError):
        first.meet(CPU)


def test_a_server_that_cannot_take_them_is_refused() -> None:
    able = Abilities(version="0.32.0", tells_bits=True, transfer="truestep", device="cpu")
    require_transfer("http://h:1", able, CPU)
    require_transfer("http://h:1", Abilities(version="0.32.0", tells_bits=True, transfer="truestep"), CPU)
    with pytest.raises(
        UserError, match=r'http://h:1 takes no weights from memory; .* vllm.transfer = "file"'
    ):
        require_transfer("http://h:1", Abilities(version="0.32.0", tells_bits=True, transfer="nccl"), CPU)
    with pytest.raises(UserError, match="different kinds of devices"):
        require_transfer("http://h:1", able, torch.device("meta"))


def test_the_address_is_one_that_the_server_can_reach() -> None:
    assert address_towards("http://127.0.0.1:8000") == "127.0.0.1"
    assert address_towards("http://localhost:8000") in ("127.0.0.1", "::1")
