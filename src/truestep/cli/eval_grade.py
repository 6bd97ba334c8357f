"""``truestep eval grade PAIRS``: the grader alone, on a file of gold and predicted answers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from truestep.cli.run import Json


def grade(
    pairs: Annotated[
        Path, typer.Argument(help="JSON lines with the fields gold and pred.", show_default=False)
    ],
    workers: Annotated[
        int, typer.Option("--workers", min=1, help="Child processes for symbolic comparison.")
    ] = 2,
    second: Annotated[
        bool, typer.Option("--second", help="Also grade every answer with math-verify, as a second opinion.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Grade every (gold, pred) pair of a file; no model is loaded. Optional fields: id, kind (choice),
    choices."""
    from truestep.cli.progress import announce

    announce(f"truestep eval grade: grading the pairs of {pairs}")
    from truestep.grade.pairs import grade_pairs, read_pairs, table

    result = grade_pairs(read_pairs(pairs), workers=workers, second_opinion=second)
    typer.echo(json.dumps(result) if as_json else table(result))
