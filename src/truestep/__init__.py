"""truestep: SFT-then-RL training, with tests that every optimizer step is the one you configured.

From Python: ``truestep.train``, ``evaluate``, ``compare``, ``grade``, ``audit`` and ``Run``; see ``truestep.api``.
"""

import importlib
import os
import sys
import types
from typing import Any

__version__ = "0.1.0rc1"

# OpenMP reads these when torch loads it. Threads that spin while they wait take the cores from other work and
# from each other: next to busy processes, a step takes several times as long. Less than a millisecond of
# spinning keeps an idle machine as fast as it would be otherwise. Values that the user has set are kept.
if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"} & os.environ.keys():
    os.environ |= {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "10000"}


class Verb(types.ModuleType):
    """A package that can be called: ``truestep.train(...)`` is ``truestep.api.train(...)``, and ``truestep.train.loop``
    is still a module (docs/decisions/015). ``help`` and ``inspect.signature`` show the function."""

    def __call__(self, *given: Any, **named: Any) -> Any:
        return self._function(*given, **named)

    @property
    def _function(self) -> Any:
        return getattr(importlib.import_module("truestep.api"), self.__name__.rpartition(".")[2])

    @property
    def __signature__(self) -> Any:
        return importlib.import_module("inspect").signature(self._function)

    @property
    def __doc__(self) -> str:  # type: ignore[override]
        function = self._function
        return f"{function.__name__}{self.__signature__}\n\n{function.__doc__}"

    @classmethod
    def make(cls, name: str) -> None:
        """Make an imported package callable."""
        module = sys.modules[name]
        module.__class__ = cls
        module.__dict__.pop("__doc__", None)  # the package's own, which would hide the function's


_VERBS = ("train", "evaluate", "grade", "audit")
_NAMES = ("compare", "Audit", "Run")


def __getattr__(name: str) -> Any:
    """Import what is asked for, so that ``import truestep`` is fast and needs no torch."""
    if name in _VERBS:
        return importlib.import_module(f"truestep.{name}")
    if name in _NAMES:
        return getattr(importlib.import_module("truestep.api"), name)
    raise AttributeError(f"module 'truestep' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_VERBS, *_NAMES])
