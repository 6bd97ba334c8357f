"""The live guard: watches a training run and says, at the first step, whether an update is the one asked for."""

from typing import Any

from truestep.guard.judge import Declared
from truestep.guard.live import Guard, GuardFault, guard

__all__ = ["Declared", "Guard", "GuardFault", "TruestepGuard", "guard"]


def __getattr__(name: str) -> Any:
    if name == "TruestepGuard":  # needs transformers
        from truestep.guard.callback import TruestepGuard

        return TruestepGuard
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
