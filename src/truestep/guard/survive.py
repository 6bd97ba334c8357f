"""Keeps the guard's own errors away from the training."""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType


class Survive:
    """A context in which an error is given to ``failed`` and does not go further.

    What ends a program on purpose (KeyboardInterrupt, SystemExit) passes, and so does what ``passes`` accepts.
    """

    def __init__(
        self, failed: Callable[[Exception], None], passes: Callable[[Exception], bool] = lambda error: False
    ) -> None:
        self.failed, self.passes = failed, passes

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        if not isinstance(error, Exception) or self.passes(error):
            return False
        self.failed(error)
        return True
