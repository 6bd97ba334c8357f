"""``truestep data check`` validates every row of a file or a recipe; ``truestep data show`` prints what is
trained."""

from __future__ import annotations

from typing import Annotated

import typer

app = typer.Typer(help="Check data row by row, or show what is trained.", no_args_is_help=True)
_Set = Annotated[list[str] | None, typer.Option("--set", help="Override a setting: key=value.")]
_Json = Annotated[bool, typer.Option("--json", help="Print one JSON document alone.")]


@app.command()
def check(
    source: Annotated[
        str, typer.Argument(help="A recipe (.toml), a .jsonl or .parquet file, or a folder of them.")
    ],
    overrides: _Set = None,
    gold: Annotated[bool, typer.Option(help="Let the checker judge every gold answer by itself.")] = True,
    as_json: _Json = False,
) -> None:
    """Validate every row; print counts, lengths, duplicates, golds that the checker refuses, and overlap."""
    from truestep.cli import data_actions

    data_actions.check(source, overrides or (), gold=gold, as_json=as_json)


@app.command()
def show(
    recipe: Annotated[str, typer.Argument(help="A recipe (.toml).")],
    num: Annotated[int, typer.Option("--num", min=1, help="Examples per data set.")] = 2,
    overrides: _Set = None,
    as_json: _Json = False,
) -> None:
    """Print examples as the model sees them, with what is trained in bold green between ⟦ and ⟧."""
    from truestep.cli import data_actions

    data_actions.show(recipe, overrides or (), num=num, as_json=as_json)
