"""``truestep method check | list``, for the built-in methods and the user's own."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Annotated

import typer

from truestep.cli.output import echo

app = typer.Typer(no_args_is_help=True, help="Training methods: list the built-in ones, or check one.")
_NAMED = "FILE.py:NAME, or the name of a built-in method."
_OPTION = "Set an option of the method, such as clip_high=0.3. Can be repeated."
Named = Annotated[str, typer.Argument(metavar="METHOD", help=_NAMED, show_default=False)]
Options = Annotated[list[str] | None, typer.Option("--option", help=_OPTION)]
Json = Annotated[bool, typer.Option("--json", help="Print only one JSON document.")]


@app.command("list")
def list_methods(as_json: Json = False) -> None:
    """List the built-in methods, with what each trains on and the paper it comes from."""
    from truestep.objective.methods import METHODS, fits_older_samples

    table = []
    for row in (make() for make in METHODS.values()):
        kind, uses = ("sft", "demonstrations") if row.plan is None else ("rl", "samples")
        also = kind == "rl" and row.needs_demonstrations
        table.append({
            "method": row.name, "kind": kind, "demonstrations": kind == "sft" or also,
            "terms": [term.name for term in row.terms], "source": row.source,
            "rollout_ahead": fits_older_samples(row.name),
        })  # fmt: skip
        if not as_json:
            uses += ", demonstrations" if also else ""
            echo(f"{row.name:<22} {kind:<4} {uses:<24} {row.source}")
    if as_json:
        echo(json.dumps(table, indent=1))


@app.command()
def check(method: Named, options: Options = None, as_json: Json = False) -> None:
    """Check that a method's update does not depend on how a step is split, packed, ordered, or divided
    between processes.

    Exit codes: 0 every check passed · 1 a check failed · 2 the method cannot be built.
    """
    import tomllib

    from truestep.cli.progress import ConsoleReporter
    from truestep.errors import UserError
    from truestep.pipeline.method_check import check_method

    try:
        given = tomllib.loads("\n".join(options or ()))
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"--option: {error}; pass NAME=VALUE in TOML syntax, e.g. clip_high=0.3") from None
    echo(f"{method}: checking 4 steps of a tiny model in float64", err=True)
    found, quiet = [], ConsoleReporter(quiet=True)
    with tempfile.TemporaryDirectory(prefix="truestep-method-") as folder:
        relations = check_method(method, given, base_dir=Path.cwd(), folder=Path(folder), reporter=quiet)
        for relation in relations:
            found.append(relation)
            if not as_json:
                verdict = f"{relation.name:<20} {'holds' if relation.holds else 'VIOLATED':<9}"
                echo(f"{verdict} {relation.error:.1e} (at most {relation.limit:.0e})")
    if as_json:
        rows = [{"relation": r.name, "holds": r.holds, "error": r.error, "limit": r.limit} for r in found]
        echo(json.dumps({"method": method, "relations": rows}, indent=1))
    raise typer.Exit(0 if all(r.holds for r in found) else 1)
