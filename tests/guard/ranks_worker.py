"""One of two gloo processes that run all loops of two ranks. Arguments: STORE RANK OUT."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from faulty_loops import Loop, train
from leave import leave
from ported import BOTH, PORTED

from truestep.guard.used import FromGradients


def broken(reader: FromGradients) -> None:
    raise MemoryError("simulated")


def main() -> None:
    store, rank, out = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3])
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    found: dict[str, Any] = {}
    for number, one in enumerate(PORTED):
        for dtype in one.dtypes if one.ranks == 2 else ():
            records, _, failure = train(one.loop, dtype, rank, 2, 3)
            found[f"{number} {dtype}"] = {"records": records, "failure": failure}
    for rows in (1, 2):
        for dtype in BOTH:
            records, model, failure = train(Loop(rows=rows), dtype, rank, 2, 3)
            _, alone, _ = train(Loop(rows=rows), dtype, rank, 2, 3, guarded=False)
            pairs = zip(model.parameters(), alone.parameters(), strict=True)
            same = all(torch.equal(a, b) for a, b in pairs)
            found[f"clean {rows} {dtype}"] = {"records": records, "failure": failure, "same": same}
    right = FromGradients.before
    FromGradients.before = broken if rank == 1 else right  # type: ignore[method-assign]
    records, _, failure = train(Loop(), torch.float32, rank, 2, 3)
    FromGradients.before = right  # type: ignore[method-assign]
    found["an error on one rank"] = {"records": records, "failure": failure}
    out.write_text(json.dumps(found), encoding="utf-8")
    leave()


if __name__ == "__main__":
    main()
