"""System prompts that are lost between training and use.

A model that was trained with a system turn answers differently without it, and nothing else shows that it is missing.
An export therefore names the system prompt of its training rows.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from truestep.checkpoint.export import exported_system
from truestep.errors import count, quoted, verb
from truestep.model.load import resolve
from truestep.records import Problem
from truestep.settings import Settings

Problems = Mapping[str, Sequence[Problem]]


def system_of(problems: Iterable[Problem], default: str) -> str:
    """Return the system prompt that most rows have, or "" if more than half of them have none. ``default`` is
    ``chat.system``, which rows without a system turn get."""
    found = Counter(problem.system or default for problem in problems)
    if 2 * found[""] > found.total():
        return ""
    del found[""]
    return found.most_common(1)[0][0] if found else ""


def notes_of_systems(settings: Settings, trained: Problems, tested: Problems) -> list[str]:
    """Return a sentence for each set that is trained with a system prompt and tested without one, and one if the
    model was trained with a system prompt that no row has."""
    if settings.chat.system:
        return []
    with_system = {name: sum(bool(p.system) for p in of_set) for name, of_set in trained.items()}
    bare = [name for name, of_set in tested.items() if not any(p.system for p in of_set)]
    notes = [
        f"{count(num, 'row', len(trained[name]))} of data.{name} {verb(num, 'have')} a system prompt, but no row of "
        f"{_sets(bare)} has one, so the model is tested without it; set chat.system, or add a system turn to the test rows"
        for name, num in with_system.items()
        if num and bare
    ]
    without = [*(name for name, num in with_system.items() if not num), *bare]
    exported = exported_system(Path(resolve(settings.model)))
    if exported and without and not notes:
        notes.append(
            f"{settings.model.path} was trained with the system prompt {quoted(exported)}, but no row of "
            f"{_sets(dict.fromkeys(without))} has one; set chat.system, or add a system turn to the rows"
        )
    return notes


def _sets(names: Iterable[str]) -> str:
    return " and ".join(f"data.{name}" for name in names)
