"""Code that all RL subjects share, in the audited environment."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from typing import Any

import harness
import torch
from torch import nn

SHARPER = 6.0  # random weights of the usual size give a nearly uniform policy
SPREAD = 0.02  # of the differences between the policy and the frozen reference


def sharp_model(spec: harness.Spec) -> nn.Module:
    """Return a tiny model whose predictions are not nearly uniform."""
    model = harness.tiny_model(spec)
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() > 1:
                p.mul_(SHARPER)
    return model


def policy_and_reference(spec: harness.Spec) -> tuple[nn.Module, nn.Module]:
    """Return a tiny policy and the frozen reference of a KL term, which has slightly different weights."""
    reference = sharp_model(spec)
    draw = torch.Generator().manual_seed(7)
    with torch.no_grad():
        policy = copy.deepcopy(reference)
        for p in policy.parameters():
            p.add_(SPREAD * torch.randn(p.shape, generator=draw))
    return policy, reference


def completion(row: dict[str, Any]) -> list[int]:
    return list(row["ids"][row["trained"].index(1) :])


def prompt(row: dict[str, Any]) -> list[int]:
    return list(row["ids"][: row["trained"].index(1)])


def by_case(run: Callable[[harness.Spec], None]) -> Callable[[harness.Spec], None]:
    """Return ``run``, which says in a file why a case cannot be run, so that the others are still judged."""

    def guarded(spec: harness.Spec) -> None:
        spec.lr *= spec.case["rate"]
        with harness.Attempt() as attempt:
            run(spec)
        if (error := attempt.error) is not None:
            plain = re.sub(r"\x1b\[[0-9;]*m", "", f"{type(error).__name__}: {error}")
            words = " ".join(plain.split())[:300]
            (spec.folder / "not-run.txt").write_text(words, encoding="utf-8")

    return guarded
