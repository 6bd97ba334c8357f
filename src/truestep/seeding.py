"""Counter-based random generators, the only source of randomness in truestep.

A generator is a pure function of (run seed, purpose, step, item). It never depends on the rank, the
micro-batch or the order in which generators are created, so world size and batch composition do not change a
draw, and no generator state has to be saved.
"""

from __future__ import annotations

import enum
import hashlib

import numpy as np


class Purpose(enum.StrEnum):
    """The purpose of a draw. Each has a different name, so that a new purpose does not change other draws."""

    MODEL_INIT = "model-init"
    DATA_ORDER = "data-order"
    SAMPLE = "sample"
    EVALUATE = "evaluate"
    PROCEDURAL = "procedural"
    PLAN = "plan"
    BOOTSTRAP = "bootstrap"
    PROBE = "probe"
    RANDOM_REWARD = "random-reward"


def generator(seed: int, purpose: Purpose, step: int = 0, item: str | int = 0) -> np.random.Generator:
    """Return a Philox generator keyed by a SHA-256 of the arguments, so draws of two steps are unrelated."""
    digest = hashlib.sha256(f"{seed}\x1f{purpose.value}\x1f{step}\x1f{item}".encode()).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest[:16], "little")))


def integer(seed: int, purpose: Purpose, step: int = 0, item: str | int = 0) -> int:
    """Return a 63-bit seed for libraries that take an integer (torch.manual_seed)."""
    return int(generator(seed, purpose, step, item).integers(0, 2**63 - 1))


def permutation(seed: int, epoch: int, size: int, item: str = "") -> np.ndarray:
    """Return the order in which an epoch visits ``size`` items."""
    return generator(seed, Purpose.DATA_ORDER, epoch, item).permutation(size)
