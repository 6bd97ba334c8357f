"""A child process that loads one reward function and calls it: requests and replies are lines of JSON on a
socket, so that what the function prints breaks nothing.

Started as ``python -m truestep.rewards.worker DESCRIPTOR`` by ``pool.py``, which kills it when it takes too long
or too much memory.
"""

from __future__ import annotations

import json
import math
import numbers
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

from truestep.errors import UserError
from truestep.records import RewardInput
from truestep.reward_settings import NAME
from truestep.rewards.load import Source, load, with_folder
from truestep.rewards.record import Answer, Unscored, read_input, to_json

MAX_DETAIL = 6000  # characters of a traceback
OWN = os.getpid()


def attempt(work: Callable[..., Any], *given: Any) -> Any:
    """What the user's code returns, or a failed Answer with its traceback: the only place that catches
    everything, ``sys.exit`` too. A process that the code has forked and that comes back here ends."""
    try:
        result = work(*given)
    except BaseException as error:  # noqa: BLE001
        result = failure(error)
    if os.getpid() != OWN:
        os._exit(0)
    return result


def failure(error: BaseException) -> Answer:
    frames = traceback.extract_tb(error.__traceback__)
    while frames and (
        frames[0].filename in (__file__, load.__code__.co_filename) or "importlib" in frames[0].filename
    ):
        del frames[0]  # not the user's
    reason = traceback.format_exception_only(error)[-1].strip()
    if isinstance(error, UserError):
        return Answer(reason=str(error), failed=True)
    if isinstance(error, SyntaxError):
        reason += f" ({error.filename}, line {error.lineno})"
    elif frames:
        reason += f" ({frames[-1].filename}, line {frames[-1].lineno}, in {frames[-1].name})"
    lines = [*traceback.format_list(frames), *traceback.format_exception_only(error)]
    return Answer(reason=reason[:1000], failed=True, detail="".join(lines)[-MAX_DETAIL:])


def call(
    function: Callable[..., Any], options: Mapping[str, Any], samples: Sequence[RewardInput]
) -> list[Any]:
    output = function(samples, **options)
    if isinstance(output, str | Mapping) or not hasattr(output, "__iter__"):
        raise UserError(f"returned {_shown(output)}; expected a list with one value for each sample")
    values = list(output)
    if len(values) != len(samples):
        raise UserError(f"returned {len(values)} values for {len(samples)} samples")
    return values


def answer(value: Any) -> Answer:
    """One value as an Answer. A mapping's value is its key "reward", else the sum of all."""
    if value is None:
        return Answer(reason="the function returned None")
    if isinstance(value, Unscored):
        return Answer(reason=str(value.reason) or "no reason given")
    if isinstance(value, BaseException):
        return failure(value)
    if not isinstance(value, Mapping):
        return Answer(value=_number(value))
    if not value or not all(isinstance(key, str) and NAME.fullmatch(key) for key in value):
        raise UserError(
            f"returned {_shown(value)}; expected parts named by letters, digits, '_', '-' and '.'"
        )
    parts = {key: _number(part) for key, part in value.items()}
    return Answer(value=parts["reward"] if "reward" in parts else math.fsum(parts.values()), parts=parts)


def _number(value: Any) -> float:
    number = value.item() if hasattr(value, "item") else value  # of numpy and torch
    if not isinstance(number, numbers.Real):
        raise UserError(f"returned {_shown(value)}; expected a number, None or a mapping of numbers")
    try:
        number = float(number)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise UserError(f"returned {number}, which is not a finite number")
    return number


def _shown(value: Any) -> str:
    name = type(value).__name__
    return f"{name} {value!r:.60}" if isinstance(value, str | Mapping) else name


def _die_with_parent(parent: int) -> NoReturn:
    while os.getppid() == parent:
        time.sleep(1.0)
    os.killpg(0, signal.SIGKILL)
    raise AssertionError


def serve(channel: socket.socket) -> None:
    requests = channel.makefile("rb")
    setup = json.loads(requests.readline())
    state: dict[str, Any] = {}

    def prepare() -> Answer:
        function = load(Source(**setup["source"]), setup["path"])
        options = with_folder(function, setup["options"], setup["folder"])
        if not setup["source"]["sha256"]:  # ours: it checks its options, before anything is sampled
            function([], **options)
        state.update(function=function, options=options)
        return Answer()

    channel.sendall(to_json(attempt(prepare)))
    for line in requests:
        samples = [read_input(table) for table in json.loads(line)]
        values = attempt(call, state["function"], state["options"], samples)
        if isinstance(values, list):
            values = [attempt(answer, value) for value in values]
        channel.sendall(to_json(values))


def main() -> None:
    channel = socket.socket(fileno=int(sys.argv[1]))
    channel.set_inheritable(False)  # a program that the function starts does not hold it open
    threading.Thread(target=_die_with_parent, args=(os.getppid(),), daemon=True).start()
    serve(channel)
    os._exit(0)  # threads that the function has started do not hold it up


if __name__ == "__main__":
    main()
