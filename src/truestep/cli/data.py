"""``truestep data check`` validates every row, ``show`` prints which tokens are trained on, ``convert`` writes rows."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from truestep.cli.run import Json, Set
from truestep.errors import UserError

app = typer.Typer(
    help="Check data row by row, show which tokens are trained on, or convert data.", no_args_is_help=True
)


_SOURCE = (
    "A recipe (.toml), a file (.jsonl, .json, .csv, .parquet, also .gz), a pattern (*.jsonl) or a folder."
)
_COLUMN = "Name a column of a file, such as answer=label. Can be repeated. In a recipe: data.NAME.columns."
_MODEL = "The model (folder or hub id) whose tokenizer and template the rows of a file are shown with."
_DATA = "The data set of the recipe to convert."
_OUT = "The file to write, .jsonl or .parquet."
_DRY = "Convert and count the rows, and print the first one; write nothing."
_GOLD = "Grade every gold answer against itself, and report those that the grader refuses."
Source = Annotated[str, typer.Argument(help=_SOURCE, show_default=False)]
Model = Annotated[str, typer.Option("--model", help=_MODEL, show_default=False)]
Num = Annotated[int, typer.Option("--num", min=1, help="How many examples of each data set to print.")]
ShownData = Annotated[
    str | None, typer.Option("--data", metavar="NAME", help="The only data set of the recipe to show.")
]
RowNumber = Annotated[
    int | None,
    typer.Option("--row", metavar="N", min=1, help="Show only the row with this number in its file."),
]
Gold = Annotated[bool, typer.Option(help=_GOLD)]
Columns = Annotated[list[str] | None, typer.Option("--column", metavar="OURS=THEIRS", help=_COLUMN)]
To = Annotated[str, typer.Option("--to", metavar="LAYOUT", help="trl, verl, openai or truestep.")]
Data = Annotated[str | None, typer.Option("--data", metavar="NAME", help=_DATA)]
Out = Annotated[Path, typer.Option("--out", help=_OUT, show_default=False)]


def columns_of(items: Sequence[str]) -> dict[str, str]:
    """Return the values of --column as a table. Raises UserError for an item that is not OURS=THEIRS."""
    for item in items:
        if not all(part.strip() for part in item.partition("=")):
            raise UserError(f"--column {item} is not OURS=THEIRS; pass, for example, --column answer=label")
    return {ours.strip(): theirs.strip() for ours, _, theirs in (item.partition("=") for item in items)}


@app.command()
def check(
    source: Source, overrides: Set = None, columns: Columns = None, gold: Gold = True, as_json: Json = False
) -> None:
    """Validate every row; print counts, lengths, duplicates, gold answers that the grader refuses, and
    overlap between training and evaluation data."""
    from truestep.cli import data_actions

    data_actions.check(source, overrides or (), columns or (), gold=gold, as_json=as_json)


@app.command()
def show(
    source: Source,
    num: Num = 2,
    data: ShownData = None,
    row: RowNumber = None,
    overrides: Set = None,
    columns: Columns = None,
    model: Model = "",
    as_json: Json = False,
) -> None:
    """Print examples as the model sees them. What is trained on is bold green, between ⟦ and ⟧. The rows of a
    file are shown as texts or, with --model, as tokens."""
    from truestep.cli import data_show_actions

    data_show_actions.show(
        source, overrides or (), columns or (), model, num=num, data=data, row=row, as_json=as_json
    )


@app.command()
def convert(
    source: Source, to: To, out: Out, data: Data = None, overrides: Set = None, columns: Columns = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help=_DRY)] = False, as_json: Json = False,
) -> None:  # fmt: skip
    """Write the rows of a file, a folder or a recipe's data set in another program's layout."""
    from truestep.cli import data_actions

    chosen = data_actions.data_of(source, data, overrides or (), columns or ())
    data_actions.convert(chosen, to, out, dry_run=dry_run, as_json=as_json)
