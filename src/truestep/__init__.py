"""truestep: SFT-then-RL training, with tests that every optimizer step is the one you configured."""

import os

__version__ = "0.1.0"

# OpenMP reads these when torch loads it. Threads that spin while they wait take the cores from other work and
# from each other: next to busy processes, a step takes several times as long. Less than a millisecond of
# spinning keeps an idle machine as fast as it would be otherwise. Values that the user has set are kept.
if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"} & os.environ.keys():
    os.environ |= {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "10000"}
