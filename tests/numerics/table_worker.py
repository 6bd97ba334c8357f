"""What each rank of test_method_table.py runs: every row, with 3 sequences on one rank and 9, the
demonstrations and expert prefixes among them, on the other.

    RANK=0 WORLD_SIZE=2 MASTER_ADDR=… MASTER_PORT=… python table_worker.py FOLDER
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from table_cases import row_gradient, sequences

from truestep.objective.methods import METHODS
from truestep.train.parallel import join, leave

GROUPS = ((0,), (1, 2, 3))  # of each rank: the demonstrations and expert prefixes are all on the second


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    ranks = join()
    found = {}
    for name in METHODS:
        gradient = row_gradient(name, sequences(groups=GROUPS[ranks.rank]), limit=40, ranks=ranks)
        found |= {f"{name}/{key}": value.contiguous() for key, value in gradient.items()}
    save_file(found, folder / f"rank-{ranks.rank}.safetensors")
    ranks.barrier()
    leave()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
