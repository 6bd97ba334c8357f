"""Describes a set of problems: counts, lengths, texts that occur more than once, and what is not used."""

from __future__ import annotations

from array import array
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from truestep.data.overlap import problem_text, text_key
from truestep.data.row_schema import unused_columns
from truestep.errors import count, verb
from truestep.records import Problem

if TYPE_CHECKING:
    from truestep.settings import Settings

TRAINED_ON = "trained on"


class Description:
    """A description of the problems that are added one by one. It keeps about 50 bytes of each, so that a
    set need not fit into memory. Texts are compared by 64-bit hashes."""

    def __init__(self, needs: Collection[str] = ()) -> None:
        self.needs = needs  # what the rows are used for, as in ``load_problems``
        self.problem_lengths, self.solution_lengths = array("q"), array("q")
        self.texts, self.answers = array("q"), array("q")  # hashes; an answer's is 0 if there is none
        self.files: dict[str, int] = {}
        self.places, self.numbers = array("q"), array("q")  # the file and the number of each row
        self.checkers: Counter[str] = Counter()
        self.unused: Counter[str] = Counter()
        self.shapes: dict[
            tuple[str, ...], tuple[int, list[str]]
        ] = {}  # rows with the same columns, and those not used
        self.layouts: Counter[str] = Counter()
        self.sources: dict[str, Mapping[str, tuple[str, ...]]] = {}  # by layout, the columns of its first row
        self.num_context_turns = 0  # rows with assistant turns that are not trained on
        self.num_dialogues, self.num_trained_turns = 0, 0
        self.num_left, self.first_left = 0, ""  # rows whose last turns are left out

    def add(self, problem: Problem) -> None:
        turns, row = problem.messages, problem.columns
        self.problem_lengths.append(sum([len(m.content) for m in turns]))
        if problem.solution or problem.text:
            self.solution_lengths.append(len(problem.solution or problem.text))
        self.layouts[problem.layout] += 1
        self.sources.setdefault(problem.layout, problem.sources)
        self.texts.append(hash(text_key(problem_text(problem))))
        self.answers.append(hash(problem.answer) or 1 if problem.answer else 0)
        file, _, number = problem.row.rpartition(":")
        is_row = number.isdecimal()
        self.places.append(self.files.setdefault(file if is_row else problem.row, len(self.files)))
        self.numbers.append(int(number) if is_row else -1)
        self.checkers[problem.checker] += 1
        if problem.num_left_turns and (not self.needs or "solution" in self.needs):
            self.num_left += 1
            self.first_left = self.first_left or problem.row or problem.id
        trained = [m.is_trained for m in problem.dialogue or turns if m.role == "assistant"]
        if len(turns) > 1 and trained:
            is_used = bool(problem.dialogue) and (not self.needs or "solution" in self.needs)
            several = is_used and sum(trained) > 1
            self.num_dialogues += several
            self.num_trained_turns += sum(trained) if several else 0
            self.num_context_turns += not (is_used and all(trained))
        if None in row.values() or list in map(type, map(row.get, ("messages", "prompt", "target"))):
            self.unused.update(unused_columns(problem, self.needs))
        else:  # the row has no turns, so only the names of its columns matter
            shape = (problem.checker, problem.layout, *row)
            if shape not in self.shapes:
                self.shapes[shape] = 0, list(unused_columns(problem, self.needs))
            num, names = self.shapes[shape]
            self.shapes[shape] = num + 1, names

    def result(self) -> dict[str, Any]:
        """Return counts, lengths in characters, and duplicate texts (contradictory if their answers differ),
        ready for JSON."""
        answers = np.frombuffer(self.answers, dtype=np.int64)
        repeated = self._repeated()
        unused = Counter(self.unused)
        for num, names in self.shapes.values():
            unused.update(dict.fromkeys(names, num))
        contradictory = [same for same in repeated if len({*answers[same].tolist()} - {0}) > 1]
        return {
            "num_problems": len(self.texts),
            "num_answers": int(np.count_nonzero(answers)),
            "num_solutions": len(self.solution_lengths),
            "checkers": dict(sorted(self.checkers.items())),
            "problem_characters": _lengths(self.problem_lengths),
            "solution_characters": _lengths(self.solution_lengths),
            "num_duplicate_texts": sum(len(same) - 1 for same in repeated),
            "num_contradictory_texts": len(contradictory),
            "duplicate_examples": [
                [self._row(i) for i in same[:2].tolist()] for same in (contradictory or repeated)[:3]
            ],
            "layouts": dict(self.layouts.most_common()),
            "columns": {name: {k: list(v) for k, v in of.items()} for name, of in self.sources.items()},
            "unused_columns": dict(unused.most_common()),
            "num_context_turns": self.num_context_turns,
            "num_dialogues": self.num_dialogues,
            "num_trained_turns": self.num_trained_turns,
            "num_left_turns": self.num_left,
            "first_left_turn": self.first_left,
        }

    def _repeated(self) -> list[Any]:
        """Return the places of the problems with each text that occurs more than once, in order."""
        texts = np.frombuffer(self.texts, dtype=np.int64)
        order = np.argsort(texts, kind="stable")
        ends = np.flatnonzero(np.diff(texts[order])) + 1
        groups = [same for same in np.split(order, ends) if len(same) > 1]
        return sorted(groups, key=lambda same: int(same[0]))

    def _row(self, index: int) -> str:
        file, number = list(self.files)[self.places[index]], self.numbers[index]
        return file if number < 0 else f"{file}:{number}"


