"""``truestep eval MODEL``, ``truestep eval RECIPE`` and the commands beside them: one line here for each."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import typer

DEFAULT = "model"  # what ``truestep eval WORD`` means where WORD names no command
COMMANDS = (DEFAULT, "list", "compare", "import", "export", "overlap", "grade")
HELP = (
    "Evaluate a model: truestep eval MODEL --benchmarks ..., truestep eval RECIPE, or one of these commands."
)


def app() -> typer.Typer:
    """The group of ``eval`` commands."""
    from truestep.cli import eval_files, eval_grade, eval_model

    group = typer.Typer(help=HELP, no_args_is_help=True)
    functions: dict[str, Callable[..., None]] = {
        DEFAULT: eval_model.evaluate,
        "list": eval_files.list_benchmarks,
        "compare": eval_files.compare,
        "import": eval_files.import_logs,
        "export": eval_files.export,
        "overlap": eval_files.overlap,
        "grade": eval_grade.grade,
    }
    for name in COMMANDS:
        group.command(name)(functions[name])
    return group


def with_default(words: Sequence[str]) -> list[str]:
    """A command line in which ``eval MODEL`` names its command."""
    known = (*COMMANDS, "--help")
    if len(words) > 1 and words[0] == "eval" and words[1] not in known:
        return ["eval", DEFAULT, *words[1:]]
    return list(words)
