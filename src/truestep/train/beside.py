"""Runs one function in a thread beside the training. The function takes part in no collective."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any

POLL_SECONDS = 0.2


class Dropped(Exception):
    """Raised in the thread of a rollout that is no longer needed."""


class Beside:
    """A function that runs in a thread beside the training. It is given a check that raises ``Dropped``."""

    def __init__(self, work: Callable[[Callable[[], None]], Any]) -> None:
        self._is_dropped = threading.Event()
        self._threads = ThreadPoolExecutor(max_workers=1, thread_name_prefix="rollout-ahead")
        self._future = self._threads.submit(work, self._check)

    def _check(self) -> None:
        if self._is_dropped.is_set():
            raise Dropped

    def result(self, check_stop: Callable[[], None]) -> Any:
        """Wait for the function. Raises its error, or what ``check_stop`` raises while it has not ended."""
        while not wait([self._future], POLL_SECONDS).done:
            check_stop()
        return self._future.result()

    def drop(self) -> None:
        """End the thread, and forget its result."""
        self._is_dropped.set()
        self._threads.shutdown()
