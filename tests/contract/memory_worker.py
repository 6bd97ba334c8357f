"""What each rank of test_sharded_run.py's memory test runs: build a policy from slices of files, and export it.

RANK=0 WORLD_SIZE=2 MASTER_ADDR=… MASTER_PORT=… python memory_worker.py FOLDER DTYPE"""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from truestep.checkpoint.tensors import Streamed, write_weights
from truestep.device import compute_device, return_free_memory
from truestep.model.load import load_model
from truestep.settings import ModelSettings
from truestep.train.parallel import fill, join, leave, local, shard
from truestep.train.policy import Policy
from truestep.train.weight_sync import Gathered


def own_bytes() -> int:
    """The memory of this process that is not the content of a file."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("RssAnon"))


@contextmanager
def watched(found: dict[str, int], name: str) -> Iterator[None]:
    """Note by how much the memory grew at most, looked at every millisecond, and at the end."""
    return_free_memory()
    before, ended, most = own_bytes(), threading.Event(), [0]

    def look() -> None:
        while not ended.is_set():
            most[0] = max(most[0], own_bytes() - before)
            time.sleep(1e-3)

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        found[name] = max(most[0], own_bytes() - before)


@torch.no_grad()
def main(folder: Path, dtype: str) -> None:
    torch.set_num_threads(1)
    ranks = join()
    found: dict[str, int] = {}
    settings = ModelSettings(path=str(folder / "model"))
    ranks.gather(0)  # the first collective starts threads
    load_model(
        settings, dtype=getattr(torch, dtype), device=compute_device(), seed=0, empty=True
    )  # imports modules
    with watched(found, "load"):
        loaded = load_model(
            settings, dtype=getattr(torch, dtype), device=compute_device(), seed=0, empty=True
        )
        policy = Policy(loaded)
        shard(policy, policy.model.base_model.layers)
        assert loaded.weights is not None
        fill(policy.model, loaded.weights, compute_device())
    parameters = list(policy.parameters())
    found |= {
        "shard": sum(local(p).nbytes for p in parameters),
        "tensor": max(p.numel() * 4 for p in parameters),
    }
    out = folder / f"export-{dtype}"
    with watched(found, "export"):
        weights = Gathered(policy)
        if ranks.rank:
            for name in weights:
                weights[name]
        else:
            out.mkdir()
            empty = {name: weights.empty(name) for name in weights}
            write_weights(out, policy.model, Streamed(empty, weights.__getitem__))
    (folder / f"{dtype}-{ranks.rank}.json").write_text(json.dumps(found))
    ranks.barrier()
    leave()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
