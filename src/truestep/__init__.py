"""truestep: SFT-then-RL training in which every optimizer step is provably the one that was asked for."""

import os

__version__ = "0.1.0"

# OpenMP reads this when torch loads it. Threads that spin while they wait take the cores from other work, and
# from each other: beside busy processes a step takes several times as long. What the user sets is kept.
if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"} & os.environ.keys():
    os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
