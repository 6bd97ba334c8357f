"""The actions of ``truestep data check`` and ``convert``, imported only if one of them runs."""

from __future__ import annotations

import json
import time
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from truestep.cli.data import columns_of
from truestep.cli.output import PlainConsole, echo
from truestep.cli.progress import HEARTBEAT_SECONDS, announce
from truestep.data.convert import SUFFIXES, TARGETS, converted, write_rows
from truestep.data.describe import TRAINED_ON, Description, describe, needs_of, not_used, read_as, use_of
from truestep.data.files import files_of
from truestep.data.overlap import overlap_lines, overlap_report
from truestep.data.problems import SHOWN_FAULTS, BadRows, each_row, load_problems, stream_problems
from truestep.errors import UserError, verb
from truestep.errors import count as counted
from truestep.records import Problem, Verdict
from truestep.settings import DataSettings, Settings, load_settings, parse

if TYPE_CHECKING:
    from truestep.grade.score import Grader
    from truestep.pipeline.golds import Gold

EXPLAINED = (
    "repeated: rows whose text an earlier row has; characters: of problems + solutions, shortest-longest; refused: gold "
    "answers that the checker does not accept when they are given as the answer"
)
CHUNK = 2_000  # gold answers that are graded at once


class _SetCheck:
    """The checks of one data set, made while its rows are read, so that the set need not fit into memory."""

    def __init__(
        self, name: str, data: DataSettings, *, seed: int, base_dir: Path, needs: Collection[str],
        grader: Grader | None, use: str = TRAINED_ON, encode: Callable[[Problem], object] | None = None,
    ) -> None:  # fmt: skip
        self.name, self.grader, self.use, self.needs = name, grader, use, needs
        read = stream_problems(name, data, seed=seed, base_dir=base_dir, needs=needs)
        self.source = (problem for problem, _ in each_row(read, encode)) if encode else read
        self.files, self.left, self.said_of_files = files_of(name, data, base_dir)
        self.description = Description(needs)
        self.bad: BadRows | None = None
        self.verdicts: Counter[Verdict] = Counter()
        self.refused: list[dict[str, Any]] = []
        self.unread: list[Gold] = []
        self.num_unread, self.grading = 0, 0.0
        self.began = self.spoke = time.monotonic()

    def problems(self) -> Iterator[Problem]:
        """Yield the problems while they are checked; bad rows are counted and left out."""
        waiting: list[Problem] = []
        try:
            for problem in self.source:
                self.description.add(problem)
                waiting += [problem] if problem.answer and self.grader else []
                if len(waiting) == CHUNK:
                    self._grade(waiting)
                    waiting = []
                yield problem
        except BadRows as error:
            self.bad = error
        self._grade(waiting)
        reading = time.monotonic() - self.began - self.grading
        announce(f"{self.name}: rows read in {reading:.1f} s, gold answers graded in {self.grading:.1f} s")

    def _grade(self, problems: Sequence[Problem]) -> None:
        if not self.grader or not problems:
            return
        from truestep.pipeline.golds import grade_golds

        began = time.monotonic()
        for gold in grade_golds(self.grader, problems):
            problem, score = gold.problem, gold.score
            self.verdicts[score.verdict or Verdict.UNSCORED] += 1
            if score.verdict is not Verdict.CORRECT:
                fault = {"verdict": score.label, "reason": score.reason}
                self.refused.append({"id": problem.id, "row": problem.row, "answer": problem.answer, **fault})
            elif gold.text_only:
                self.num_unread += 1
                self.unread += [gold] if len(self.unread) < SHOWN_FAULTS else []
        self.grading += time.monotonic() - began
        if time.monotonic() - self.spoke > HEARTBEAT_SECONDS:
            self.spoke = time.monotonic()
            announce(f"{self.name}: {self.verdicts.total()} gold answers graded in {self.grading:.0f} s")

    def result(self) -> dict[str, Any]:
        """Return the description, the bad rows and the gold answers, ready for JSON."""
        bad = {"count": self.bad.count, "first": self.bad.first} if self.bad else {"count": 0, "first": []}
        files = {"files": self.files, "files_not_read": self.left}
        found = {**files, **self.description.result(), "bad_rows": bad}
        if self.grader:
            examples = [{"row": gold.problem.row, "answer": gold.problem.answer} for gold in self.unread]
            counts = {"n": self.verdicts.total(), **{v.value: self.verdicts[v] for v in Verdict}}
            unread = {"num_text_only": self.num_unread, "text_only_examples": examples}
            found["gold"] = {**counts, "refused": self.refused, **unread}
        return found


