"""``truestep settings KEY``, which explains the keys of recipes and studies."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Annotated

import typer

from truestep.cli.output import echo
from truestep.cli.run import Json
from truestep.explained import Key, Table

_KEY = "A key such as stages.rl.steps or only steps. Without a key, all keys are listed."
Wanted = Annotated[str, typer.Argument(metavar="KEY", help=_KEY, show_default="all keys")]


def all_tables() -> dict[str, list[Table]]:
    """Return every table of settings, by the kind of file that has it."""
    from truestep.explained import tables
    from truestep.pipeline.paper_plan import Declared
    from truestep.settings import Settings
    from truestep.study.plan import Study

    return {"recipe": [*tables(Settings), *tables(Declared, "declared")], "study": tables(Study)}


def find(wanted: str, keys: Sequence[Key]) -> list[Key]:
    """Return the keys that are called ``wanted``, which may be a path as in --set or only its end. Raises UserError."""
    from truestep.errors import ALIASES, UserError, did_you_mean

    wanted = ALIASES.get(wanted, (wanted,))[0]  # what other frameworks call it

    def is_wanted(key: Key) -> bool:
        own, given = [part for part in key.path.split(".") if part != "NAME"], wanted.split(".")
        return own[-1] == given[-1] and (set(own) <= set(given) or set(given) <= set(own))

    if found := [key for key in keys if is_wanted(key)]:
        return found
    names, word = list(dict.fromkeys(key.name for key in keys)), wanted.rpartition(".")[2]
    hint = did_you_mean(word, names) or next((f'; did you mean "{n}"?' for n in names if word in n), "")
    raise UserError(f'"{wanted}" is not a setting{hint or "; truestep settings lists all of them"}')


def settings(key: Wanted = "", as_json: Json = False) -> None:
    """Explain a setting of recipes and studies: its type, default, meaning and an example."""
    files = all_tables()
    keys = [key for tables in files.values() for table in tables for key in table.every_key]
    found = find(key, keys) if key else keys
    if as_json:
        echo(json.dumps([asdict(one) for one in found], ensure_ascii=False))
        return
    of_study = {key for table in files["study"] for key in table.every_key}
    for one in found:
        default = f"default: {one.default}" if one.default else "must be set"
        about = f"{one.path}{' (of a study)' if one in of_study else ''}: {one.type}; {default}"
        lines = [
            about,
            f"  {one.meaning}",
            "  Example:",
            *(f"    {line}" for line in (one.header, one.example) if line),
        ]
        echo("\n".join(lines) if key else about)
