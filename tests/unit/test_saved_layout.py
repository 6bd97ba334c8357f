"""What of a model is saved, and which rows a rank needs of it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard

from truestep.checkpoint.layout import Entry, Share
from truestep.train.layout import needed_rows, rows_of, saved_weights, share_of


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 2)
        self.register_buffer("bias_of_experts", torch.ones(2))
        self.register_buffer("frequencies", torch.ones(2), persistent=False)


def test_buffers_of_the_models_state_are_saved() -> None:
    assert saved_weights(Model()).keys() == {"linear.weight", "linear.bias", "bias_of_experts"}


def test_only_rows_as_fsdp2_splits_them_are_accepted(tmp_path: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        mesh, square = init_device_mesh("cpu", (1,)), torch.ones(4, 4)
        rows = DTensor.from_local(square, mesh, [Shard(0)], run_check=False)
        assert share_of(rows) == Share(shape=(4, 4), start=0)
        assert share_of(square) is None
        for placement in (Shard(1), Replicate()):
            with pytest.raises(ValueError, match="placements"):
                rows_of(DTensor.from_local(square, mesh, [placement], run_check=False))
        short = DTensor.from_local(square[:3], mesh, [Shard(0)], shape=square.shape, stride=(4, 1))
        with pytest.raises(ValueError, match="has 3 rows, expected 0 to 4"):
            rows_of(short)
        module = nn.Module()
        module.weight = nn.Parameter(rows)
        rows_needed = needed_rows(module)
        assert rows_needed("parameters", "weight", (4, 4)) == (0, 4)
        assert rows_needed("optimizer", "step/weight", ()) == (0, 1)
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize(
    ("rows", "pieces"),
    [
        ((0, 10), [(0, 4, (0, 4)), (1, 4, (0, 4)), (2, 2, (0, 2))]),
        ((3, 9), [(0, 4, (3, 4)), (1, 4, (0, 4)), (2, 2, (0, 1))]),
        ((5, 6), [(1, 4, (1, 2))]),
        ((4, 4), []),
    ],
)
def test_rows_are_found_in_the_parts_that_have_them(
    rows: tuple[int, int], pieces: list[tuple[int, int, tuple[int, int]]]
) -> None:
    """Four parts, of which the last is empty."""
    entry = Entry(dtype="F32", shape=[10, 3], starts=[0, 4, 8, 10])
    assert list(entry.pieces(rows)) == pieces