def check(
    source: str, overrides: Sequence[str], columns: Sequence[str], *, gold: bool, as_json: bool
) -> None:
    """Validate every row of every data set and print the results. Exit with 1 if a gold answer is refused.
    Raises BadRows, after the results have been printed, if there are bad rows."""
    announce(f"truestep data check: reading {source}")

    from truestep.grade.score import Grader

    with ExitStack() as stack:
        grader = stack.enter_context(Grader()) if gold else None
        if source.endswith(".toml"):
            require_no_columns(source, columns)
            settings = load_settings(source, overrides)
            base_dir = Path(source).parent
            needs, made_of = needs_of(settings), encoder(settings)
            checks = {
                name: _set_check(settings, name, base_dir, grader, needs[name], made_of)
                for name in settings.data
            }
            watched = [name for s in settings.stages for name in s.watched_data.values()]
            used = [*settings.evaluate.data, *watched]
            judged = {name: list(checks[name].problems()) for name in dict.fromkeys(used)}
            others = {n: judged[n] if n in judged else made.problems() for n, made in checks.items()}
            names = dict.fromkeys(name for s in settings.stages for name in s.data_names)
            trained = {name: others.pop(name) for name in names if name in others}
            pairs = overlap_report(trained, judged)["pairs"]
        else:
            name, data = of_file(source, overrides, columns)
            made = _SetCheck(name, data, seed=0, base_dir=Path(), needs=(), grader=grader)
            checks, pairs = {name: made}, []
            others = {name: checks[name].problems()}
        for problems in others.values():
            deque(problems, maxlen=0)
    described = {name: made.result() for name, made in checks.items()}
    num_refused = sum(len(made.refused) for made in checks.values())
    if as_json:
        echo(json.dumps({"data": described, "overlap": pairs, "num_refused_golds": num_refused}))
    else:
        _print_check(PlainConsole(soft_wrap=True), checks, described, pairs)
    if bad := [made.bad for made in checks.values() if made.bad]:
        raise BadRows(sum(error.count for error in bad), bad[0].first, remedy="")
    if num_refused:
        raise typer.Exit(1)


def require_no_columns(recipe: str, columns: Sequence[str]) -> None:
    if columns:
        raise UserError(
            f"--column applies only to data files, but {recipe} is a recipe; set data.NAME.columns in it"
        )


def of_file(source: str, overrides: Sequence[str], columns: Sequence[str]) -> tuple[str, DataSettings]:
    """Return the name and the settings of a data set that is a file, a pattern or a folder."""
    if overrides:
        raise UserError(f"--set applies only to recipes, but {source} is a data file; remove --set")
    data = parse(DataSettings, {"source": source, "columns": columns_of(columns)}, where="--column")
    return Path(source).name.partition(".")[0] or Path(source).stem, data


def data_of(
    source: str, name: str | None, overrides: Sequence[str], columns: Sequence[str]
) -> tuple[str, DataSettings, int, Path]:
    """Return the name and the settings of a file's data set, or of one of a recipe's, its seed and its folder."""
    if not source.endswith(".toml"):
        if name:
            raise UserError(
                f"--data names a data set of a recipe, but {source} is a data file; remove --data"
            )
        return *of_file(source, overrides, columns), 0, Path()
    require_no_columns(source, columns)
    settings = load_settings(source, overrides)
    name = name or (next(iter(settings.data)) if len(settings.data) == 1 else "")
    if name not in settings.data:
        known = ", ".join(settings.data)
        raise UserError(f"{source} has the data sets {known}; pass --data with one of them")
    return name, settings.data[name], settings.seed, Path(source).parent


def convert(
    chosen: tuple[str, DataSettings, int, Path], to: str, out: Path, *, dry_run: bool, as_json: bool
) -> None:
    """Write a data set in another layout, and print what was written and what the layout has no place for."""
    target = next((known for known in TARGETS if known == to), None)
    if target is None:
        raise UserError(f"--to {to}: expected one of {', '.join(TARGETS)}")
    if out.suffix not in SUFFIXES:
        raise UserError(f"--out {out}: expected a .jsonl or .parquet file; change the name")
    if out.exists() and not dry_run:
        raise UserError(f"--out {out} exists; remove it, or pass a different name")
    name, data, seed, base_dir = chosen
    problems = load_problems(name, data, seed=seed, base_dir=base_dir, needs=())
    rows, lost = [], Counter[str]()
    for problem in problems:
        row, left = converted(problem, target, name, flat=out.suffix == ".parquet")
        rows.append(row)
        lost.update(left)
    described = describe(problems)
    if not dry_run:
        write_rows(out, rows)
    found = {
        "layouts": described["layouts"],
        "rows": len(rows),
        "to": to,
        "lost": dict(lost),
        "first": rows[0],
    }
    unread = described["unused_columns"]
    if as_json:
        echo(json.dumps({**found, "unused_columns": unread, "out": None if dry_run else str(out)}))
        return
    for said in (*read_as(described), *not_used(described)):
        echo(said)
    for what, num in lost.items():
        echo(f"{to} has no place for: {what} ({counted(num, 'row')})")
    echo(
        json.dumps(rows[0], ensure_ascii=False)
        if dry_run
        else f"{counted(len(rows), 'row')} {verb(len(rows), 'are')} written\n{out}"
    )


