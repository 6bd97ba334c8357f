"""Keeps the error of an audited program, of any class, so that what comes after it can still run."""

from __future__ import annotations

from types import TracebackType


class Attempt:
    """A context that keeps an error in ``error``. What ends a program on purpose (KeyboardInterrupt) passes,
    except SystemExit, which frameworks also raise for settings that they do not know."""

    error: BaseException | None = None

    def __enter__(self) -> Attempt:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        self.error = error
        return isinstance(error, Exception | SystemExit)
