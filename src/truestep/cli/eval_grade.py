"""``truestep eval grade PAIRS``: the grader alone, on a file of gold and predicted answers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer


def grade(
    pairs: Annotated[Path, typer.Argument(help="JSON lines with the fields gold and pred.", show_default=False)],
    workers: Annotated[int, typer.Option("--workers", min=1, help="Processes for the algebra.")] = 2,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document alone.")] = False,
) -> None:
    """Grade every (gold, pred) pair of a file; nothing is trained and no model is loaded."""
    from truestep.grade.pairs import grade_pairs, read_pairs, table

    result = grade_pairs(read_pairs(pairs), workers=workers)
    typer.echo(json.dumps(result) if as_json else table(result))
