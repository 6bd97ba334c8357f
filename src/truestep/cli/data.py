"""``truestep data check`` validates every row; ``truestep data show`` prints which tokens are trained on."""

from __future__ import annotations

from typing import Annotated

import typer

from truestep.cli.run import Json, Set

app = typer.Typer(help="Check data row by row, or show which tokens are trained on.", no_args_is_help=True)


_SOURCE = "A recipe (.toml), a .jsonl or .parquet file, or a folder."
_GOLD = "Grade every gold answer against itself, and report those that the grader refuses."
Source = Annotated[str, typer.Argument(help=_SOURCE, show_default=False)]
Recipe = Annotated[str, typer.Argument(help="The recipe, a TOML file.", show_default=False)]
Num = Annotated[int, typer.Option("--num", min=1, help="How many examples of each data set to print.")]
Gold = Annotated[bool, typer.Option(help=_GOLD)]


@app.command()
def check(source: Source, overrides: Set = None, gold: Gold = True, as_json: Json = False) -> None:
    """Validate every row; print counts, lengths, duplicates, gold answers that the grader refuses, and
    overlap between training and evaluation data."""
    from truestep.cli import data_actions

    data_actions.check(source, overrides or (), gold=gold, as_json=as_json)


@app.command()
def show(recipe: Recipe, num: Num = 2, overrides: Set = None, as_json: Json = False) -> None:
    """Print examples as the model sees them. Tokens that are trained on are bold green, between ⟦ and ⟧."""
    from truestep.cli import data_actions

    data_actions.show(recipe, overrides or (), num=num, as_json=as_json)