def _set_check(
    settings: Settings,
    name: str,
    base_dir: Path,
    grader: Grader | None,
    needs: Collection[str],
    made_of: Callable[[Collection[str], Problem], object] | None,
) -> _SetCheck:
    data, use = settings.data[name], use_of(settings, name)
    encode = partial(made_of, needs) if made_of else None
    if "problem" in needs and "answer" not in needs:
        grader = None  # no stage's reward has the checker
    named: dict[str, Any] = {"seed": settings.seed, "base_dir": base_dir, "needs": needs, "use": use}
    return _SetCheck(name, data, grader=grader, encode=encode, **named)


def encoder(settings: Settings) -> Callable[[Collection[str], Problem], object] | None:
    """Return a function that makes the tokens that a run makes of a row, and raises UserError as it does; None, and a
    line that says why, if the recipe's tokenizer cannot be loaded, because rows can be checked without it."""
    from truestep.data.chat import encode_prompt
    from truestep.data.demonstrations import encode_row
    from truestep.data.templates import choose_template
    from truestep.model.load import load_tokenizer
    from truestep.pipeline.prepare import context_and_eos

    try:
        tokenizer, (context, _) = load_tokenizer(settings.model), context_and_eos(settings)
        choose_template(tokenizer, settings.chat.template, settings.model.path)
    except UserError as error:
        announce(f"the rows are not checked with the tokenizer: {error}")
        return None

    def encode(needs: Collection[str], problem: Problem) -> None:
        if {"answer", "problem"} & {*needs}:
            encode_prompt(tokenizer, problem, settings.chat)
        if "solution" in needs:
            encode_row(tokenizer, problem, settings.chat, context)

    return encode


def _print_check(
    console: Any,
    checks: Mapping[str, _SetCheck],
    described: Mapping[str, dict[str, Any]],
    pairs: Sequence[dict[str, Any]],
) -> None:
    from rich.table import Table

    from truestep.pipeline.golds import said_of

    table = Table(
        "data", "rows", "answers", "solutions", "repeated", "characters", "refused", "bad rows", box=None
    )
    for name, d in described.items():
        lengths = [d[key] for key in ("problem_characters", "solution_characters") if d[key]]
        refused = str(len(d["gold"]["refused"])) if "gold" in d else "not judged"
        counts = [str(d[f"num_{key}"]) for key in ("problems", "answers", "solutions", "duplicate_texts")]
        characters = " + ".join(f"{found['min']}-{found['max']}" for found in lengths)
        table.add_row(name, *counts, characters, refused, str(d["bad_rows"]["count"]))
    for column in table.columns:  # a name or a range that is cut or split cannot be read; a long line can
        column.no_wrap = True
    wide = console.options.update(max_width=1000)
    console.print(table, width=console.measure(table, options=wide).maximum, crop=False)
    console.print(EXPLAINED, markup=False)
    for name, d in described.items():
        for fault in d["bad_rows"]["first"]:
            console.print(f"{name}: bad row: {fault}", markup=False)
        for said in (
            checks[name].said_of_files,
            *read_as(d),
            *not_used(d, checks[name].use, checks[name].needs),
        ):
            if said:
                console.print(f"{name}: {said}", markup=False)
        if d.get("gold", {}).get("num_text_only"):
            console.print(
                f"{name}: {said_of(checks[name].unread, checks[name].num_unread, d['gold']['n'])}",
                markup=False,
            )
        if d["num_contradictory_texts"]:
            rows = " and ".join(d["duplicate_examples"][0])
            count = f"problem texts with different answers: {d['num_contradictory_texts']}"
            console.print(f"{name}: {count}, e.g. {rows}", markup=False)
        for gold in d.get("gold", {}).get("refused", ())[:10]:
            words = f"{gold['verdict']} {gold['reason']}".strip()
            console.print(f"{name}: {gold['row']}: answer {gold['answer']!r} is {words}", markup=False)
    for line in overlap_lines({"pairs": pairs}):
        console.print(line, markup=False)
