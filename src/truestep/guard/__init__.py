"""The live guard: watches a training run and says, at the first step, whether an update is the one asked for."""

from truestep.guard.live import Guard, GuardFault, guard

__all__ = ["Guard", "GuardFault", "guard"]
