"""Questions from the optional reasoning-gym package, for tasks whose answers our arithmetic can confirm."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from hashlib import sha256
from typing import Any

from truestep.data.procedural import check_split, split_of, unknown_name
from truestep.errors import UserError
from truestep.records import Message, Problem
from truestep.seeding import Purpose, integer

_EXPRESSION = re.compile(r"-?\d+(?: [-+*] -?\d+)+")
_LIST = re.compile(r"(?<=: )\d+(?:, \d+)+")


def _chain(question: str) -> int:
    """Return the value of an expression such as "4 - 1 + 7" or "3 * 5 * 2". Products come first."""
    words = _EXPRESSION.findall(question)[0].split(" ")
    terms = [int(words[0])]
    for sign, word in zip(words[1::2], words[2::2], strict=True):
        if sign == "*":
            terms[-1] *= int(word)
        else:
            terms.append(int(word) if sign == "+" else -int(word))
    return sum(terms)


def _numbers(question: str) -> list[int]:
    return [int(word) for word in _LIST.findall(question)[0].split(", ")]


# task → our function that answers its question
TASKS: dict[str, Callable[[str], int]] = {
    "chain_sum": _chain,
    "products": _chain,
    "gcd": lambda question: math.gcd(*_numbers(question)),
    "lcm": lambda question: math.lcm(*_numbers(question)),
}


def make_problems(task: str, split: str, num: int, options: Mapping[str, Any], seed: int) -> list[Problem]:
    """Return ``num`` different questions of a split. A question's text decides its split, whatever the seed.

    Raises UserError for an unknown task or option, a missing package, or an answer that differs from ours."""
    if task not in TASKS:
        raise UserError(unknown_name("reasoning_gym task", task, TASKS))
    check_split(split)
    try:
        import reasoning_gym
    except ModuleNotFoundError:
        raise UserError(
            'reasoning_gym data needs the reasoning-gym package; run pip install "truestep[reasoning-gym]"'
        ) from None
    tries = 200 * num
    rng = integer(seed, Purpose.PROCEDURAL, item=f"reasoning_gym/{task}") % 2**31
    try:
        questions = reasoning_gym.create_dataset(task, seed=rng, size=tries, **options)
    except (TypeError, ValueError, AssertionError) as error:
        raise UserError(f"reasoning_gym:{task} options: {str(error).splitlines()[0]}") from None
    found: dict[str, Problem] = {}
    for i in range(tries):
        entry = questions[i]
        text, gold = str(entry["question"]), str(entry["answer"])
        if split_of(text) != split or text in found:
            continue
        if str(ours := TASKS[task](text)) != gold:
            raise UserError(f"reasoning_gym:{task}: its answer to {text!r} is {gold}, but ours is {ours}")
        where = f"reasoning_gym:{task}[{split}]:{len(found) + 1}"
        turns = (Message(role="user", content=text),)
        name = f"{task}-{sha256(text.encode()).hexdigest()[:12]}"
        found[text] = Problem(id=name, messages=turns, answer=gold, checker="integer", row=where)
        if len(found) == num:
            return list(found.values())
    raise UserError(
        f"reasoning_gym:{task} has only about {len(found)} different {split} problems, but {num} were requested; "
        "reduce limit (or skip), or choose options with larger numbers"
    )
