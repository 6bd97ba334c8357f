"""Problems that a program makes without end, each with a worked trace.

Train, dev and test are disjoint by construction: the hash of a problem's content, whatever the seed, decides
which of them it is in, so that the test problems of any run are never the training problems of another.
"""

from __future__ import annotations

import difflib
import hashlib
from collections.abc import Iterable, Mapping
from typing import Any

from truestep.data.procedural_tasks import TASKS
from truestep.errors import UserError
from truestep.records import Message, Problem
from truestep.seeding import Purpose, generator

# A problem is in the split that its hash modulo 10 belongs to.
SPLITS = {"train": range(7), "dev": range(7, 8), "test": range(8, 10)}
OPTIONS = {"plain_percent": (100, 0, 100)}  # of every task: the percentage of problems without "do "
_MAX_DRAWS = 2000  # for one problem of the wanted split
_MAX_REPEATS = 1000  # repeated problems in a row, after which a split counts as used up


def split_of(canonical: str) -> str:
    """The split that a problem with this content is in."""
    bucket = int.from_bytes(hashlib.sha256(canonical.encode()).digest()[:8], "big") % 10
    return next(split for split, buckets in SPLITS.items() if bucket in buckets)


def make_problem(task: str, split: str, index: int, options: Mapping[str, Any], seed: int) -> Problem:
    """Problem number ``index`` of a split: a pure function of its arguments. Raises UserError for an unknown
    task, split or option, and if the split has hardly any such problem."""
    check_split(split)
    if task not in TASKS:
        raise UserError(unknown_name("procedural task", task, TASKS))
    chosen, values = TASKS[task], _option_values(task, options)
    rng = generator(seed, Purpose.PROCEDURAL, index, f"{task}/{split}")
    for _ in range(_MAX_DRAWS):
        drawn = chosen.draw(rng, values)
        if split_of(drawn.canonical) == split:
            plain = values["plain_percent"] == 100 or rng.integers(100) < values["plain_percent"]
            return Problem(
                id=f"{task}-{drawn.canonical}",
                messages=(Message(role="user", content=drawn.text if plain else f"do {drawn.text}"),),
                answer=drawn.answer,
                checker=chosen.checker,
                solution="\n".join((*drawn.steps, f"#### {drawn.answer}")),
                row=f"procedural:{task}[{split}]:{index + 1}",
                meta={"task": task, **drawn.meta},
            )
    raise UserError(f"procedural:{task} has no {split} problem with options {values}; set larger ones")


def make_problems(task: str, split: str, num: int, options: Mapping[str, Any], seed: int) -> list[Problem]:
    """``num`` different problems of a split. Raises UserError as ``make_problem``, and for too few."""
    found: dict[str, Problem] = {}
    index = repeats = 0
    while len(found) < num:
        problem = make_problem(task, split, index, options, seed)
        index += 1
        repeats = repeats + 1 if problem.id in found else 0
        found.setdefault(problem.id, problem)
        if repeats == _MAX_REPEATS:
            raise UserError(
                f"procedural:{task} has about {len(found)} different {split} problems with options "
                f"{_option_values(task, options)}, {num} are asked for; lower limit (or skip), or "
                "set larger options"
            )
    return list(found.values())


def check_split(split: str) -> None:
    if split not in SPLITS:
        raise UserError("split: " + unknown_name("split", split, SPLITS))


def unknown_name(kind: str, word: str, known: Iterable[str]) -> str:
    names = list(known)
    close = difflib.get_close_matches(word, names, n=1, cutoff=0.6)
    hint = f'; did you mean "{close[0]}"?' if close else ""
    return f'no {kind} is called "{word}"; there are {", ".join(names) or "none"}{hint}'


def _option_values(task: str, options: Mapping[str, Any]) -> dict[str, int]:
    """The task's options with their defaults, each within its range."""
    known = {**TASKS[task].options, **OPTIONS}
    values = {key: default for key, (default, _, _) in known.items()}
    for key, value in options.items():
        if key not in known:
            raise UserError(f"options.{key}: " + unknown_name(f"option of procedural:{task}", key, known))
        _, low, high = known[key]
        if type(value) is not int or not low <= value <= high:
            raise UserError(f"options.{key}: expected a whole number from {low} to {high}, got {value!r}")
        values[key] = value
    return values
