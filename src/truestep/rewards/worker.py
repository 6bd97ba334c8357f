"""A child process that loads one reward function and calls it.

``pool.py`` starts it as ``python -m truestep.rewards.worker DESCRIPTOR``, and kills it if it takes too much
time or memory. Requests and replies are lines of JSON on a socket, so that the function may print."""

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
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NoReturn

from truestep.errors import UserError, count
from truestep.records import RewardInput
from truestep.redaction import from_environment
from truestep.reward_settings import NAME
from truestep.rewards.record import Answer, Unscored, read_input, to_json
from truestep.user_code import Raised, Source, attempt, load, raised, with_folder


def tried(work: Callable[..., Any], *given: Any) -> Any:
    """Return the result of the user's code, or a failed Answer with the traceback."""
    result = attempt(work, *given)
    return failed(result) if isinstance(result, Raised) else result


def failed(raised: Raised) -> Answer:
    return Answer(reason=raised.reason, failed=True, detail=raised.detail)


def call(
    reward: Callable[..., Any], options: Mapping[str, Any], samples: Sequence[RewardInput]
) -> list[Answer] | Answer:
    """Return one Answer for each sample, or a fault of the function if it does not return one value for each. A fault
    must not be hidden by single samples, for which a list of length 1 always fits."""
    output = reward(samples, **options)
    values = None if isinstance(output, str | Mapping) or not hasattr(output, "__iter__") else list(output)
    found = _shown(output) if values is None else count(len(values), "value")
    if values is None or len(values) != len(samples):
        wanted = f"expected a list with one value for each of {count(len(samples), 'sample')}"
        return Answer(reason=f"returned {found}; {wanted}{_place(reward)}", failed=True, fault=True)
    answers = [tried(answer, value) for value in values]
    return [
        replace(a, reason=a.reason + _place(reward))
        if a.failed and not isinstance(value, BaseException)
        else a
        for a, value in zip(answers, values, strict=True)
    ]


def _place(reward: Callable[..., Any]) -> str:
    """Return where a function is defined, or "" if it is not written in Python."""
    code = getattr(reward, "__code__", None)
    return f" ({code.co_filename}, line {code.co_firstlineno}, in {code.co_name})" if code else ""


def answer(value: Any) -> Answer:
    """Return a value as an Answer. The value of a mapping is its entry "reward", or else the sum of all."""
    if value is None:
        return Answer(reason="the function returned None")
    if isinstance(value, Unscored):
        return Answer(reason=str(value.reason) or "no reason given")
    if isinstance(value, BaseException):
        return failed(raised(value))
    if not isinstance(value, Mapping):
        return Answer(value=_number(value))
    if not value or not all(isinstance(key, str) and NAME.fullmatch(key) for key in value):
        raise UserError(
            f"returned {_shown(value)}; use only letters, digits, '_', '-' and '.' in the names of its parts"
        )
    parts = {key: _number(part) for key, part in value.items()}
    return Answer(value=parts["reward"] if "reward" in parts else math.fsum(parts.values()), parts=parts)


def _number(value: Any) -> float:
    number = value.item() if hasattr(value, "item") else value  # for scalars of numpy and torch
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

    def prepare() -> Callable[..., Any]:
        function = load(Source(**setup["source"]), setup["path"])
        given = from_environment(setup["options"], "options")
        options = with_folder(function, given, setup["folder"])
        if not setup["source"]["sha256"]:  # a function of truestep checks its options when it is called
            function([], **options)
        return partial(call, function, options)

    score = tried(prepare)
    channel.sendall(to_json(score if isinstance(score, Answer) else Answer()))
    for line in requests:
        channel.sendall(to_json(tried(score, [read_input(table) for table in json.loads(line)])))


def main() -> None:
    channel = socket.socket(fileno=int(sys.argv[1]))
    channel.set_inheritable(False)  # programs that the function starts must not keep it open
    threading.Thread(target=_die_with_parent, args=(os.getppid(),), daemon=True).start()
    serve(channel)
    os._exit(0)  # does not wait for threads that the function has started


if __name__ == "__main__":
    main()
