"""The live guard: watches a training run and says, at the first step, whether an update is the one asked for.

Its names are imported when they are first used, so that a log can be read without torch.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from truestep.guard.callback import TruestepGuard as TruestepGuard
    from truestep.guard.live import Guard as Guard
    from truestep.guard.live import guard as guard
    from truestep.guard.options import Declared as Declared
    from truestep.guard.tell import GuardFault as GuardFault

__all__ = ["Declared", "Guard", "GuardFault", "TruestepGuard", "guard"]
_PLACES = {"Declared": "options", "Guard": "live", "GuardFault": "tell", "guard": "live"}
_PLACES |= {"TruestepGuard": "callback"}  # needs transformers


def __getattr__(name: str) -> Any:
    if name in _PLACES:
        from importlib import import_module

        return getattr(import_module(f"truestep.guard.{_PLACES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
