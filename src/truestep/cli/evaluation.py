"""``truestep eval RECIPE`` and the commands beside it: one line here for each."""

from __future__ import annotations

from collections.abc import Sequence

import typer

DEFAULT = "recipe"  # what ``truestep eval WORD`` means where WORD names no command
COMMANDS = (DEFAULT, "grade")
HELP = "Evaluate a model: truestep eval RECIPE (the same as truestep eval recipe RECIPE), or one of these commands."


def app() -> typer.Typer:
    """The group of ``eval`` commands."""
    from truestep.cli import eval_grade, run

    group = typer.Typer(help=HELP, no_args_is_help=True)
    functions = {DEFAULT: run.evaluate, "grade": eval_grade.grade}
    for name in COMMANDS:
        group.command(name)(functions[name])
    return group


def with_default(words: Sequence[str]) -> list[str]:
    """A command line in which ``eval RECIPE`` names its command."""
    known = (*COMMANDS, "--help")
    if len(words) > 1 and words[0] == "eval" and words[1] not in known:
        return ["eval", DEFAULT, *words[1:]]
    return list(words)
