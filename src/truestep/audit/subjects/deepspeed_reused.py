"""DeepSpeed's engine with a layer that is used twice in a forward pass. Options: those of deepspeed_engine."""

from __future__ import annotations

import deepspeed_engine
import harness

SUBJECTS = [{
    "name": "DeepSpeed, layer used twice", "needs": ["deepspeed", "torch"], "cases": ["ENGINE"],
    "configurations": [
        {"arch": "reused", "stage": 1, "offload": False},
        {"arch": "reused", "stage": 2, "offload": False, "processes": [1, 2]},
        {"arch": "reused", "stage": 2, "offload": True},
        {"arch": "reused", "stage": 3, "offload": False, "processes": [1, 2]},
    ],
}]  # fmt: skip


def run(spec: harness.Spec) -> None:
    deepspeed_engine.run(spec)