def describe(problems: Iterable[Problem], needs: Collection[str] = ()) -> dict[str, Any]:
    """Return the result of a ``Description`` of all problems."""
    description = Description(needs)
    for problem in problems:
        description.add(problem)
    return description.result()


def read_as(described: Mapping[str, Any]) -> list[str]:
    """Return a sentence for every layout but our own: its name, its rows, and which columns are read as what."""
    found = []
    for name, num in described["layouts"].items():
        columns = described["columns"][name]
        renamed = [f"{ours} = {' and '.join(of)}" for ours, of in columns.items() if list(of) != [ours]]
        if name != "truestep" or renamed:
            of_it = f": {', '.join(renamed)}" if renamed else ""
            found.append(f"{count(num, 'row')} {verb(num, 'are')} read as {name}{of_it}")
    return found


def use_of(settings: Settings, name: str) -> str:
    """Return what is done with the solutions of a data set."""
    is_held = name in [stage.validation.data for stage in settings.stages]
    return "measured (validation loss)" if is_held else TRAINED_ON


def needs_of(settings: Settings, guided: Iterable[str] = ()) -> dict[str, set[str]]:
    """Return the columns that every row of each used data set needs. A stage without a checker does not need answers.
    ``guided`` has the data sets whose solutions a stage that samples trains on."""
    needs: defaultdict[str, set[str]] = defaultdict(set)
    for stage in settings.stages:
        checked = stage.kind != "rl" or "checker" in [e.function for e in stage.reward_entries]
        column = "solution" if stage.kind == "sft" else "answer"
        for name in stage.data_names:
            needs[name].add(column if checked else "problem")
        if stage.dev.data:
            needs[stage.dev.data].add("answer")
        if stage.validation.data:
            needs[stage.validation.data].add("solution")
    for name in settings.evaluate.data:
        needs[name].add("answer")
    for name in guided:
        needs[name].add("solution")
    return needs


def not_used(described: Mapping[str, Any], use: str = TRAINED_ON, needs: Collection[str] = ()) -> list[str]:
    """Return sentences about the columns and turns that are not trained on or graded with, and about dialogues.
    ``needs`` has "problem" but not "answer" if samples are rewarded without the checker."""
    found = []
    read = {
        name: ours for of in described["columns"].values() for ours, names in of.items() for name in names
    }
    columns = dict(described["unused_columns"])
    if "problem" in needs and "answer" not in needs:
        answers = [name for name in columns if read.get(name) == "answer"]
        found += [
            f"the answers ({name}, {count(columns.pop(name), 'row')}) are not graded, because no stage's reward has the "
            "checker; your own reward functions get them"
            for name in answers
        ]
    if columns:
        named = {name: f" = {read[name]}" if read.get(name, name) != name else "" for name in columns}
        names = ", ".join(
            f"{name}{named[name]} ({count(num, 'row')})" for name, num in list(columns.items())[:10]
        )
        more = f" and {len(columns) - 10} more" if len(columns) > 10 else ""
        found.append(f"not used (only your own reward functions get them): {names}{more}")
    if num := described["num_dialogues"]:
        turns, rows = described["num_trained_turns"], described["num_problems"]
        found.append(
            f"{count(num, 'row', rows)} {verb(num, 'are')} {'a dialogue' if num == 1 else 'dialogues'} with several assistant "
            f'turns that are {use}, {turns} in all (train_turns = "all")'
        )
    if num := described["num_left_turns"]:
        found.append(
            f"{count(num, 'dialogue')} {verb(num, 'end')} with a turn that no assistant's turn follows; it is left out (the "
            f"first: {described['first_left_turn']})"
        )
    if num := described["num_context_turns"]:
        found.append(f"earlier assistant turns of {count(num, 'row')} are context and are not {use}")
    return found


def _lengths(values: array[int]) -> dict[str, float]:
    """Return the smallest, median, mean and largest length; empty without lengths."""
    if not values:
        return {}
    lengths = np.frombuffer(values, dtype=np.int64)
    middle = float(np.median(lengths))
    return {
        "min": int(lengths.min()), "median": int(middle) if middle.is_integer() else middle,
        "mean": round(float(lengths.mean()), 1), "max": int(lengths.max()),
    }  # fmt: skip
