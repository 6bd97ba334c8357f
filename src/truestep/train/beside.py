"""Runs functions in a thread beside the training. They take part in no collective."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any

POLL_SECONDS = 0.2


class Dropped(Exception):
    """Raised in the thread of a rollout that is no longer needed."""


class Beside:
    """Functions that run, one after the other, in a thread beside the training. Each is given a check that raises
    ``Dropped``."""

    def __init__(self, *works: Callable[[Callable[[], None]], Any]) -> None:
        self._is_dropped = threading.Event()
        self._threads = ThreadPoolExecutor(max_workers=1, thread_name_prefix="rollout-ahead")
        self._futures = [self._threads.submit(work, self._check) for work in works]

    def _check(self) -> None:
        if self._is_dropped.is_set():
            raise Dropped

    def result(self, number: int, check_stop: Callable[[], None]) -> Any:
        """Wait for a function. Raises its error, or what ``check_stop`` raises while it has not ended."""
        while not wait([self._futures[number]], POLL_SECONDS).done:
            check_stop()
        return self._futures[number].result()

    def drop(self) -> None:
        """End the thread, and forget its results."""
        self._is_dropped.set()
        self._threads.shutdown(cancel_futures=True)
